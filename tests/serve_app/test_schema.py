"""The JSON schemas, the tables of docs/configuration.md and the examples agree with the models."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from referencing import Registry, Resource

from deepseek.errors import ConfigError
from serve_app import autoscaling_settings, engine_sections, http_sections, sections
from serve_app.config import ServeConfig
from serve_app.mistakes import MOVED
from serve_app.schema import PAGES, config_schema, deploy_schema

EXAMPLES = ("local.yaml", "node.yaml", "pools.yaml", "fleet.yaml", "trtllm.yaml")
ECHO = {"pools": {"default": {"engine": {"kind": "echo"}}}}


@pytest.fixture(scope="module")
def examples(root: Path) -> dict[str, dict[str, Any]]:
    """Every example, and the manifest of KubeRay, as mappings."""
    folder = root / "examples" / "serve"
    assert {path.name for path in folder.iterdir()} == {*EXAMPLES, "keys.yaml"}
    found = {n: yaml.safe_load((folder / n).read_text(encoding="utf-8")) for n in EXAMPLES}
    manifest = (root / "cluster" / "manifests" / "rayservice.yaml").read_text(encoding="utf-8")
    found["rayservice.yaml"] = yaml.safe_load(yaml.safe_load(manifest)["spec"]["serveConfigV2"])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_is_generated_is_up_to_date(page: str, root: Path) -> None:
    found = (root / "docs" / page).read_text(encoding="utf-8")
    assert found == PAGES[page](found), "run `python -m serve_app.schema docs`"


def test_a_table_that_was_edited_is_made_anew(root: Path) -> None:
    page = (root / "docs" / "configuration.md").read_text(encoding="utf-8")
    make = PAGES["configuration.md"]
    for row in ("| `shutdown_s` | number > 0 | `30.0` |", "| `echo` | `pools.default.engine`,"):
        assert page.count(row) == 1
        assert make(page.replace(row, "| edited |")) == page


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The model and every model that its keys hold."""
    modules = (sections, engine_sections, http_sections, autoscaling_settings)
    names = config_schema()["$defs"]
    found = {getattr(module, name) for module in modules for name in names if hasattr(module, name)}
    assert {one.__name__ for one in found} == set(names)
    return {model} | found


def test_every_key_says_what_it_means() -> None:
    for model in models(ServeConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_every_moved_key_is_where_the_sentence_says() -> None:
    schema = config_schema()
    for old, new in MOVED.items():
        place: Any = schema
        for part in new.partition(",")[0].split("."):
            if "patternProperties" in place:
                (place,) = place["patternProperties"].values()
                place = schema["$defs"][place["$ref"].rpartition("/")[2]]
                continue
            choices = place.get("oneOf", [place])
            resolved = [
                schema["$defs"][c["$ref"].rpartition("/")[2]] if "$ref" in c else c for c in choices
            ]
            place = next(c["properties"][part] for c in resolved if part in c["properties"])
        assert old == "echo" or place["description"], old


def test_no_page_names_a_key_by_a_name_that_it_has_no_more(root: Path) -> None:
    schemas = [config_schema(), *config_schema()["$defs"].values()]
    names = {name for schema in schemas for name in schema["properties"]}
    gone = MOVED.keys() - names - {"engine_replicas"}  # which a field of /health is called, too
    assert {"api_keys", "request_timeout_s"} <= gone
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    for page in pages:
        if page.name != "configuration.md":
            words = set(re.findall(r"[a-z_]{8,}", page.read_text(encoding="utf-8")))
            assert not words & gone, page


@pytest.mark.parametrize("name", ["local.yaml", "node.yaml", "pools.yaml"])
def test_an_example_is_valid_and_names_the_schema(
    name: str, examples: dict[str, Any], root: Path
) -> None:
    validate(examples[name], config_schema())
    ServeConfig.model_validate(examples[name])
    path = root / "examples" / "serve" / name
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / first.partition("$schema=")[2]).resolve() == (
        root / "docs" / "serve-config.schema.json"
    )


def validate(instance: Any, schema: dict[str, Any]) -> None:
    """Check an instance; the schema of deploy files refers to the other one by its file's name."""
    name = "serve-config.schema.json"
    registry: Any = Registry().with_resource(name, Resource.from_contents(config_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema, registry=registry).validate(instance)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["fleet.yaml", "trtllm.yaml", "rayservice.yaml"])
def test_serve_makes_our_settings_of_an_examples_arguments(
    name: str, examples: dict[str, Any]
) -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from serve_app.app import build
    from serve_app.deploy_file import check_deploy_file

    validate(examples[name], deploy_schema())
    (application,) = ServeDeploySchema.model_validate(examples[name]).applications
    got: list[ServeConfig] = []

    def stop_here(config: ServeConfig) -> Application:
        got.append(config)
        return Application.__new__(Application)

    stop_here.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    call_user_app_builder_with_args_if_necessary(stop_here, application.args)
    assert isinstance(got[0], ServeConfig)
    assert got[0].ingress.replicas >= 2
    assert got[0].pool.replicas >= 2
    (with_live,) = check_deploy_file(Path(name), examples[name])
    for deployment in application.deployments:
        if deployment.name == "ingress":
            assert with_live.live != got[0].live


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pools": {"a": {"engine": {"kind": "trtllm", "directory": "x"}}}},
        {"pools": {"a": {"engine": {"kind": "vllm", "directory": "x", "python": "p", "tp": 8}}}},
        {"pools": {"a": ECHO["pools"]["default"] | {"gpus": -1}}},
        {"pools": {"a": ECHO["pools"]["default"] | {"labels": {"a b": "c"}}}},
        {"pools": {"a": ECHO["pools"]["default"] | {"labels": {"a": "!b"}}}},
        {"pools": {}},
        {"pools": {"a": ECHO["pools"]["default"] | {"spill_over": ["No Name"]}}},
        {"pools": {"My Pool": ECHO["pools"]["default"]}},
        {"pools": {"default": {"engine": {"directory": "x"}}}},
        {"pools": {"default": {"engine": {"kind": "embedded"}}}},
        ECHO | {"prot": 1},
        ECHO | {"http": {"port": 0}},
        ECHO | {"http": {"proxy": "nginx"}},
        ECHO | {"requests": {"timeout_s": None}},
        ECHO | {"keys": {"inline": "sk-one"}},
        ECHO | {"admission": {"key_limits": {"tokens": 1}}},
    ],
)
def test_the_schema_refuses_what_the_models_refuse(given: dict[str, Any]) -> None:
    validate(ECHO, config_schema())
    ServeConfig.model_validate(ECHO)
    with pytest.raises(jsonschema.ValidationError):
        validate(given, config_schema())
    with pytest.raises(ConfigError):
        ServeConfig.model_validate(given)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("args", "prot"), 1),
        (("deployments", 0, "user_config", "http"), {}),
        (("deployments", 0, "user_config", "admission", "max_wait"), 1),
        (("deployments", 1, "user_config", "requests"), {}),
        (("deployments", 0, "name"), "gateway"),
    ],
)
def test_the_schema_of_deploy_files_refuses_unknown_keys_of_ours(
    path: tuple[Any, ...], value: Any, examples: dict[str, Any]
) -> None:
    given = json.loads(json.dumps(examples["fleet.yaml"]))
    validate(given, deploy_schema())
    place = given["applications"][0]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(given, deploy_schema())

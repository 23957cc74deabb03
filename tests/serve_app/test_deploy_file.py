"""A `serve deploy` file is checked before Serve has it: each mistake is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.errors import ConfigError
from serve_app.deploy_file import check_deploy_file, is_deploy_file

pytestmark = pytest.mark.ray

PATH = Path("fleet.yaml")


def deploy_file(args: Any = None, *deployments: Any, **application: Any) -> dict[str, Any]:
    engine = {"kind": "embedded", "directory": "/data/engine"}
    base = {
        "name": "intserve",
        "import_path": "serve_app.app:build",
        "args": {"pools": {"default": {"engine": engine}}} | (args or {}),
        "deployments": list(deployments),
    }
    return {"applications": [base | application]}


def test_arguments_and_user_configs_together_are_what_is_deployed() -> None:
    live = {"requests": {"timeout_s": 90}, "admission": {"max_queued_requests": 3}}
    raw = deploy_file(
        {"requests": {"timeout_s": 60, "default_max_tokens": 7}},
        {"name": "ingress", "user_config": live},
        {"name": "engine-default", "num_replicas": 3},
    )
    assert is_deploy_file(raw)
    assert not is_deploy_file(raw["applications"][0]["args"])
    (config,) = check_deploy_file(PATH, raw)
    assert (config.requests.timeout_s, config.requests.default_max_tokens) == (90, 7)
    assert config.admission.max_queued_requests == 3


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            deploy_file({"prot": 1}),
            "application intserve: args: unknown key 'prot'; remove or correct it",
        ),
        (deploy_file({"engine": "/data/engine"}), "args: 'engine' is now pools.default.engine.dir"),
        (
            deploy_file({"keys": {"file": "keys.yaml"}}),
            "args: keys.file: keys.yaml is relative; write the path that it has on every node",
        ),
        (
            deploy_file(None, {"name": "ingress", "user_config": {"requests": {"timeout": 1}}}),
            "user_config of deployment ingress: unknown key 'requests.timeout'; did you mean "
            "requests.timeout_s?",
        ),
        (
            deploy_file(None, {"name": "engine-default", "user_config": {"max_flushes_per_s": 0}}),
            "user_config of deployment engine-default: max_flushes_per_s: Input should be greater",
        ),
        (
            deploy_file(
                None, {"name": "ingress", "user_config": {"admission": {"max_wait_s": 700}}}
            ),
            "admission.max_wait_s 700 is longer than requests.timeout_s 600",
        ),
        (deploy_file(None, {"name": "gateway"}), "'gateway'; there are ingress, engine-default"),
        (deploy_file(import_path="other:app"), "no application has the import_path serve_app.app:"),
        (deploy_file(arg={}), "application intserve: unknown key 'arg'; did you mean args?"),
        (
            deploy_file(None, {"name": "engine-default", "replicas": 2}),
            "deployments: unknown key 'replicas'; did you mean num_replicas?",
        ),
        (
            {"applications": [], "http_option": {}},
            "unknown key 'http_option'; did you mean http_op",
        ),
        ({"applications": 3}, "applications: Input should be a valid list"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_deploy_file(PATH, raw)
    assert str(refused.value).startswith("fleet.yaml: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)

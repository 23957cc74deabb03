"""Generates what docs/ says of the configuration from its models: two JSON schemas and one page.

    python -m serve_app.schema docs

`serve-config.schema.json` describes a file for `python -m serve_app --config`,
`serve-deploy.schema.json` one for `serve deploy`; an editor that is told of them completes keys and
shows what they mean. A test generates all three and compares, so that they cannot differ from the
models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from serve_app.config import ServeConfig
from serve_app.config_page import with_tables
from serve_app.deploy_file import IMPORT_PATH
from serve_app.sections import Live, ReplicaLimits

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_CONFIG, _DEPLOY = "serve-config.schema.json", "serve-deploy.schema.json"


class _WithoutTitles(GenerateJsonSchema):
    """pydantic repeats the name of each key as its title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration."""
    schema = ServeConfig.model_json_schema(schema_generator=_WithoutTitles)
    return {"$schema": DIALECT, **schema, "title": "IntServe configuration"}


def deploy_schema() -> dict[str, Any]:
    """The JSON schema of a `serve deploy` file, as far as it is ours: the arguments of the
    application, and the `user_config` of its deployments. The rest is Serve's."""
    definitions: dict[str, Any] = {}
    deployments = []
    of_engines = {"pattern": "^engine-"}
    named: tuple[tuple[dict[str, str], type[BaseModel]], ...] = (
        ({"const": "ingress"}, Live),
        (of_engines, ReplicaLimits),
    )
    for name, model in named:
        schema = model.model_json_schema(
            schema_generator=_WithoutTitles, ref_template="#/$defs/{model}"
        )
        definitions |= schema.pop("$defs", {})
        deployments.append(
            {
                "if": {"properties": {"name": name}, "required": ["name"]},
                "then": {"properties": {"user_config": schema}},
            }
        )
    ours = {
        "if": {"properties": {"import_path": {"const": IMPORT_PATH}}, "required": ["import_path"]},
        "then": {
            "required": ["args"],
            "properties": {
                "args": {"$ref": _CONFIG},
                "deployments": {
                    "items": {
                        "required": ["name"],
                        "properties": {"name": {"anyOf": [{"const": "ingress"}, of_engines]}},
                        "allOf": deployments,
                    },
                },
            },
        },
    }
    return {
        "$schema": DIALECT,
        "title": "A serve deploy file with IntServe",
        "type": "object",
        "required": ["applications"],
        "properties": {"applications": {"type": "array", "items": {"type": "object", **ours}}},
        "$defs": definitions,
    }


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


#: File in docs/ -> how it is made of what stands there.
PAGES: dict[str, Callable[[str], str]] = {
    _CONFIG: lambda _: _text(config_schema()),
    _DEPLOY: lambda _: _text(deploy_schema()),
    "configuration.md": lambda page: with_tables(page, config_schema()),
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        path = Path(sys.argv[1]) / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(make(old), encoding="utf-8")

"""Checks a `serve deploy` file before Serve gets it: form, arguments and `user_config` of ours.

Serve itself finds a mistake only in the cluster, after it has begun to deploy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from deepseek.errors import ConfigError
from serve_app.config import ServeConfig
from serve_app.live import merged, overlaid
from serve_app.mistakes import first_mistake
from serve_app.routing.candidates import INGRESS, engine_deployment

IMPORT_PATH = "serve_app.app:build"


def is_deploy_file(raw: dict[str, Any]) -> bool:
    """Whether a mapping is one for `serve deploy`, and no configuration."""
    return "applications" in raw


def check_deploy_file(path: Path, raw: dict[str, Any]) -> list[ServeConfig]:
    """The configurations of our applications in the file, as their replicas will have them. Files
    that it names are not read: they lie on the nodes.

    Raises:
        ConfigError: the file, the arguments or the `user_config` cannot be used; says why.
    """
    # Slow to import, and not needed for a configuration.
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    try:
        applications = ServeDeploySchema.model_validate(raw).applications
        # Serve takes what it does not know for nothing.
        _refuse_unknown(raw, ServeDeploySchema, "")
        for application in raw["applications"]:
            where = f"application {application.get('name', 'default')}: "
            _refuse_unknown(application, ServeApplicationSchema, where)
            for deployment in application.get("deployments") or ():
                _refuse_unknown(deployment, DeploymentSchema, f"{where}deployments: ")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_mistake(error, ServeDeploySchema, raw)}") from None
    configs = []
    for application in applications:
        if application.import_path != IMPORT_PATH:
            continue
        try:
            overrides = {d.name: d.user_config for d in application.deployments}
            configs.append(_config(application.args, overrides))
        except ConfigError as error:
            raise ConfigError(f"{path}: application {application.name}: {error}") from None
    if not configs:
        raise ConfigError(f"{path}: no application has the import_path {IMPORT_PATH}; add one")
    return configs


def _config(args: dict[str, Any], user_configs: dict[str, Any]) -> ServeConfig:
    """Arguments and `user_config`s by deployment, together."""
    try:
        config = ServeConfig.model_validate(args)
    except ConfigError as error:
        raise ConfigError(f"args: {error}") from None
    for place, file in _paths(config):
        if not file.is_absolute():
            raise ConfigError(
                f"args: {place}: {file} is relative; write the path that it has on every node"
            )
    engines = {engine_deployment(name): pool for name, pool in config.pools.items()}
    for name, user_config in user_configs.items():
        if name != INGRESS and name not in engines:
            known = ", ".join([INGRESS, *engines])
            raise ConfigError(f"there is no deployment {name!r}; there are {known}")
        if not isinstance(user_config, dict):  # only other options, such as num_replicas
            continue
        if name != INGRESS:
            overlaid(name, engines[name].replica_limits, user_config)
            continue
        overlaid(name, config.live, user_config)
        # What arguments and user_config say together must not contradict itself, either.
        config = ServeConfig.model_validate(merged(args, user_config))
    return config


def _refuse_unknown(given: dict[str, Any], model: type[BaseModel], where: str) -> None:
    for name in given:
        if name not in model.model_fields:
            close = difflib.get_close_matches(name, model.model_fields, n=1)
            remedy = f"did you mean {close[0]}?" if close else "remove or correct it"
            raise ConfigError(f"{where}unknown key {name!r}; {remedy}")


def _paths(section: BaseModel, above: str = "") -> Iterator[tuple[str, Path]]:
    """Every path in a configuration, with its key's."""
    for name in type(section).model_fields:
        value, place = getattr(section, name), f"{above}{name}"
        if isinstance(value, Path):
            yield place, value
        elif isinstance(value, BaseModel):
            yield from _paths(value, f"{place}.")
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, BaseModel):
                    yield from _paths(inner, f"{place}.{key}.")

"""Settings that change while a replica runs: what it was started with, and Serve's `user_config`.

A replica is constructed with the `args` of a deploy file. Serve replaces every replica when `args`
change, and only tells the replicas (`reconfigure`) when a `user_config` under `deployments` does.
What that says goes over the `args` key by key, so that a file names only what it changes, and
taking a key out of it again restores the value of the `args`.
"""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from deepseek.errors import ConfigError
from serve_app.mistakes import first_mistake
from serve_app.setting_types import LiveSection

log = logging.getLogger("ray.serve")

Settings = TypeVar("Settings", bound=LiveSection)


class LiveSettings(Generic[Settings]):
    """The settings of one replica of `deployment`; `current` is what holds now."""

    def __init__(self, deployment: str, configured: Settings) -> None:
        self._deployment = deployment
        self._configured = configured
        self._started = False
        self.current = configured

    def reconfigure(self, user_config: Any) -> bool:
        """Take in Serve's `user_config`; says whether it holds now.

        One that cannot be used is an error while the replica starts. Later it changes nothing and
        is logged: Serve would stop the replica for an error, and its streams with it.

        Raises:
            ConfigError: the first `user_config` cannot be used; says why.
        """
        try:
            self.current = overlaid(self._deployment, self._configured, user_config)
        except ConfigError as error:
            if not self._started:
                raise
            log.error("%s; the settings stay as they were", error)
            return False
        self._started = True
        return True


def overlaid(deployment: str, configured: Settings, user_config: Any) -> Settings:
    """`configured` with what the `user_config` of a deployment says over it.

    Raises:
        ConfigError: unknown key or wrong value, named.
    """
    where = f"user_config of deployment {deployment}"
    if not isinstance(user_config, dict):
        raise ConfigError(f"{where}: must be a mapping of keys to values")
    model = type(configured)
    given = merged(configured.model_dump(), user_config)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_mistake(error, model, given)}") from None


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping; mappings of different `kind` are not mixed."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            same = old.get("kind", value.get("kind")) == value.get("kind", old.get("kind"))
            result[name] = merged(old, value) if same else value
        else:
            result[name] = value
    return result

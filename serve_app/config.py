"""Every setting of the service in one strict model, read from YAML, flags or `serve deploy` args.

    model_name: deepseek-v3-int4
    http: {port: 8000}
    keys: {file: keys.yaml}
    pools:
      default:
        engine: {kind: embedded, directory: runs/engine}

The models are frozen, and an unknown key is an error that names it. API keys are `SecretStr`, so
that no repr, log or traceback shows them. What each section holds is in sections.py, how to start
what is configured in app.py; docs/configuration.md and a JSON schema are made of these models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import read_yaml_mapping
from serve_app.engine_sections import EchoOptions, EmbeddedOptions, TrtllmOptions, VllmOptions
from serve_app.http_sections import HttpSection, IngressSection
from serve_app.key_forms import read_keys
from serve_app.live import merged
from serve_app.mistakes import MOVED, first_mistake
from serve_app.sections import (
    AdmissionSection,
    KeysSection,
    Live,
    PoolSection,
    ReplicaLimits,
    RequestsSection,
    ResumeSection,
    RoutingSection,
    TelemetrySection,
)
from serve_app.setting_types import POOL, ModelName, PoolName, Seconds, Section

__all__ = [
    "EchoOptions",
    "EmbeddedOptions",
    "PoolSection",
    "ReplicaLimits",
    "ServeConfig",
    "TrtllmOptions",
    "VllmOptions",
    "load_config",
    "read_settings",
]


class ServeConfig(Section):
    """What is served and how."""

    model_name: ModelName | None = Field(
        default=None,
        description="the model's name in the API; null: the engine directory's name, or `echo`",
    )
    http: HttpSection = Field(default=HttpSection(), description="the endpoint")
    ingress: IngressSection = Field(
        default=IngressSection(), description="the replicas that speak HTTP"
    )
    keys: KeysSection = Field(default=KeysSection(), description="who may ask")
    requests: RequestsSection = Field(
        default=RequestsSection(), description="what one request may take"
    )
    admission: AdmissionSection = Field(
        default=AdmissionSection(), description="how requests wait for a place in an engine"
    )
    routing: RoutingSection = Field(
        default=RoutingSection(), description="which replica of its pool a request gets"
    )
    resume: ResumeSection = Field(
        default=ResumeSection(), description="requests that outlive their replica"
    )
    pools: dict[PoolName, PoolSection] = Field(
        min_length=1,
        description="the engines, by the pool's name; all serve the same model",
        json_schema_extra={"additionalProperties": False},
    )
    telemetry: TelemetrySection = Field(
        default=TelemetrySection(), description="what operators see beside the metrics"
    )
    shutdown_s: Seconds = Field(
        default=30.0,
        description="seconds for which `python -m serve_app` lets open streams finish when it is "
        "told to stop",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _say_it_in_one_sentence(
        cls, given: Any, validate: Callable[[Any], ServeConfig]
    ) -> ServeConfig:
        """Whoever validates, a command or Serve, shows the user one sentence.

        Raises:
            ConfigError: unknown, missing, moved or contradictory keys, or a wrong value.
        """
        if isinstance(given, dict):
            for name in given:
                if name in MOVED:
                    raise ConfigError(f"{name!r} is now {MOVED[name]}")
            if "applications" in given:
                raise ConfigError(
                    "this is a file for `serve deploy`; a configuration is what stands there under "
                    "args"
                )
        try:
            config = validate(given)
        except ValidationError as error:
            raise ConfigError(first_mistake(error, cls, given)) from None
        config._check_sections()
        return config

    def _check_sections(self) -> None:
        """What sections say of each other. Raises ConfigError."""
        for name, pool in self.pools.items():
            where = f"pools.{name}.spill_over"
            for other in pool.spill_over:
                if other == name:
                    raise ConfigError(f"{where} names the pool itself; remove it")
                if other not in self.pools:
                    known = ", ".join(self.pools)
                    raise ConfigError(f"{where} names {other!r}, and the pools are {known}")
            if len(set(pool.spill_over)) < len(pool.spill_over):
                raise ConfigError(f"{where} names a pool twice; remove one")
        kinds = {pool.engine.kind for pool in self.pools.values()}
        if len(kinds) > 1 and "echo" in kinds:
            other = ", ".join(sorted(kinds - {"echo"}))
            raise ConfigError(
                f"pools has engines of the kinds echo and {other}, and all pools serve the same "
                "model; keep one kind"
            )
        # What was not written is no mistake: a default that is never reached does no harm.
        limit_s = self.requests.timeout_s
        for name, section, key in (
            ("admission", self.admission, "max_wait_s"),
            ("resume", self.resume, "wait_s"),
            ("http", self.http, "body_timeout_s"),
        ):
            value_s = getattr(section, key)
            if key in section.model_fields_set and value_s > limit_s:
                raise ConfigError(
                    f"{name}.{key} {value_s:g} is longer than requests.timeout_s {limit_s:g}, "
                    "after which no request waits any more; lower it or raise that"
                )

    @property
    def pool(self) -> PoolSection:
        """The first pool: the only one of most services."""
        return next(iter(self.pools.values()))

    @property
    def places(self) -> dict[str, int]:
        """Sequences that one replica holds at a time, by pool."""
        return {name: pool.max_ongoing_requests for name, pool in self.pools.items()}

    @property
    def live(self) -> Live:
        """The sections that change without new replicas."""
        return Live(
            requests=self.requests,
            admission=self.admission,
            routing=self.routing,
            resume=self.resume,
        )

    def drain_s(self, pool: PoolSection) -> float:
        """Seconds for which a replica of this pool that is to stop may finish its streams."""
        return pool.drain_s if pool.drain_s is not None else self.requests.timeout_s

    @property
    def longest_drain_s(self) -> float:
        """The longest of these."""
        return max(map(self.drain_s, self.pools.values()))

    @property
    def served_name(self) -> str:
        """The model's name in the API: as configured, else that of the first pool's engine
        directory, else `echo`."""
        if self.model_name is not None:
            return self.model_name
        directory = self.pool.directory
        return directory.resolve().name if directory is not None else "echo"


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, not checked.

    Raises:
        ConfigError: unreadable, or not YAML.
    """
    try:
        return read_yaml_mapping(path)
    except UnusableFileError as error:
        raise ConfigError(f"{path} {error}") from error


def load_config(path: Path | None, overrides: dict[str, Any]) -> ServeConfig:
    """Read the YAML file, if any; what the command line gives in `overrides`, nested like the file,
    wins over it key by key. An engine of another kind replaces the file's. What `overrides` says of
    pool `default` holds for the only pool of the file, whatever its name.

    Raises:
        ConfigError: unreadable, not YAML, or an unknown, missing or contradictory key, named; or
            the file or the variable of API keys cannot be used; or `overrides` speak of a pool and
            the file has several.
    """
    raw = read_settings(path) if path is not None else {}
    pools = raw.get("pools")
    if "pools" in overrides and isinstance(pools, dict) and len(pools) > 1:
        raise ConfigError(
            f"{path} has {len(pools)} pools, and flags of the engine or its gate speak of one; "
            "change the file instead"
        )
    if "pools" in overrides and isinstance(pools, dict) and len(pools) == 1:
        overrides = overrides | {"pools": {next(iter(pools)): overrides["pools"][POOL]}}
    try:
        config = ServeConfig.model_validate(merged(raw, overrides))
    except ConfigError as error:
        raise ConfigError(f"{path if path is not None else 'settings'}: {error}") from None
    read_keys(config.keys)  # a file that cannot be used is told now, and not by a replica
    return config

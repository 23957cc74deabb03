"""Every setting of the service in one strict model, read from YAML, flags or `serve deploy` args.

    model_name: deepseek-v3-int4
    http: {port: 8000}
    keys: {file: keys.yaml}
    pools:
      default:
        engine: {kind: embedded, directory: runs/engine}

The models are frozen, and an unknown key is an error that names it. API keys are `SecretStr`, so
that no repr, log or traceback shows them. What each section holds is in sections.py, how to start
what is configured in app.py. docs/serve-config.schema.json is made of these models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import read_yaml_mapping
from serve_app.routing.tenants import read_tenants
from serve_app.sections import (
    AdmissionSection,
    EchoOptions,
    EmbeddedOptions,
    HttpSection,
    IngressSection,
    KeysSection,
    Live,
    PoolSection,
    ReplicaLimits,
    RequestsSection,
    ResumeSection,
    TelemetrySection,
    _Strict,
)

__all__ = [
    "EchoOptions",
    "EmbeddedOptions",
    "PoolSection",
    "ReplicaLimits",
    "ServeConfig",
    "load_config",
]

#: Keys of the flat files of earlier versions -> where they are now.
_MOVED = {
    "engine": "pools.default.engine.directory",
    "echo": "pools.default.engine, with kind: echo",
    "host": "http.host",
    "port": "http.port",
    "ingress_replicas": "ingress.replicas",
    "ingress_cpus": "ingress.cpus",
    "engine_replicas": "pools.default.replicas",
    "engine_cpus": "pools.default.cpus",
    "engine_surge_percent": "pools.default.surge_percent",
    "max_ongoing_requests": "pools.default.max_ongoing_requests",
    "replica_limits": "pools.default.replica_limits",
    "health_check_period_s": "pools.default.health_check_period_s",
    "health_check_timeout_s": "pools.default.health_check_timeout_s",
    "max_step_s": "pools.default.max_step_s",
    "graceful_shutdown_s": "shutdown_s",
    "max_queued_requests": "admission.max_queued_requests",
    "max_body_bytes": "http.max_body_bytes",
    "body_timeout_s": "http.body_timeout_s",
    "max_open_bodies": "http.max_open_bodies",
    "max_open_body_bytes": "http.max_open_body_bytes",
    "details_access": "http.details_access",
    "allowed_origins": "http.allowed_origins",
    "default_max_tokens": "requests.default_max_tokens",
    "max_prompt_logprobs": "requests.max_prompt_logprobs",
    "request_timeout_s": "requests.timeout_s",
    "api_keys": "keys.inline",
    "api_keys_file": "keys.file",
    "otlp_headers_file": "telemetry.otlp_headers_file",
    "allow_ungated": "pools.default.gate.allow_ungated",
    "require_signature": "pools.default.gate.require_signature",
} | {
    name: f"pools.default.engine.{name}"
    for name in EmbeddedOptions.model_fields
    if name not in ("kind", "directory")
}

#: The pool that the command line's flags speak of.
POOL = "default"


class ServeConfig(_Strict):
    """What is served and how."""

    model_name: str | None = Field(default=None, min_length=1, description="as clients call it")
    http: HttpSection = HttpSection()
    ingress: IngressSection = IngressSection()
    keys: KeysSection = KeysSection()
    requests: RequestsSection = RequestsSection()
    admission: AdmissionSection = AdmissionSection()
    resume: ResumeSection = ResumeSection()
    #: Engines, by the pool's name.
    pools: dict[str, PoolSection] = Field(min_length=1, max_length=1)
    telemetry: TelemetrySection = TelemetrySection()
    #: Seconds for which `python -m serve_app` lets open streams finish when it is told to stop.
    shutdown_s: float = Field(default=30.0, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _name_moved_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name in given:
                if name in _MOVED:
                    raise ValueError(f"{name!r} is now {_MOVED[name]}")
        return given

    @property
    def pool(self) -> PoolSection:
        """The only pool."""
        (pool,) = self.pools.values()
        return pool

    @property
    def live(self) -> Live:
        """The sections that change without new replicas."""
        return Live(requests=self.requests, admission=self.admission, resume=self.resume)

    @property
    def without_live(self) -> ServeConfig:
        """The same with the live sections at their defaults: what a replica is constructed with,
        so that a change of theirs is no change of it."""
        return self.model_copy(update=dict(Live()))

    @property
    def drain_s(self) -> float:
        """Seconds for which an engine replica that is to stop may finish its streams."""
        return self.pool.drain_s if self.pool.drain_s is not None else self.requests.timeout_s

    @property
    def served_name(self) -> str:
        """The model's name in the API: as configured, else the engine directory's, else `echo`."""
        if self.model_name is not None:
            return self.model_name
        directory = self.pool.directory
        return directory.resolve().name if directory is not None else "echo"


def load_config(path: Path | None, overrides: dict[str, Any]) -> ServeConfig:
    """Read the YAML file, if any; what the command line gives in `overrides`, nested like the file,
    wins over it key by key. An engine of another kind replaces the file's.

    Raises:
        ConfigError: unreadable, not YAML, or an unknown, missing or contradictory key, named; or
            the file of API keys cannot be used.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = read_yaml_mapping(path)
        except UnusableFileError as error:
            raise ConfigError(f"{path} {error}") from error
    where = str(path) if path is not None else "settings"
    try:
        config = ServeConfig.model_validate(_merged(raw, overrides))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = _place(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key {place!r}; remove or correct it") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing" and place == "pools":
            message = "name an engine: --engine DIR, --echo, or pools.default.engine in a file"
        raise ConfigError(f"{where}: {place + ': ' if place else ''}{message}") from None
    read_tenants(config.keys)  # a file that cannot be used is told now, and not by a replica
    return config


def _place(loc: tuple[int | str, ...]) -> str:
    """The dotted path in the file; pydantic puts the engine's kind into the one that it gives."""
    if len(loc) > 3 and (loc[0], loc[2]) == ("pools", "engine"):
        loc = (*loc[:3], *loc[4:])
    return ".".join(map(str, loc))


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping; mappings of different `kind` are not mixed."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            same = old.get("kind", value.get("kind")) == value.get("kind", old.get("kind"))
            merged[name] = _merged(old, value) if same else value
        else:
            merged[name] = value
    return merged

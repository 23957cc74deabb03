"""Every setting of the service in one strict model, read from YAML, flags or `serve deploy` args.

The models are frozen, and an unknown key is an error that names it. API keys are `SecretStr`, so
that no repr, log or traceback shows them. How to start what is configured is in app.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, SecretStr, ValidationError, model_validator

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import StrictModel, read_yaml_mapping
from serve_app.key_file import is_sendable, read_key_file

#: As browsers send it: an extension's scheme, too; no path and no slash at the end.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class _Strict(StrictModel):
    model_config = ConfigDict(protected_namespaces=())


class EchoOptions(_Strict):
    """The echo engine: says the prompt back, one token (a byte) at a time."""

    ttft_s: float = Field(default=0.0, ge=0.0, description="seconds to the first token")
    itl_s: float = Field(default=0.0, ge=0.0, description="seconds between tokens")
    max_running: int = Field(default=256, ge=1)
    max_model_len: int = Field(default=4096, ge=2)


class ReplicaLimits(_Strict):
    """Limits of one engine replica; Serve can change them while it serves (`user_config`)."""

    #: Requests waiting inside the engine beyond which it refuses; None leaves it to Serve's queue.
    max_waiting_requests: int | None = Field(default=None, ge=0)
    #: Messages per second that all streams of a replica share; None sends each token at once.
    max_flushes_per_s: float | None = Field(default=500.0, gt=0.0)


class ServeConfig(_Strict):
    """What is served and how. Exactly one of `engine` and `echo` is given."""

    engine: Path | None = Field(default=None, description="directory that `build` made")
    echo: EchoOptions | None = None
    model_name: str | None = Field(default=None, min_length=1, description="as clients call it")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)

    ingress_replicas: int = Field(default=1, ge=1)
    engine_replicas: int = Field(default=1, ge=1)
    ingress_cpus: float = Field(default=0.1, ge=0.0)
    engine_cpus: float = Field(default=0.5, ge=0.0)

    #: Requests that one engine replica holds at a time; the engine batches among them.
    max_ongoing_requests: int = Field(default=64, ge=1)
    #: Requests that wait at each ingress for a place in a replica; further ones get a 429.
    max_queued_requests: int = Field(default=128, ge=0)
    #: 163,840 token ids are about 1.1 MB of JSON; the rest is room for \\uXXXX escapes.
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0.0, description="for the body to arrive whole")
    #: Bodies that arrive at one time at each ingress, and what has arrived of them in bytes. When a
    #: further one comes, that of the slowest sender is given up.
    max_open_bodies: int = Field(default=512, ge=1)
    max_open_body_bytes: int = Field(default=64 * 2**20, ge=1)
    default_max_tokens: int = Field(default=512, ge=1)
    #: Logprobs of prompt tokens in one answer, alternatives included: 163,840 tokens with two
    #: alternatives each, 15 MB of JSON and more.
    max_prompt_logprobs: int = Field(default=2**19, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0.0, description="for the whole answer")
    replica_limits: ReplicaLimits = ReplicaLimits()
    graceful_shutdown_s: float = Field(default=30.0, gt=0.0, description="streams may finish")
    #: Engine replicas, in percent, that an update may start before it stops old ones. 0 needs no
    #: spare memory or GPU; requests then wait, or get a 503, while the last replica is replaced.
    engine_surge_percent: int = Field(default=0, ge=0, le=100)
    #: Serve looks at each replica once in a period; one that has ended is replaced then, one that
    #: fails or does not answer in time at the third time.
    health_check_period_s: float = Field(default=2.0, gt=0.0)
    health_check_timeout_s: float = Field(default=10.0, gt=0.0)
    #: An engine that has work and finishes no step for this long is replaced. A step is at most one
    #: batch of `max_batched_tokens`; keep this well above the slowest.
    max_step_s: float = Field(default=60.0, gt=0.0)

    #: The embedded engine's own settings; None keeps what it was built with, or its default.
    max_model_len: int | None = Field(default=None, ge=2)
    kv_tokens: int | None = Field(default=None, ge=1)
    #: Another KV format than the one that the gate judged is refused, or served as ungated.
    kv_cache: Literal["bf16", "fp8", "int8"] | None = None
    max_batch_size: int | None = Field(default=None, ge=1)
    max_batched_tokens: int | None = Field(default=None, ge=1)
    num_threads: int | None = Field(default=None, ge=1)

    allow_ungated: bool = False
    #: PEM file of the Ed25519 public key that the verdict must be signed with. Every replica reads
    #: it, so that it lies at this path on each node.
    require_signature: Path | None = None
    #: Keys of clients; none lets everybody in. They stand in Serve's own configuration, which its
    #: dashboard shows: on a cluster, name a file that holds them on each node (key_file.py).
    api_keys: tuple[SecretStr, ...] = ()
    api_keys_file: Path | None = None
    #: Headers that the exporter of traces sends, such as its key: `name=value` lines in a file that
    #: lies at this path on each node, of mode 600 (telemetry/travel.py).
    otlp_headers_file: Path | None = None
    #: Who is told what /health says beyond up or down, /version and /metrics, where there are keys:
    #: "key" who has one, "loopback" also a client on this machine, "open" everybody. Without keys
    #: everybody is.
    details_access: Literal["open", "loopback", "key"] = "loopback"
    #: Origins (`https://chat.example.com`) whose web pages may use this service; `*` is all.
    allowed_origins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        if (self.engine is None) == (self.echo is None):
            raise ValueError("give either an engine directory or echo, not both and not neither")
        if self.require_signature is not None and self.allow_ungated:
            raise ValueError(
                "allow_ungated and require_signature contradict each other; remove one of them"
            )
        if self.require_signature is not None and self.engine is None:
            raise ValueError("echo has no verdict that could be signed; remove require_signature")
        if any(not key.get_secret_value() for key in self.api_keys):
            raise ValueError("api_keys holds an empty key; remove it")
        if any(not is_sendable(key.get_secret_value()) for key in self.api_keys):
            raise ValueError(
                "api_keys holds a key that no header carries; keys are visible ASCII without spaces"
            )
        if self.max_open_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_open_body_bytes {self.max_open_body_bytes} has no room for one body of "
                f"max_body_bytes {self.max_body_bytes}; raise it"
            )
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allowed_origins holds {origin!r}; write an origin as browsers send it, in "
                    "lower case and without a path: https://chat.example.com"
                )
        return self

    def all_keys(self) -> tuple[SecretStr, ...]:
        """The keys of `api_keys` and of the file. Reads it: called where keys are checked.

        Raises:
            ConfigError: the file cannot be used; says why.
        """
        if self.api_keys_file is None:
            return self.api_keys
        return self.api_keys + read_key_file(self.api_keys_file)

    @property
    def served_name(self) -> str:
        """The model's name in the API: as configured, else the engine directory's, else `echo`."""
        if self.model_name is not None:
            return self.model_name
        return self.engine.resolve().name if self.engine is not None else "echo"


def load_config(path: Path | None, overrides: dict[str, Any]) -> ServeConfig:
    """Read the YAML file, if any; the command line's values in `overrides` win over it.

    Raises:
        ConfigError: unreadable, not YAML, or an unknown, missing or contradictory key, named; or
            the file of API keys cannot be used.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = read_yaml_mapping(path)
        except UnusableFileError as error:
            raise ConfigError(f"{path} {error}") from error
    try:
        config = ServeConfig.model_validate(raw | overrides)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        where = str(path) if path is not None else "settings"
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key {place!r}; remove or correct it") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {place + ': ' if place else ''}{message}") from None
    config.all_keys()  # a file that cannot be used is told now, and not by a replica
    return config

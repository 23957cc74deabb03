"""The sections of the configuration: one strict, frozen model each, and what a key may do.

config.py joins them to a `ServeConfig` and reads the file. Every field has a `description`, because
docs/configuration.md and the JSON schema are made of these models (schema.py). A `LiveSection` can
change while the service runs (live.py); a change of any other needs new replicas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    field_validator,
    model_validator,
)

from serve_app.key_file import is_sendable
from serve_app.setting_types import (
    Count,
    CountOrZero,
    Cpus,
    DirectoryPath,
    FilePath,
    Host,
    LiveSection,
    Seconds,
    SecondsOrZero,
    Section,
    Tokens,
)

#: As browsers send it: an extension's scheme, too; no path and no slash at the end.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class EchoOptions(Section):
    """The echo engine: says the prompt back, one token (a byte) at a time. It has no model."""

    # The default is for code that makes one; a file must say it.
    model_config = ConfigDict(json_schema_extra={"required": ["kind"]})

    kind: Literal["echo"] = Field(default="echo", description="selects this engine")
    ttft_s: SecondsOrZero = Field(default=0.0, description="seconds to the first token")
    itl_s: SecondsOrZero = Field(default=0.0, description="seconds between tokens")
    max_running: Count = Field(default=256, description="sequences that run at a time")
    max_model_len: int = Field(
        default=4096, ge=2, description="tokens of the longest request, completion included"
    )
    kv_tokens: Tokens | None = Field(
        default=None,
        description="KV tokens that it says to have; null: `max_running` of the longest requests",
    )


class EmbeddedOptions(Section):
    """The embedded engine, which runs on CPUs. A setting that is null keeps what the engine was
    built with, or its default."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind", "directory"]})

    kind: Literal["embedded"] = Field(default="embedded", description="selects this engine")
    directory: DirectoryPath = Field(
        description="engine directory that `build` made, at the same path on each node"
    )
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="tokens of the longest request, completion included"
    )
    kv_tokens: Tokens | None = Field(default=None, description="size of the KV cache, in tokens")
    kv_cache: Literal["bf16", "fp8", "int8"] | None = Field(
        default=None,
        description="format of KV pages; another one than the gate judged counts as ungated",
    )
    prefix_cache: bool = Field(
        default=True,
        description="keep the KV pages of finished requests until their room is needed, for "
        "requests of the same key that begin with the same tokens",
    )
    max_batch_size: Count | None = Field(default=None, description="sequences of one step")
    max_batched_tokens: Count | None = Field(default=None, description="tokens of one step")
    num_threads: Count | None = Field(default=None, description="CPU threads of one replica")


def _kind(given: Any) -> Any:
    return given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)


EngineSection = Annotated[
    Annotated[EmbeddedOptions, Tag("embedded")] | Annotated[EchoOptions, Tag("echo")],
    Discriminator(
        _kind,
        custom_error_type="engine_kind",
        custom_error_message=(
            "kind must be embedded or echo; write {kind: embedded, directory: DIR} or {kind: echo}"
        ),
    ),
]


class GateSection(Section):
    """What an artifact must show before it is served."""

    allow_ungated: bool = Field(
        default=False,
        description="serve an artifact that passed no accuracy gate; every answer's health, logs "
        "and metrics say so",
    )
    require_signature: FilePath | None = Field(
        default=None,
        description="PEM file of the Ed25519 public key that the verdict must be signed with, at "
        "this path on each node",
    )

    @model_validator(mode="after")
    def _check(self) -> GateSection:
        if self.require_signature is not None and self.allow_ungated:
            raise ValueError(
                "allow_ungated and require_signature contradict each other; remove one of them"
            )
        return self


class ReplicaLimits(LiveSection):
    """Limits inside one engine replica."""

    max_waiting_requests: CountOrZero | None = Field(
        default=None,
        description="requests waiting inside the engine beyond which it refuses; null leaves it "
        "to admission",
    )
    max_flushes_per_s: Annotated[float, Field(gt=0.0)] | None = Field(
        default=250.0,
        description="messages per second that all streams of a replica share; null sends each "
        "token at once",
    )


class PoolSection(Section):
    """Engine replicas of one kind."""

    engine: EngineSection = Field(description="which engine, and its options")
    gate: GateSection = Field(
        default=GateSection(), description="what the artifact must show before it is served"
    )
    replicas: Count = Field(default=1, description="engine replicas")
    cpus: Cpus = Field(default=0.5, description="CPUs that Ray reserves for each replica")
    max_ongoing_requests: Count = Field(
        default=64,
        description="sequences that one replica holds at a time; the engine batches among them",
    )
    replica_limits: ReplicaLimits = Field(
        default=ReplicaLimits(), description="limits inside one replica"
    )
    surge_percent: int = Field(
        default=0,
        ge=0,
        le=100,
        description="engine replicas, in percent, that an update may start before it stops old "
        "ones; 0 needs no spare memory, but requests wait while the last replica is replaced",
    )
    drain_s: Seconds | None = Field(
        default=None,
        description="seconds for which a replica that is to stop may finish its streams; null: "
        "`requests.timeout_s`, the longest that a request may take",
    )
    health_check_period_s: Seconds = Field(
        default=2.0,
        description="seconds between two looks at a replica; one that has ended is replaced then",
    )
    health_check_timeout_s: Seconds = Field(
        default=10.0,
        description="seconds to answer such a look; at the third failure the replica is replaced",
    )
    max_step_s: Seconds = Field(
        default=60.0,
        description="an engine that has work and finishes no step for this long is replaced; keep "
        "it well above the slowest batch of `max_batched_tokens`",
    )

    @model_validator(mode="after")
    def _check(self) -> PoolSection:
        if self.engine.kind == "echo" and self.gate.require_signature is not None:
            raise ValueError("echo has no verdict that could be signed; remove require_signature")
        return self

    @property
    def directory(self) -> Path | None:
        """The engine directory, None for an engine without an artifact."""
        return self.engine.directory if isinstance(self.engine, EmbeddedOptions) else None

    @property
    def kv_cache(self) -> str | None:
        """The configured KV format, None: as built."""
        return self.engine.kv_cache if isinstance(self.engine, EmbeddedOptions) else None


class HttpSection(Section):
    """The endpoint: where it listens, who accepts connections, and what is refused at the door.

    Under `serve deploy`, Serve's own `http_options` say host and port, and the environment of Ray
    says what the proxy is: `host`, `port`, `proxy` and `metrics_port` have no effect there.
    """

    host: Host = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    proxy: Literal["haproxy", "python"] = Field(
        default="haproxy",
        description="what accepts the clients' connections: HAProxy, or Serve's proxy in Python",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="HAProxy's own metrics, for Prometheus on this machine; null: a free port",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20,
        ge=1,
        description="longest request body, else 413; 163,840 token ids are about 1.1 MB",
    )
    body_timeout_s: Seconds = Field(
        default=30.0, description="seconds for the body to arrive whole, else 408"
    )
    max_open_bodies: Count = Field(
        default=512,
        description="bodies that arrive at a time at each ingress; beyond, that of the slowest "
        "sender is given up",
    )
    max_open_body_bytes: int = Field(
        default=64 * 2**20,
        ge=1,
        description="bytes that have arrived of them at each ingress; beyond, likewise",
    )
    max_unread_bytes: int = Field(
        default=64 * 2**20,
        ge=1 << 16,
        description="bytes of answers that clients have not read yet, at each ingress; beyond, the "
        "stream with the most unread bytes is ended",
    )
    client_timeout_s: Seconds = Field(
        default=60.0,
        description="seconds after which a client that reads nothing of an answer is cut off",
    )
    details_access: Literal["open", "loopback", "key"] = Field(
        default="loopback",
        description="who is told what /health says beyond up or down, /version and /metrics: `key` "
        "who has a key, `loopback` also a client on this machine, `open` everybody; without keys "
        "everybody is",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="origins (`https://chat.example.com`) whose web pages may use this service; "
        "`*` is all",
    )

    @model_validator(mode="after")
    def _check(self) -> HttpSection:
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


class IngressSection(Section):
    """The replicas that speak HTTP."""

    replicas: Count = Field(default=2, description="ingress replicas")
    cpus: Cpus = Field(default=0.1, description="CPUs that Ray reserves for each replica")


class KeyLimits(Section):
    """What one key may use, over all ingress replicas together; null is no limit."""

    max_concurrency: Count | None = Field(
        default=None, description="sequences that run or wait at a time"
    )
    requests_per_minute: Count | None = Field(default=None, description="requests per minute")
    tokens_per_minute: Tokens | None = Field(
        default=None,
        description="tokens of prompt and completion per minute; a request is charged what it "
        "reserves, and given back what it leaves",
    )


class KeysSection(Section):
    """Who may ask. Without any key everybody may."""

    inline: tuple[SecretStr, ...] = Field(
        default=(),
        description="keys in the configuration itself, which Serve's dashboard shows: on a cluster "
        "use a file",
    )
    file: FilePath | None = Field(
        default=None,
        description="file of keys (docs/operations.md) at this path on each node with an ingress; "
        "read again when it changes",
    )
    variable: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable of the ingress that holds what a key file would",
    )

    @field_validator("inline")
    @classmethod
    def _check_inline(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value() for key in keys):
            raise ValueError("holds an empty key; remove it")
        if any(not is_sendable(key.get_secret_value()) for key in keys):
            raise ValueError("holds a key that no header carries; keys are visible ASCII")
        return keys

    @property
    def configured(self) -> bool:
        return bool(self.inline) or self.file is not None or self.variable is not None


class RequestsSection(LiveSection):
    """What one request may take."""

    default_max_tokens: Tokens = Field(
        default=512, description="completion limit of a request that names none"
    )
    max_prompt_logprobs: Count = Field(
        default=2**19,
        description="logprobs of prompt tokens in one answer, alternatives included; 163,840 "
        "tokens with two alternatives each are 15 MB of JSON",
    )
    timeout_s: Seconds = Field(
        default=600.0,
        description="seconds for the whole answer, from the request's arrival; a client may ask "
        "for less",
    )


class AdmissionSection(LiveSection):
    """How requests wait for a place in an engine, over all ingress replicas together."""

    max_queued_requests: CountOrZero = Field(
        default=128,
        description="sequences that wait for a place; beyond, the key that has the most waiting "
        "gives way with a 429",
    )
    max_queued_tokens: Tokens | None = Field(
        default=None, description="KV tokens that those may need together; null is no limit"
    )
    max_wait_s: Seconds = Field(
        default=30.0,
        description="seconds after which a request that still waits is refused with a 429: its "
        "first token would come too late to be of use",
    )
    reserved_output: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="part of `max_tokens` for which KV is set aside; below 1 more requests run at "
        "a time, and an engine whose cache runs full takes the youngest back into its queue",
    )
    key_limits: KeyLimits = Field(
        default=KeyLimits(), description="limits of a key that has none of its own"
    )


class ResumeSection(LiveSection):
    """Requests that outlive the replica that worked on them."""

    enabled: bool = Field(
        default=True, description="continue a stream on another replica when its own is lost"
    )
    max_attempts: Count = Field(default=3, description="replicas that one sequence may lose")
    wait_s: Seconds = Field(
        default=120.0,
        description="seconds to wait for a place in another replica, within the request's own "
        "deadline",
    )


class TelemetrySection(Section):
    """What operators see beside the metrics."""

    otlp_headers_file: FilePath | None = Field(
        default=None,
        description="headers that the exporter of traces sends, such as its key: `name=value` "
        "lines in a file of mode 600 at this path on each node",
    )
    access_log: FilePath | Literal["stderr"] | None = Field(
        default=None,
        description="file on each ingress's node for JSON lines, one per request; `stderr` is the "
        "ingress's own log, null writes none",
    )


class Live(LiveSection):
    """What changes while the service runs: Serve passes it to every ingress (`user_config`)."""

    requests: RequestsSection = Field(
        default=RequestsSection(), description="what one request may take"
    )
    admission: AdmissionSection = Field(
        default=AdmissionSection(), description="how requests wait for a place in an engine"
    )
    resume: ResumeSection = Field(
        default=ResumeSection(), description="requests that outlive their replica"
    )

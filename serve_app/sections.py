"""The sections of the configuration: one strict, frozen model each, and what a key may do.

config.py joins them to a `ServeConfig` and reads the file. A section says whether a running service
takes a change of it (`Live`): the others need new replicas.
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

from deepseek.yaml_files import StrictModel
from serve_app.key_file import is_sendable

#: As browsers send it: an extension's scheme, too; no path and no slash at the end.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class _Strict(StrictModel):
    model_config = ConfigDict(protected_namespaces=())


class EchoOptions(_Strict):
    """The echo engine: says the prompt back, one token (a byte) at a time."""

    kind: Literal["echo"] = "echo"
    ttft_s: float = Field(default=0.0, ge=0.0, description="seconds to the first token")
    itl_s: float = Field(default=0.0, ge=0.0, description="seconds between tokens")
    max_running: int = Field(default=256, ge=1)
    max_model_len: int = Field(default=4096, ge=2)
    #: KV tokens that it says to have; None: room for `max_running` of the longest requests.
    kv_tokens: int | None = Field(default=None, ge=1)


class EmbeddedOptions(_Strict):
    """The embedded engine; a setting that is None keeps what it was built with, or its default."""

    kind: Literal["embedded"] = "embedded"
    directory: Path = Field(description="directory that `build` made")
    max_model_len: int | None = Field(default=None, ge=2)
    kv_tokens: int | None = Field(default=None, ge=1)
    #: Another KV format than the one that the gate judged is refused, or served as ungated.
    kv_cache: Literal["bf16", "fp8", "int8"] | None = None
    max_batch_size: int | None = Field(default=None, ge=1)
    max_batched_tokens: int | None = Field(default=None, ge=1)
    num_threads: int | None = Field(default=None, ge=1)


def _kind(given: Any) -> Any:
    return given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)


EngineSection = Annotated[
    Annotated[EmbeddedOptions, Tag("embedded")] | Annotated[EchoOptions, Tag("echo")],
    Discriminator(
        _kind,
        custom_error_type="engine_kind",
        custom_error_message="kind must be embedded or echo",
    ),
]


class GateSection(_Strict):
    """What an artifact must show before it is served."""

    allow_ungated: bool = False
    #: PEM file of the Ed25519 public key that the verdict must be signed with. Every replica reads
    #: it, so that it lies at this path on each node.
    require_signature: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> GateSection:
        if self.require_signature is not None and self.allow_ungated:
            raise ValueError(
                "allow_ungated and require_signature contradict each other; remove one of them"
            )
        return self


class ReplicaLimits(_Strict):
    """Limits of one engine replica; Serve changes them while it serves (`user_config`)."""

    #: Requests waiting inside the engine beyond which it refuses; None leaves it to admission.
    max_waiting_requests: int | None = Field(default=None, ge=0)
    #: Messages per second that all streams of a replica share; None sends each token at once.
    max_flushes_per_s: float | None = Field(default=500.0, gt=0.0)


class PoolSection(_Strict):
    """Engine replicas of one kind."""

    engine: EngineSection
    gate: GateSection = GateSection()
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.5, ge=0.0, description="that Ray reserves for each replica")
    #: Sequences that one replica holds at a time; the engine batches among them.
    max_ongoing_requests: int = Field(default=64, ge=1)
    replica_limits: ReplicaLimits = ReplicaLimits()
    #: Engine replicas, in percent, that an update may start before it stops old ones. 0 needs no
    #: spare memory or GPU; requests then wait while the last replica is replaced.
    surge_percent: int = Field(default=0, ge=0, le=100)
    #: Seconds for which a replica that is to stop may finish its streams; None: the longest that a
    #: request may take.
    drain_s: float | None = Field(default=None, gt=0.0)
    #: Serve looks at each replica once in a period; one that has ended is replaced then, one that
    #: fails or does not answer in time at the third time.
    health_check_period_s: float = Field(default=2.0, gt=0.0)
    health_check_timeout_s: float = Field(default=10.0, gt=0.0)
    #: An engine that has work and finishes no step for this long is replaced. A step is at most one
    #: batch of `max_batched_tokens`; keep this well above the slowest.
    max_step_s: float = Field(default=60.0, gt=0.0)

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


class HttpSection(_Strict):
    """The endpoint: where it listens, who accepts connections, and what is refused at the door."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    #: What accepts the clients' connections: HAProxy, or Serve's own proxy in Python.
    proxy: Literal["haproxy", "python"] = "haproxy"
    #: 163,840 token ids are about 1.1 MB of JSON; the rest is room for \\uXXXX escapes.
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0.0, description="for the body to arrive whole")
    #: Bodies that arrive at one time at each ingress, and what has arrived of them in bytes. When a
    #: further one comes, that of the slowest sender is given up.
    max_open_bodies: int = Field(default=512, ge=1)
    max_open_body_bytes: int = Field(default=64 * 2**20, ge=1)
    #: Answers that clients have not read yet, in bytes at each ingress. Beyond, the stream with the
    #: most unread bytes is ended.
    max_unread_bytes: int = Field(default=64 * 2**20, ge=1 << 16)
    #: Seconds after which a client that reads nothing of an answer which waits for it is cut off.
    client_timeout_s: float = Field(default=60.0, gt=0.0)
    #: Who is told what /health says beyond up or down, /version and /metrics, where there are keys:
    #: "key" who has one, "loopback" also a client on this machine, "open" everybody. Without keys
    #: everybody is.
    details_access: Literal["open", "loopback", "key"] = "loopback"
    #: Origins (`https://chat.example.com`) whose web pages may use this service; `*` is all.
    allowed_origins: tuple[str, ...] = ()

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


class IngressSection(_Strict):
    """The replicas that speak HTTP."""

    replicas: int = Field(default=2, ge=1)
    cpus: float = Field(default=0.1, ge=0.0, description="that Ray reserves for each replica")


class KeyLimits(_Strict):
    """What one key may use; None is no limit. They hold over all ingress replicas together."""

    max_concurrency: int | None = Field(
        default=None, ge=1, description="sequences that run or wait at a time"
    )
    requests_per_minute: int | None = Field(default=None, ge=1)
    #: Prompt and completion; a request is charged what it reserves, and given back what it leaves.
    tokens_per_minute: int | None = Field(default=None, ge=1)


class KeysSection(_Strict):
    """Who may ask. Without any key everybody may."""

    #: Keys in the configuration itself, which Serve's dashboard shows: on a cluster use a file.
    inline: tuple[SecretStr, ...] = ()
    #: A file that lies at this path on each node with an ingress (key_file.py); read again when it
    #: changes.
    file: Path | None = None
    #: An environment variable of the ingress that holds what a key file would.
    variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

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


class RequestsSection(_Strict):
    """What one request may take. Live."""

    default_max_tokens: int = Field(default=512, ge=1)
    #: Logprobs of prompt tokens in one answer, alternatives included: 163,840 tokens with two
    #: alternatives each, 15 MB of JSON and more.
    max_prompt_logprobs: int = Field(default=2**19, ge=1)
    #: For the whole answer, from the request's arrival; a client may ask for less.
    timeout_s: float = Field(default=600.0, gt=0.0)


class AdmissionSection(_Strict):
    """How requests wait for a place in an engine, over all ingress replicas together. Live."""

    #: Sequences that wait for a place; when there is no room, the key that has the most waiting
    #: gives way.
    max_queued_requests: int = Field(default=128, ge=0)
    #: KV tokens that those may need together; None is no limit.
    max_queued_tokens: int | None = Field(default=None, ge=1)
    #: A request that has waited so long is refused with a 429: later, its first token would come
    #: too late to be of use.
    max_wait_s: float = Field(default=30.0, gt=0.0)
    #: The part of `max_tokens` for which KV is set aside. Below 1 more requests run at a time, and
    #: an engine whose cache runs full takes the youngest back into its queue.
    reserved_output: float = Field(default=1.0, gt=0.0, le=1.0)
    #: Limits of a key that has none of its own.
    key_limits: KeyLimits = KeyLimits()


class ResumeSection(_Strict):
    """Requests that outlive the replica that worked on them. Live."""

    enabled: bool = True
    #: Replicas that one sequence may lose.
    max_attempts: int = Field(default=3, ge=1)
    #: Seconds to wait for a place in another replica, within the request's own deadline.
    wait_s: float = Field(default=120.0, gt=0.0)


class TelemetrySection(_Strict):
    """What operators see beside the metrics."""

    #: Headers that the exporter of traces sends, such as its key: `name=value` lines in a file that
    #: lies at this path on each node, of mode 600 (telemetry/travel.py).
    otlp_headers_file: Path | None = None
    #: JSON lines, one per request, in this file of each ingress's node; `stderr` is the ingress's
    #: own log. None writes none.
    access_log: Path | Literal["stderr"] | None = None


class Live(_Strict):
    """What changes while the service runs: Serve passes it to every ingress (`user_config`)."""

    requests: RequestsSection = RequestsSection()
    admission: AdmissionSection = AdmissionSection()
    resume: ResumeSection = ResumeSection()

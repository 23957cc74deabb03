"""The sections of the configuration: one strict, frozen model each, and what a key may do.

config.py joins them to a `ServeConfig` and reads the file. Every field has a `description`, because
docs/configuration.md and the JSON schema are made of these models (schema.py). A `LiveSection` can
change while the service runs (live.py); a change of any other needs new replicas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)

from serve_app.autoscaling_settings import AutoscalingSection
from serve_app.engine_sections import EchoOptions, EngineSection
from serve_app.key_file import is_sendable
from serve_app.setting_types import (
    Count,
    CountOrZero,
    Cpus,
    FilePath,
    Gpus,
    LabelName,
    LabelValue,
    LiveSection,
    PoolName,
    Seconds,
    Section,
    Tokens,
)


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
        default=100.0,
        description="messages per second that all streams of a replica share; null sends each "
        "token at once",
    )


class PoolSection(Section):
    """Engine replicas of one kind: their engine, how many, and which requests are theirs."""

    engine: EngineSection = Field(description="which engine, and its options")
    gate: GateSection = Field(
        default=GateSection(), description="what the artifact must show before it is served"
    )
    replicas: Count = Field(
        default=1,
        description="engine replicas; with `autoscaling`, those that the pool starts with",
    )
    autoscaling: AutoscalingSection | None = Field(
        default=None, description="how the number of replicas follows the load; null keeps it"
    )
    cpus: Cpus = Field(default=0.5, description="CPUs that Ray reserves for each replica")
    gpus: Gpus | None = Field(
        default=None,
        description="GPUs that Ray reserves for each replica; null: one for each rank of a "
        "`trtllm` or `vllm` engine, none for others. 0 reserves none",
    )
    labels: dict[LabelName, LabelValue] = Field(
        default={},
        description="labels that a node must have to get replicas of this pool, as `ray start "
        "--labels` gave it: `{hardware: H800-80GB}`",
        json_schema_extra={"additionalProperties": False},
    )
    max_ongoing_requests: Count = Field(
        default=64,
        description="sequences that one replica holds at a time; the engine batches among them",
    )
    max_request_tokens: Tokens | None = Field(
        default=None,
        description="tokens of prompt and completion limit of the longest request that belongs "
        "here; a request goes to the pool with the smallest limit that holds it. null: as many as "
        "the engine holds",
    )
    spill_over: tuple[PoolName, ...] = Field(
        default=(),
        description="pools, in order, that get a request of this one while there is no room here",
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
        holds = self.engine.max_model_len
        if holds is not None and (self.max_request_tokens or 0) > holds:
            raise ValueError(
                f"max_request_tokens {self.max_request_tokens} is more than the engine's "
                f"max_model_len {holds}; lower it, or raise that"
            )
        scaled = self.autoscaling
        # What was not written is no mistake: the pool then starts with the nearest number.
        if scaled is not None and "replicas" in self.model_fields_set:
            least, most = scaled.min_replicas, scaled.max_replicas
            if not least <= self.replicas <= most:
                raise ValueError(
                    f"replicas {self.replicas} is not between autoscaling.min_replicas {least} and "
                    f"max_replicas {most}; correct it"
                )
        return self

    @property
    def directory(self) -> Path | None:
        """The engine directory, None for an engine without an artifact."""
        return None if isinstance(self.engine, EchoOptions) else self.engine.directory

    @property
    def kv_cache(self) -> str | None:
        """The configured KV format, None: as built."""
        return None if isinstance(self.engine, EchoOptions) else self.engine.kv_cache

    @property
    def staged(self) -> Path | None:
        """Where the nodes may have copies of the directory, `{node}` in it."""
        return None if isinstance(self.engine, EchoOptions) else self.engine.staged

    @property
    def most_replicas(self) -> int:
        """As many replicas as it may ever have."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


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
    """How requests wait for a place in an engine, over all ingress replicas together; those of
    each pool by themselves."""

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


class RoutingSection(LiveSection):
    """Which replica of its pool a request gets."""

    affinity: bool = Field(
        default=True,
        description="send the requests of one session to the replica that had the last one, whose "
        "KV cache may hold their beginning",
    )
    session_header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = (
        Field(
            default="x-session-id",
            description="header by which a client names a session; null reads none",
        )
    )
    affinity_head_tokens: Tokens = Field(
        default=256,
        description="tokens at the head of a prompt of /v1/completions that are the session where "
        "no header names one, in whole KV pages; a shorter prompt is taken whole",
    )
    affinity_slack: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="how much fuller than the emptiest replica of its pool a session's may be, as "
        "share of its places or KV, before another one gets the request",
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
    routing: RoutingSection = Field(
        default=RoutingSection(), description="which replica of its pool a request gets"
    )
    resume: ResumeSection = Field(
        default=ResumeSection(), description="requests that outlive their replica"
    )

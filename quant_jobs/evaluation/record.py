"""`evaluation.json`: what was measured, of which engine, against which source, on which text.

`evaluate` writes it; `gate` and `report` read it. `tokens.safetensors` (tokens.py) lies beside it
with one value per judged token, and its SHA-256 is recorded here. Losses and KL are in nats, sizes
in bytes, speeds in generated tokens per second. This file imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.artifact.manifest import Count
from deepseek.artifact.verdict import EMBEDDED, Arithmetic
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import read_json_object, write_atomic
from deepseek.inventory import Group
from quant_jobs.evaluation.pairs import read_values

EVALUATION = "evaluation.json"
TOKENS = "tokens.safetensors"
#: 17 bytes per token: 63 million of them.
MAX_TOKENS_BYTES = 1 << 30

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Strict):
    """A value, its standard error over blocks, and its 95 % bootstrap interval over blocks."""

    value: float
    standard_error: float = Field(ge=0.0)
    low: float
    high: float


class Divergence(Strict):
    """KL(source || quantized), nats per token."""

    mean: Estimate
    p50: float
    p90: float
    p99: float
    max: float


class LumpedKL(Strict):
    """Mean KL with all tokens lumped into one that a server which names its `top` most likely
    tokens does not name, or a stored reference does not hold: a lower bound of the full KL
    (lumped.py). It is what `evaluate --url` measures."""

    top: int = Field(ge=1)
    mean: Estimate


class GroupBytes(Strict):
    """Bytes of one group of tensors: in BF16, as the source stores it, and as the artifact stores
    it (scales and zero points included)."""

    group: Group
    parameters: Count
    bf16_bytes: Annotated[Count, Field(ge=1)]
    source_bytes: Count
    artifact_bytes: Count


class DecodeSpeed(Strict):
    """Median decode speed of both engines, measured in turns in one process."""

    batch_size: int = Field(ge=1)
    tokens_per_s: Positive
    source_tokens_per_s: Positive
    runs: Annotated[tuple[float, ...], Field(min_length=1)]
    source_runs: Annotated[tuple[float, ...], Field(min_length=1)]


class HeldOut(Strict):
    """The held-out text: digest of its token ids, and how it was cut into blocks."""

    digest: str
    num_blocks: int = Field(ge=2, le=MAX_TOKENS_BYTES)
    block_tokens: int = Field(ge=2, le=MAX_TOKENS_BYTES)

    @property
    def judged_tokens(self) -> int:
        """Number of predicted tokens: all but the first of each block."""
        return self.num_blocks * (self.block_tokens - 1)


class Evaluation(Strict):
    """The whole of evaluation.json. `artifact_digest` is the source's fingerprint and `recipe`
    "unquantized" for an engine of the source itself. The figures are of an engine for `target`, in
    the target's `arithmetic` on KV pages of the format `kv_cache` as that target lays them out,
    whatever the engine was built with; the engine `executed_by` computed them.
    `stored_reference` is the digest of the stored reference that stood for the source: `kl` is then
    an unbiased estimate, not computed over the full vocabulary. `no_speed` says why `speed` is
    empty. Form 1 has no `lumped_kl`, form 2 no `no_speed`. Sizes include any MTP layer, which the
    artifact carries too; `sizes` counts tensors, `artifact_bytes` files, headers included."""

    format_version: Literal[3] = 3
    engine_digest: str
    artifact_digest: str
    recipe: str
    target: Arithmetic
    arithmetic: Arithmetic
    executed_by: Arithmetic
    kv_cache: CacheFormat
    reference_fingerprint: str
    stored_reference: str | None = None
    data: HeldOut
    perplexity: Positive
    source_perplexity: Positive
    perplexity_ratio: Estimate
    kl: Divergence
    lumped_kl: LumpedKL | None = None
    top1: Estimate
    sizes: Annotated[tuple[GroupBytes, ...], Field(min_length=1)]
    artifact_bytes: Annotated[Count, Field(description="files of the quantized checkpoint")]
    engine_bytes: Annotated[Count, Field(description="tensor file of the engine")]
    speed: tuple[DecodeSpeed, ...]
    no_speed: str | None = None
    tokens_sha256: str
    tools: dict[str, str]

    @property
    def bf16_bytes(self) -> int:
        """Two bytes per parameter of the source, MTP layer included."""
        return sum(size.bf16_bytes for size in self.sizes)

    @property
    def how(self) -> str:
        """In words, what computed the figures."""
        if self.executed_by == self.target:
            return f"kernels of {self.target}"
        return f"arithmetic of {self.arithmetic} emulated by the {self.executed_by} engine"

    def describe(self) -> list[str]:
        """A summary for a person, in lines of text."""
        ratio, kl, top1 = self.perplexity_ratio, self.kl, self.top1
        has_mtp = any(size.group == "mtp" for size in self.sizes)
        lines = [
            f"engine {self.engine_digest[:16]} ({self.recipe}), "
            f"{self.how}, KV {self.kv_cache}, {self.data.judged_tokens} tokens judged",
            f"perplexity {self.perplexity:.4f}, source {self.source_perplexity:.4f}; "
            f"ratio {ratio.value:.5f} [{ratio.low:.5f}, {ratio.high:.5f}]",
            f"KL {kl.mean.value:.5f} nats/token [{kl.mean.low:.5f}, {kl.mean.high:.5f}], "
            f"p50 {kl.p50:.5f}, p99 {kl.p99:.4f}, max {kl.max:.3f}",
            f"top-1 agreement {top1.value:.2%} [{top1.low:.2%}, {top1.high:.2%}]",
            f"size {self.artifact_bytes / 1e6:.2f} MB, {self.artifact_bytes / self.bf16_bytes:.1%} "
            f"of BF16's {self.bf16_bytes / 1e6:.2f} MB"
            + (" (MTP layer included in both)" if has_mtp else ""),
        ]
        lines += [
            f"decode at batch {speed.batch_size}: {speed.tokens_per_s:.0f} tokens/s, "
            f"unquantized {speed.source_tokens_per_s:.0f} "
            f"({speed.tokens_per_s / speed.source_tokens_per_s:.2f}x)"
            for speed in self.speed
        ]
        if self.no_speed is not None:
            lines.append(f"decode speed: {self.no_speed}")
        return lines


def write_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Write DIR/evaluation.json atomically. The tokens must already be written."""
    write_atomic(directory / EVALUATION, (evaluation.model_dump_json(indent=2) + "\n").encode())


def read_evaluation(directory: Path) -> Evaluation:
    """Read DIR/evaluation.json.

    Raises:
        ArtifactError: it is absent or not valid, or the per-token values beside it are not those
            that it names.
    """
    path = directory / EVALUATION
    raw = read_json_object(path, f"run `python -m quant_jobs evaluate` with --output {directory}")
    try:
        evaluation = Evaluation.model_validate(_in_form_3(_in_form_2(raw)))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; evaluate again") from error
    read_token_bytes(directory, evaluation)
    return evaluation


def _in_form_2(raw: dict[str, Any]) -> dict[str, Any]:
    """Form 1 has no `arithmetic`: it was the embedded engine's."""
    if raw.get("format_version") == 1 and "arithmetic" not in raw:
        return raw | {"format_version": 2, "arithmetic": EMBEDDED}
    return raw


def _in_form_3(raw: dict[str, Any]) -> dict[str, Any]:
    """Form 2 has no `target`: only engines for the embedded engine were evaluated."""
    added = {"target": EMBEDDED, "executed_by": EMBEDDED}
    if raw.get("format_version") == 2 and not raw.keys() & {*added, "no_speed"}:
        return raw | added | {"format_version": 3}
    return raw


def read_token_bytes(directory: Path, evaluation: Evaluation) -> bytes:
    """The content of DIR/tokens.safetensors, verified.

    Raises:
        ArtifactError: it is absent, no regular file, or is not the one that the evaluation names.
    """
    return read_values(
        directory / TOKENS,
        sha256=evaluation.tokens_sha256,
        record=EVALUATION,
        max_bytes=MAX_TOKENS_BYTES,
        remedy="evaluate again",
    )

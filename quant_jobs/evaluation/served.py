"""`served.json`: what was measured of a running service, against which reference, on which text.

`evaluate --url` writes it. `served.safetensors` lies beside it with one value per judged token, and
its SHA-256 is recorded here. Losses and KL are in nats, times in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from deepseek.artifact.manifest import Count
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import read_json_object, write_json
from deepseek.outputs import make_directory
from deepseek.tensor_files import save_tensors
from quant_jobs.evaluation.pairs import publishing
from quant_jobs.evaluation.record import Estimate, HeldOut, LumpedKL, Positive, Strict

SERVED, SERVED_TOKENS = "served.json", "served.safetensors"


class Identity(Strict):
    """What the service says that it is. All but `model` come from IntServe's `/health` and the
    model card, and are None where a service does not tell."""

    model: str
    engine: str | None = None
    recipe: str | None = None
    artifact_digest: str | None = None
    engine_digest: str | None = None
    kv_cache: str | None = None
    gated: bool | None = None
    max_model_len: int | None = None


class LoadPoint(Strict):
    """A closed loop: `concurrency` clients, each with the next request when its last has ended.

    Seconds from sending a request to its first streamed token (`ttft`), and between the tokens
    after it (`tpot`), as medians and 99th percentiles over the requests; `tokens_per_s` are
    generated tokens of all clients over the time of the whole loop.
    """

    concurrency: int = Field(ge=1)
    requests: int = Field(ge=1)
    generated_tokens: Count
    retries: Count
    seconds: Positive
    ttft_p50_s: Positive
    ttft_p99_s: Positive
    tpot_p50_s: float | None = Field(ge=0.0)
    tpot_p99_s: float | None = Field(ge=0.0)
    tokens_per_s: Positive


class Served(Strict):
    """The whole of served.json. `top` is the least number of tokens that the service named at a
    position; `tied_top1` counts positions where its two most likely tokens are equal, of which the
    lower id was taken. `on_loopback` says that the service was reached within this machine, so that
    client and server shared its cores."""

    format_version: Literal[1] = 1
    url: str
    service: Identity
    on_loopback: bool
    reference_digest: str
    reference_fingerprint: str
    data: HeldOut
    perplexity: Positive
    source_perplexity: Positive
    perplexity_ratio: Estimate
    lumped_kl: LumpedKL
    top1: Estimate
    tied_top1: Count
    load: tuple[LoadPoint, ...]
    retries: Count
    tokens_sha256: str
    tools: dict[str, str]

    def describe(self) -> list[str]:
        """A summary for a person, in lines of text."""
        service, ratio, kl, top1 = (
            self.service,
            self.perplexity_ratio,
            self.lumped_kl.mean,
            self.top1,
        )
        facts = [service.recipe, service.kv_cache and f"KV {service.kv_cache}"]
        told = ", ".join(fact for fact in facts if fact)
        lines = [
            f"{service.model}{f' ({told})' if told else ''} at {self.url}, "
            f"{self.data.judged_tokens} tokens judged over HTTP",
            f"perplexity {self.perplexity:.4f}, source {self.source_perplexity:.4f}; "
            f"ratio {ratio.value:.5f} [{ratio.low:.5f}, {ratio.high:.5f}]",
            f"KL at least {kl.value:.5f} nats/token [{kl.low:.5f}, {kl.high:.5f}]: all but the "
            f"{self.lumped_kl.top} named tokens count as one",
            f"top-1 agreement {top1.value:.2%} [{top1.low:.2%}, {top1.high:.2%}], "
            f"{self.tied_top1} ties",
        ]
        where = "client and server on one machine" if self.on_loopback else "over the network"
        lines += [
            f"{point.concurrency} at a time: first token {point.ttft_p50_s * 1e3:.0f} ms "
            f"(p99 {point.ttft_p99_s * 1e3:.0f}), "
            + ("" if point.tpot_p50_s is None else f"{point.tpot_p50_s * 1e3:.1f} ms per token, ")
            + f"{point.tokens_per_s:.0f} tokens/s ({where})"
            for point in self.load
        ]
        return lines


def write_served(directory: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Served:
    """Write the values per token (`token_ids` int32 [B, T]; `source_nll`, `served_nll` and
    `lumped_kl` f32, `same_top1` bool [B, T-1]) and served.json, which replace those of an earlier
    run when both are whole. `facts` are the fields of `Served` but the digest.

    Raises:
        OutputError: they cannot be written.
    """
    make_directory(directory)
    with publishing(directory, values=SERVED_TOKENS, record=SERVED) as staging:
        saved = save_tensors(staging / SERVED_TOKENS, tensors)
        served = Served(**facts, tokens_sha256=saved.sha256)
        write_json(staging / SERVED, served.model_dump(mode="json"))
    return served


def read_served(directory: Path) -> Served:
    """Read DIR/served.json.

    Raises:
        ArtifactError: it is absent or not valid.
    """
    path = directory / SERVED
    raw = read_json_object(path, f"run `evaluate` with --url and --output {directory}")
    try:
        return Served.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; evaluate again") from error

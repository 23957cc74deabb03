"""Scores both models on the held-out text, block by block, and summarizes the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek.cli import make_progress
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.metrics import TokenScores, compare_logits, estimate
from quant_jobs.evaluation.record import Divergence, Estimate


class Scorer(Protocol):
    """The part of an engine that scoring uses."""

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits float32 [T, V] of token ids int64 [T]."""
        ...


def score_blocks(source: Scorer, quantized: Scorer, ids_BT: Tensor) -> list[TokenScores]:
    """Score both models on every block of `ids_BT` int64 [B, T], with a progress line.

    Raises:
        ArtifactError: the quantized engine returned a logit that is not finite.
    """
    with make_progress() as progress:
        blocks = progress.track(range(len(ids_BT)), description="evaluate")
        return [_score_block(source, quantized, ids_BT[block], block) for block in blocks]


def _score_block(source: Scorer, quantized: Scorer, ids_T: Tensor, block: int) -> TokenScores:
    """Score one block; its logits are freed on return, before those of the next block."""
    source_TV, quantized_TV = source.score(ids_T), quantized.score(ids_T)
    if not quantized_TV.isfinite().all():
        raise ArtifactError(
            f"the engine gave logits that are not finite in block {block} of the text; quantize "
            "again with another recipe, and do not serve it"
        )
    return compare_logits(source_TV, quantized_TV, ids_T)


def summarize(scores: list[TokenScores]) -> dict[str, Any]:
    """The fields of `Evaluation` that are computed from the scores of the tokens alone."""
    source_BT = torch.stack([score.source_nll for score in scores])
    quantized_BT = torch.stack([score.quantized_nll for score in scores])
    kl_BT = torch.stack([score.kl for score in scores])
    same_BT = torch.stack([score.same_top1 for score in scores])
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    p50, p90, p99 = torch.quantile(kl_BT.flatten(), levels).tolist()
    return {
        "perplexity": math.exp(float(quantized_BT.mean())),
        "source_perplexity": math.exp(float(source_BT.mean())),
        # Paired: the difference per block varies much less than either loss.
        "perplexity_ratio": _estimate(quantized_BT - source_BT, math.exp),
        "kl": Divergence(mean=_estimate(kl_BT), p50=p50, p90=p90, p99=p99, max=float(kl_BT.max())),
        "top1": _estimate(same_BT),
    }


def _estimate(values_BT: Tensor, transform: Callable[[float], float] = float) -> Estimate:
    return Estimate(**asdict(estimate(values_BT, transform)))

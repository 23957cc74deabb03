"""Scores the models on the held-out text, block by block, and summarizes the scores.

The source runs beside the quantized model, or a stored reference stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek.cli import make_progress
from deepseek.engine.request import MAX_LOGPROBS
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.lumped import (
    CompressedBlock,
    ServedBlock,
    as_served,
    compress,
    lumped_kl,
    sampled_kl,
    served_top1,
)
from quant_jobs.evaluation.metrics import TokenScores, compare_logits, estimate
from quant_jobs.evaluation.record import Divergence, Estimate, LumpedKL
from quant_jobs.evaluation.reference import Reference


class Scorer(Protocol):
    """The part of an engine that scoring uses."""

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits float32 [T, V] of token ids int64 [T]."""
        ...


@dataclass(frozen=True, slots=True)
class BlockScores:
    """The scores of one block, the KL that a server of the same logits would show (f64 [T-1]), and
    what a stored reference keeps of the block."""

    tokens: TokenScores
    lumped_kl: Tensor
    reference: CompressedBlock


def score_blocks(source: Scorer, quantized: Scorer, ids_BT: Tensor) -> list[BlockScores]:
    """Score both models on every block of `ids_BT` int64 [B, T], with a progress line.

    Raises:
        ArtifactError: the quantized engine returned a logit that is not finite.
    """
    with make_progress() as progress:
        blocks = progress.track(range(len(ids_BT)), description="evaluate")
        return [_score_block(source, quantized, ids_BT[block], block) for block in blocks]


def _score_block(source: Scorer, quantized: Scorer, ids_T: Tensor, block: int) -> BlockScores:
    """Score one block; its logits are freed on return, before those of the next block."""
    source_TV, quantized_TV = source.score(ids_T), _score_finite(quantized, ids_T, block)
    kept = compress(source_TV, ids_T, seed=block)
    lumped = lumped_kl(kept, as_served(quantized_TV, ids_T, MAX_LOGPROBS), ids_T)
    return BlockScores(compare_logits(source_TV, quantized_TV, ids_T), lumped, kept)


def score_against(reference: Reference, quantized: Scorer) -> list[BlockScores]:
    """`score_blocks` with a stored reference in the source's place."""
    scores = []
    with make_progress() as progress:
        for block in progress.track(range(len(reference.ids)), description="evaluate"):
            ids_T, kept = reference.ids[block], reference.blocks[block]
            logits_TV = _score_finite(quantized, ids_T, block)
            log_q = logits_TV[:-1].double().log_softmax(-1)
            tokens = TokenScores(
                source_nll=-kept.next_logprob.double(),
                quantized_nll=-log_q.gather(1, ids_T[1:, None])[:, 0],
                kl=sampled_kl(kept, logits_TV),
                same_top1=log_q.argmax(-1) == kept.top_ids[:, 0],
            )
            lumped = lumped_kl(kept, as_served(logits_TV, ids_T, MAX_LOGPROBS), ids_T)
            scores.append(BlockScores(tokens, lumped, kept))
            del logits_TV, log_q
    return scores


@dataclass(frozen=True, slots=True)
class ServedScores:
    """Scores of a service's answers, [B, T-1] each: losses and lumped KL f64 in nats, whether the
    most likely tokens agree, whether another served token is as likely; `top` is the least number
    of tokens that were named at a position."""

    source_nll: Tensor
    served_nll: Tensor
    lumped_kl: Tensor
    same_top1: Tensor
    is_tied: Tensor
    top: int

    def tensors(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What served.safetensors holds."""
        return {
            "token_ids": ids_BT.int(),
            "source_nll": self.source_nll.float(),
            "served_nll": self.served_nll.float(),
            "lumped_kl": self.lumped_kl.float(),
            "same_top1": self.same_top1,
        }

    def summary(self) -> dict[str, Any]:
        """The fields of `Served` that are computed from the scores of the tokens alone."""
        return {
            "perplexity": math.exp(float(self.served_nll.mean())),
            "source_perplexity": math.exp(float(self.source_nll.mean())),
            "perplexity_ratio": _estimate(self.served_nll - self.source_nll, math.exp),
            "lumped_kl": summarize_lumped(self.lumped_kl, self.top),
            "top1": _estimate(self.same_top1),
            "tied_top1": int(self.is_tied.sum()),
        }


def score_served(reference: Reference, blocks: Sequence[ServedBlock]) -> ServedScores:
    """Compare a service's answers with the reference."""
    best, tied = zip(*(served_top1(block) for block in blocks), strict=True)
    triples = zip(reference.blocks, blocks, reference.ids, strict=True)
    return ServedScores(
        source_nll=-torch.stack([kept.next_logprob for kept in reference.blocks]).double(),
        served_nll=-torch.stack([block.next_logprob for block in blocks]),
        lumped_kl=torch.stack([lumped_kl(kept, block, ids_T) for kept, block, ids_T in triples]),
        same_top1=torch.stack(
            [top == kept.top_ids[:, 0] for top, kept in zip(best, reference.blocks, strict=True)]
        ),
        is_tied=torch.stack(tied),
        top=min(int((block.ids >= 0).sum(-1).min()) for block in blocks),
    )


def compress_blocks(source: Scorer, ids_BT: Tensor) -> list[CompressedBlock]:
    """The reference run alone: what is kept of the source on every block, with a progress line."""
    with make_progress() as progress:
        blocks = progress.track(range(len(ids_BT)), description="reference")
        return [compress(source.score(ids_BT[b]), ids_BT[b], seed=b) for b in blocks]


def _score_finite(quantized: Scorer, ids_T: Tensor, block: int) -> Tensor:
    logits_TV = quantized.score(ids_T)
    if not logits_TV.isfinite().all():
        raise ArtifactError(
            f"the engine gave logits that are not finite in block {block} of the text; quantize "
            "again with another recipe, and do not serve it"
        )
    return logits_TV


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


def summarize_lumped(lumped_BT: Tensor, top: int = MAX_LOGPROBS) -> LumpedKL:
    """Mean of the lumped KL f64 [B, T-1] of a server that names `top` tokens."""
    return LumpedKL(top=top, mean=_estimate(lumped_BT))


def _estimate(values_BT: Tensor, transform: Callable[[float], float] = float) -> Estimate:
    return Estimate(**asdict(estimate(values_BT, transform)))

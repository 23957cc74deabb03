"""KL from a few log-probabilities per token: those a server returns, those kept of a reference.

A server names its K most likely next tokens, not the whole vocabulary (`logprobs` of a completion;
K is at most 20 by default in vLLM and here). Of a reference, `compress` keeps its TOP most likely
tokens and the next one. Let S be the tokens that both sides name. All others are lumped into one:

    lumped KL = sum_{v in S} p(v) log(p(v) / q(v)) + p(rest) log(p(rest) / q(rest))

Lumping is a function of the token, so that lumped KL is at most KL(p || q): the data-processing
inequality, here the log sum inequality (Cover and Thomas, Elements of Information Theory, theorem
2.7.1). It holds for any S, also one that depends on p and q. It is 0 for equal p and q, and exact
where nothing is outside of S. How far it lies below the full KL is measured in
docs/evaluate-served.md.

Offline, q is known whole. `sampled_kl` then needs no lumping: tokens that `compress` has drawn from
the reference's tail make it an unbiased estimate of the full KL.

Pure tensor functions: no engine, no files. T-1 judged tokens of a block, M
tokens named by a server at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens kept of the reference's distribution at each position, and drawn from the rest.
TOP, DRAWN = 128, 16
#: Rows per float64 copy of logits.
_ROWS = 64
#: Least q(rest): below it the float32 values of a server say nothing. Raising q(rest) lowers the
#: lumped KL, so that it stays a lower bound.
_LEAST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class CompressedBlock:
    """What is kept of the reference's distributions over one block. Natural logarithms.

    `next_logprob` f32 [T-1] is that of the token that follows. `top_ids` int32 and `top_logprobs`
    f32 [T-1, TOP]: most likely first, equal ones by id. `rest` f32 [T-1] is the probability of all
    others, from which `drawn_ids` and `drawn_logprobs` [T-1, DRAWN] were drawn with replacement;
    TOP is smaller, and nothing drawn, where the vocabulary is.
    """

    next_logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    rest: Tensor
    drawn_ids: Tensor
    drawn_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class ServedBlock:
    """What a server says about one block. `next_logprob` f64 [T-1]; `ids` int64 [T-1, M] with -1
    where fewer are named, and their `logprobs` f64 [T-1, M]."""

    next_logprob: Tensor
    ids: Tensor
    logprobs: Tensor


def compress(source_TV: Tensor, ids_T: Tensor, *, seed: int) -> CompressedBlock:
    """Keep what is needed of the reference's logits f32 [T, V] on token ids int64 [T]. The same
    logits and seed draw the same tokens."""
    vocabulary = source_TV.shape[1]
    top, drawn = min(TOP, vocabulary), DRAWN if vocabulary > TOP else 0
    generator = torch.Generator().manual_seed(seed)
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids_T) - 1, _ROWS):
        stop = min(start + _ROWS, len(ids_T) - 1)
        log_p = source_TV[start:stop].double().log_softmax(-1)
        following = log_p.gather(1, ids_T[start + 1 : stop + 1, None])[:, 0]
        # By id first, so that the stable sort leaves equal ones in that order, as argmax has it.
        best_ids = log_p.topk(top).indices.sort(-1).values
        best, order = log_p.gather(1, best_ids).sort(stable=True, descending=True)
        best_ids = best_ids.gather(1, order)
        others = log_p.exp().scatter(1, best_ids, 0.0)
        rest = others.sum(-1)
        ids = torch.zeros((len(log_p), drawn), dtype=torch.int64)
        if drawn:
            # Where all others underflow to zero, any of them may be drawn: they have no weight.
            anything = torch.ones_like(others).scatter(1, best_ids, 0.0)
            weights = torch.where(rest[:, None] > 0, others, anything)
            ids = torch.multinomial(weights, drawn, replacement=True, generator=generator)
        columns.append((following, best_ids, best, rest, ids, log_p.gather(1, ids)))
    following, top_ids, best, rest, ids, logprobs = map(torch.cat, zip(*columns, strict=True))
    return CompressedBlock(
        next_logprob=following.float(),
        top_ids=top_ids.int(),
        top_logprobs=best.float(),
        rest=rest.float(),
        drawn_ids=ids.int(),
        drawn_logprobs=logprobs.float(),
    )


def as_served(logits_TV: Tensor, ids_T: Tensor, top: int) -> ServedBlock:
    """What a server of these logits f32 [T, V] would say about the block ids int64 [T]: its `top`
    most likely tokens and the one that follows."""
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids_T) - 1, _ROWS):
        stop = min(start + _ROWS, len(ids_T) - 1)
        log_q = logits_TV[start:stop].double().log_softmax(-1)
        next_ids = ids_T[start + 1 : stop + 1, None]
        ids = log_q.topk(min(top, log_q.shape[1])).indices
        is_named = (ids == next_ids).any(-1, keepdim=True)
        ids = torch.cat([ids, next_ids.where(~is_named, torch.tensor(-1))], dim=1)
        following = log_q.gather(1, next_ids)
        columns.append((following[:, 0], ids, log_q.gather(1, ids.clamp_min(0))))
    return ServedBlock(*(torch.cat(column) for column in zip(*columns, strict=True)))


def lumped_kl(reference: CompressedBlock, served: ServedBlock, ids_T: Tensor) -> Tensor:
    """Lumped KL per judged token, f64 [T-1], nats; see above."""
    known_ids = torch.cat([reference.top_ids.long(), ids_T[1:, None]], dim=1)
    known = torch.cat([reference.top_logprobs, reference.next_logprob[:, None]], dim=1).double()
    same = served.ids[:, :, None] == known_ids[:, None, :]
    log_p = known[:, None, :].expand(same.shape).masked_fill(~same, -torch.inf).amax(-1)
    common = same.any(-1)
    p, q = log_p.exp(), served.logprobs.exp().where(common, torch.tensor(0.0).double())
    named = torch.where(common, p * (log_p - served.logprobs), torch.tensor(0.0).double()).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(0.0)
    q_rest = (1 - q.sum(-1)).clamp_min(_LEAST_REST)
    return (named + torch.special.xlogy(p_rest, p_rest / q_rest)).clamp_min(0.0)


def sampled_kl(reference: CompressedBlock, logits_TV: Tensor) -> Tensor:
    """KL of the whole reference against logits f32 [T, V] per judged token, f64 [T-1], nats: exact
    over the tokens that were kept, and by those that were drawn over the rest. Unbiased, so that a
    single token's may be negative.

    With r = q / p, the rest's part of the KL is the sum over it of p (r - 1 - log r) + p - q, of
    which only the first term is sampled: it is of the order of (r - 1)^2, where log r itself, of
    the order of r - 1, would vary much more (Schulman, Approximating KL divergence, 2020).
    """
    pieces: list[Tensor] = []
    for start in range(0, len(logits_TV) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(logits_TV) - 1))
        log_q = logits_TV[rows].double().log_softmax(-1)
        top = reference.top_logprobs[rows].double()
        log_q_top = log_q.gather(1, reference.top_ids[rows].long())
        kept = (top.exp() * (top - log_q_top)).sum(-1)
        p_rest = reference.rest[rows].double()
        log_r = log_q.gather(1, reference.drawn_ids[rows].long())
        log_r -= reference.drawn_logprobs[rows].double()
        sampled = log_r.expm1() - log_r
        rest = sampled.mean(-1) if sampled.shape[1] else torch.zeros_like(kept)
        pieces.append(kept + p_rest * rest + p_rest - (1 - log_q_top.exp().sum(-1)))
    return torch.cat(pieces)


def served_top1(served: ServedBlock) -> tuple[Tensor, Tensor]:
    """The most likely served token int64 [T-1] (the lowest id of equal ones), and whether another
    is as likely, bool [T-1]."""
    values = served.logprobs.masked_fill(served.ids < 0, -torch.inf)
    is_best = values == values.amax(-1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    return served.ids.masked_fill(~is_best, last).amin(-1), is_best.sum(-1) > 1

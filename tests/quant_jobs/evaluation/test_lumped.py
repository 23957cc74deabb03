"""KL from a few log-probabilities: against slow computation, below the full KL, and unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from quant_jobs.evaluation import lumped
from quant_jobs.evaluation.lumped import (
    DRAWN,
    TOP,
    ServedBlock,
    as_served,
    compress,
    lumped_kl,
    sampled_kl,
    served_top1,
)


def two_models(
    num_tokens: int = 70, vocabulary: int = 400, noise: float = 0.4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(num_tokens, vocabulary, generator=generator) * 3
    quantized = source + torch.randn(num_tokens, vocabulary, generator=generator) * noise
    return source, quantized, torch.randint(0, vocabulary, (num_tokens,), generator=generator)


def full_kl(source: Tensor, quantized: Tensor) -> Tensor:
    p, q = Categorical(logits=source[:-1].double()), Categorical(logits=quantized[:-1].double())
    return kl_divergence(p, q)


def test_what_is_kept_is_the_sources_own_distribution() -> None:
    source, _, ids = two_models()
    kept = compress(source, ids, seed=0)
    log_p = source[:-1].double().log_softmax(-1)
    best = log_p.sort(-1, descending=True)
    assert torch.equal(kept.top_ids.long(), best.indices[:, :TOP])
    torch.testing.assert_close(kept.top_logprobs.double(), best.values[:, :TOP], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        kept.rest.double(), best.values[:, TOP:].exp().sum(-1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(kept.next_logprob, log_p.gather(1, ids[1:, None])[:, 0].float())
    assert kept.drawn_ids.shape == (69, DRAWN)
    for row in range(69):
        assert not set(kept.drawn_ids[row].tolist()) & set(kept.top_ids[row].tolist())
    assert torch.equal(kept.drawn_logprobs, log_p.gather(1, kept.drawn_ids.long()).float())


def test_equal_logits_are_kept_by_id_as_argmax_has_them() -> None:
    source = torch.zeros(3, 300)
    source[:, 200:260] = 4.0
    kept = compress(source, torch.zeros(3, dtype=torch.int64), seed=0)
    assert (kept.top_ids[:, :60] == torch.arange(200, 260)).all()
    assert (kept.top_ids[:, 0] == source[:-1].argmax(-1)).all()


def test_lumped_kl_equals_a_slow_direct_computation() -> None:
    source, quantized, ids = two_models()
    kept = compress(source, ids, seed=0)
    found = lumped_kl(kept, as_served(quantized, ids, 20), ids)
    for t in range(len(ids) - 1):
        p, q = source[t].double().softmax(-1), quantized[t].double().softmax(-1)
        following = int(ids[t + 1])
        of_p = {*p.topk(TOP).indices.tolist(), following}
        of_q = {*q.topk(20).indices.tolist(), following}
        common = sorted(of_p & of_q)
        expected = sum(float(p[v] * (p[v] / q[v]).log()) for v in common)
        p_rest, q_rest = 1 - float(p[common].sum()), 1 - float(q[common].sum())
        expected += p_rest * math.log(p_rest / q_rest)
        assert float(found[t]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("top", [1, 5, 20])
def test_lumping_never_shows_more_than_the_full_kl(noise: float, top: int) -> None:
    source, quantized, ids = two_models(noise=noise, seed=top)
    kept = compress(source, ids, seed=0)
    found = lumped_kl(kept, as_served(quantized, ids, top), ids)
    assert (found <= full_kl(source, quantized) + 1e-7).all()
    assert (found >= 0).all()
    fewer = lumped_kl(kept, as_served(quantized, ids, 1), ids)
    assert float(fewer.mean()) <= float(found.mean()) + 1e-9


def test_nothing_is_lost_where_the_server_names_the_whole_vocabulary() -> None:
    source, quantized, ids = two_models(vocabulary=20)
    kept = compress(source, ids, seed=0)
    assert kept.drawn_ids.shape[1] == 0
    found = lumped_kl(kept, as_served(quantized, ids, 20), ids)
    torch.testing.assert_close(found, full_kl(source, quantized), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        sampled_kl(kept, quantized), full_kl(source, quantized), atol=1e-6, rtol=1e-5
    )


def test_a_model_does_not_diverge_from_itself() -> None:
    source, _, ids = two_models()
    kept = compress(source, ids, seed=0)
    assert float(lumped_kl(kept, as_served(source, ids, 20), ids).max()) < 1e-7
    assert float(sampled_kl(kept, source).abs().max()) < 1e-7


def test_a_certain_model_has_nothing_to_draw_from_and_no_kl() -> None:
    source = torch.zeros(4, 300)
    source[:, 7] = 2000.0
    ids = torch.full((4,), 7)
    kept = compress(source, ids, seed=0)
    assert float(kept.rest.max()) == 0
    assert float(lumped_kl(kept, as_served(source, ids, 20), ids).max()) < 1e-6
    assert float(sampled_kl(kept, source).abs().max()) < 1e-7


def test_the_drawn_tokens_make_an_unbiased_estimate_of_the_full_kl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With few tokens kept, so that most of the KL is in the rest."""
    monkeypatch.setattr(lumped, "TOP", 8)
    source, quantized, ids = two_models(num_tokens=40, noise=0.3)
    exact = float(full_kl(source, quantized).mean())
    means = torch.tensor(
        [float(sampled_kl(compress(source, ids, seed=s), quantized).mean()) for s in range(60)]
    )
    error = float(means.std()) / math.sqrt(len(means))
    assert abs(float(means.mean()) - exact) < 4 * error
    assert float(means.std()) < 0.1 * exact


def test_the_likeliest_served_token_is_the_lowest_id_of_equals() -> None:
    served = ServedBlock(
        next_logprob=torch.zeros(3).double(),
        ids=torch.tensor([[5, 3, -1], [9, 4, 2], [1, -1, -1]]),
        logprobs=torch.tensor([[-1.0, -1.0, 0.0], [-3.0, -1.0, -2.0], [-4.0, 0.0, 0.0]]).double(),
    )
    best, tied = served_top1(served)
    assert best.tolist() == [3, 4, 1]
    assert tied.tolist() == [True, False, False]

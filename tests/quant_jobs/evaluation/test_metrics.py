"""The measures themselves, against slow direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from quant_jobs.evaluation.metrics import compare_logits, estimate


@pytest.mark.parametrize("num_tokens", [2, 64, 65, 66, 150])
def test_scores_equal_a_slow_direct_computation(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    source = torch.randn(num_tokens, 50, generator=generator) * 3
    quantized = source + torch.randn(num_tokens, 50, generator=generator) * 0.5
    ids = torch.randint(0, 50, (num_tokens,), generator=generator)

    scores = compare_logits(source, quantized, ids)

    p, q = Categorical(logits=source[:-1].double()), Categorical(logits=quantized[:-1].double())
    torch.testing.assert_close(scores.kl, kl_divergence(p, q))
    torch.testing.assert_close(scores.source_nll, -p.log_prob(ids[1:]))
    torch.testing.assert_close(scores.quantized_nll, -q.log_prob(ids[1:]))
    assert scores.same_top1.tolist() == [
        int(source[t].argmax()) == int(quantized[t].argmax()) for t in range(num_tokens - 1)
    ]


def test_a_model_does_not_diverge_from_itself_or_from_a_shifted_copy() -> None:
    logits = torch.randn(20, 30) * 10
    scores = compare_logits(logits, logits, torch.arange(20))
    assert scores.kl.max() == 0
    assert scores.same_top1.all()
    shifted = compare_logits(logits.double(), logits.double() + 3, torch.arange(20))
    assert shifted.kl.min() >= 0
    assert shifted.kl.max() < 1e-12


def test_kl_is_not_symmetric_and_source_comes_first() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    ids = torch.zeros(2, dtype=torch.int64)
    forward = float(compare_logits(sure, unsure, ids).kl[0])
    p = 1 / (1 + math.exp(-9))
    assert forward == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert forward != pytest.approx(float(compare_logits(unsure, sure, ids).kl[0]))


def test_the_standard_error_counts_blocks_not_tokens() -> None:
    # Blocks that agree within and differ between: 400 tokens, but only four draws.
    blocks = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 100)
    result = estimate(blocks)
    assert result.value == pytest.approx(2.5)
    assert result.standard_error == pytest.approx(blocks[:, 0].std().item() / 2)
    assert result.low == pytest.approx(1.5, abs=0.26)
    assert result.high == pytest.approx(3.5, abs=0.26)


def test_a_ratio_and_its_interval_are_exponentials_of_the_mean_difference() -> None:
    blocks = torch.randn(12, 7, dtype=torch.float64) * 0.1 + 0.3
    plain, ratio = estimate(blocks), estimate(blocks, math.exp)
    assert ratio.value == pytest.approx(math.exp(plain.value))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)))
    # The delta method: d exp(x) = exp(x) dx.
    assert ratio.standard_error == pytest.approx(ratio.value * plain.standard_error, rel=1e-6)
    assert estimate(blocks) == plain, "the same scores give the same interval"


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(100, 24, 1, generator=generator, dtype=torch.float64)
    hits = sum(e.low <= 0 <= e.high for e in map(estimate, draws))
    assert 85 <= hits <= 99, hits

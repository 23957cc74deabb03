"""The gate: every limit alone, inclusive at its edge, and bound to one engine."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from deepseek.recipe import GateLimits
from quant_jobs.gate import Measured, judge, starved_share

LIMITS = GateLimits(
    max_perplexity_ratio=1.05,
    max_mean_kl=0.02,
    min_top1=0.9,
    max_fallbacks=2,
    max_starved_experts=0.25,
)
AT_THE_EDGE = Measured(
    perplexity_ratio=1.05, mean_kl=0.02, top1=0.9, fallbacks=2, starved_experts=0.25
)


def test_limits_are_inclusive() -> None:
    assert judge(AT_THE_EDGE, LIMITS) == {}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("perplexity_ratio", 1.0501, "perplexity ratio 1.05010 is above 1.05"),
        ("mean_kl", 0.0201, "mean KL 0.02010 is above 0.02 nats per token"),
        ("top1", 0.8999, "top-1 agreement 0.8999 is below 0.9"),
        ("fallbacks", 3, "3 fallbacks in the ledger, more than 2"),
        (
            "starved_experts",
            0.26,
            "26.0% of the experts saw too few calibration tokens, more than 25.0%",
        ),
    ],
)
def test_each_limit_fails_alone_with_its_own_sentence(
    field: str, value: float, sentence: str
) -> None:
    assert judge(replace(AT_THE_EDGE, **{field: value}), LIMITS) == {field: sentence}


@pytest.mark.parametrize("field", ["perplexity_ratio", "mean_kl", "top1", "starved_experts"])
def test_a_nan_never_passes(field: str) -> None:
    assert list(judge(replace(AT_THE_EDGE, **{field: nan}), LIMITS)) == [field]


def test_every_broken_limit_is_reported() -> None:
    worst = Measured(
        perplexity_ratio=9.0, mean_kl=3.0, top1=0.1, fallbacks=99, starved_experts=1.0
    )
    assert len(judge(worst, LIMITS)) == 5


@pytest.mark.parametrize(
    ("coverage", "share"),
    [
        ({}, 0.0),
        ({3: (16, 17)}, 0.0),
        ({3: (15, 16), 4: (0, 100)}, 0.5),
        ({3: (0, 0)}, 1.0),
    ],
)
def test_starved_experts_are_those_below_the_floor(
    coverage: dict[int, tuple[int, ...]], share: float
) -> None:
    assert starved_share(coverage, floor_tokens=16) == share

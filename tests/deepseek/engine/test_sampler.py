"""Choosing tokens: cuts, seeds, log-probabilities, and the numbers behind them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepseek.engine.request import MAX_LOGPROBS, SamplingParams
from deepseek.engine.sampler import Draw, choose, sample, score, uniform
from deepseek.errors import RequestError


def logits(size: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draws(row: torch.Tensor, count: int = 1500, **sampling: float | int) -> torch.Tensor:
    """How often each token comes in `count` positions."""
    params = SamplingParams(max_tokens=1, **sampling)
    tokens = [sample(row, params, uniform(1, position)) for position in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(row)) / count


def largest_gap(frequency: torch.Tensor, probability: torch.Tensor, count: int = 1500) -> float:
    """In standard deviations of the frequency."""
    deviation = (probability * (1 - probability) / count).sqrt().clamp_min(1e-4)
    return ((frequency - probability).abs() / deviation).max().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    frequency = draws(logits(), temperature=temperature)
    assert largest_gap(frequency, (logits() / temperature).softmax(-1)) < 4.5


def test_top_k_keeps_the_k_most_likely_and_their_proportions() -> None:
    row, k = logits(), 5
    kept = row.topk(k).indices
    expected = torch.zeros_like(row).scatter(0, kept, row[kept].softmax(-1))
    frequency = draws(row, top_k=k)
    assert frequency[expected == 0].sum() == 0
    assert largest_gap(frequency, expected) < 4.5


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    for top_p, kept in ((0.3, 1), (0.4001, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 4)):
        frequency = draws(row, top_p=top_p)
        assert int((frequency > 0).sum()) == kept, top_p
        expected = torch.zeros(4)
        expected[:kept] = row[:kept].softmax(-1)
        assert largest_gap(frequency, expected) < 4.5, top_p


def test_top_k_cuts_before_top_p() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the best two alone, the first has 0.57 of the probability.
    assert int((draws(row, top_k=2, top_p=0.5) > 0).sum()) == 1


def test_temperature_zero_and_nearly_zero_take_the_most_likely() -> None:
    row = logits()
    params = SamplingParams(max_tokens=1, temperature=0)
    [choice] = choose(row[None], [Draw(params, 0, 0)])
    assert choice is not None
    assert choice.token_id == int(row.argmax())
    for temperature in (1e-9, 1e-300):
        assert draws(row, 20, temperature=temperature)[row.argmax()] == 1


@pytest.mark.parametrize("width", [1, 7, 64, 1003])
def test_no_token_is_chosen_where_a_logit_is_nan_or_infinite(width: int) -> None:
    greedy = Draw(SamplingParams(max_tokens=1, temperature=0), 0, 0)
    drawn = Draw(SamplingParams(max_tokens=1), 0, 0)
    for wrong in (math.nan, math.inf):
        for place in {0, width // 3, width // 2, width - 1}:
            rows = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
            rows[1, place] = wrong
            for draw in (greedy, drawn):
                found = choose(rows, [draw] * 3)
                assert [choice is None for choice in found] == [False, True, False], (wrong, place)
    assert choose(torch.full((1, width), -math.inf), [greedy]) == [None]


def test_the_first_of_the_most_likely_is_taken() -> None:
    greedy = Draw(SamplingParams(max_tokens=1, temperature=0), 0, 0)
    rows = torch.zeros(40, 200)
    for row in range(40):
        rows[row, 5 * row :: 3] = 1.0
    found = choose(rows, [greedy] * 40)
    assert [choice.token_id for choice in found if choice is not None] == list(range(0, 200, 5))


def test_the_ends_of_the_unit_interval_give_tokens_that_are_possible() -> None:
    row = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    params = SamplingParams(max_tokens=1)
    assert sample(row, params, 0.0) == 1
    assert sample(row, params, 1 - 2**-53) == 2


def test_a_choice_depends_on_seed_and_position_and_not_on_the_row_beside_it() -> None:
    rows = torch.stack([logits(seed=i) for i in range(6)])
    params = SamplingParams(max_tokens=1)
    whole = choose(rows, [Draw(params, seed=i, position=7) for i in range(6)])
    for i in range(6):
        assert choose(rows[i : i + 1], [Draw(params, seed=i, position=7)]) == [whole[i]]
    same = [choose(rows[:1], [Draw(params, 1, position)])[0] for position in range(40)]
    other = [choose(rows[:1], [Draw(params, 2, position)])[0] for position in range(40)]
    assert same != other


def test_uniform_numbers_fill_the_interval_evenly_for_any_seed() -> None:
    for seed in (0, 1, -1, 2**63, 12345):
        numbers = torch.tensor([uniform(seed, position) for position in range(4000)])
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = torch.histc(numbers, 20, 0, 1)
        chi_squared = ((counts - 200) ** 2 / 200).sum().item()
        assert chi_squared < 45, seed  # 19 degrees of freedom: 1 in 1500
        assert abs(torch.corrcoef(torch.stack((numbers[1:], numbers[:-1])))[0, 1]) < 0.06
    by_seed = torch.tensor([uniform(seed, 5) for seed in range(4000)])
    assert ((torch.histc(by_seed, 20, 0, 1) - 200) ** 2 / 200).sum() < 45


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_the_raw_distribution(count: int) -> None:
    row = logits()
    params = SamplingParams(max_tokens=1, temperature=0.3, top_k=3, logprobs=count)
    [choice] = choose(row[None], [Draw(params, 3, 4)])
    assert choice is not None
    expected = row.log_softmax(-1)
    assert choice.logprob == pytest.approx(expected[choice.token_id].item())
    best = expected.sort(descending=True)
    assert [token for token, _ in choice.top] == best.indices[:count].tolist()
    assert [value for _, value in choice.top] == pytest.approx(best.values[:count].tolist())
    assert choice.rank == best.indices.tolist().index(choice.token_id) + 1


def test_a_tie_ranks_with_the_last_of_those_that_are_as_likely() -> None:
    row = torch.tensor([[0.0, 2.0, 1.0, 1.0, -math.inf]])
    ranks = [score(row, torch.tensor([token]), 0)[0].rank for token in range(5)]
    assert ranks == [4, 1, 3, 3, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_spares_its_neighbors(bad: float) -> None:
    rows = torch.stack([logits(), logits()])
    rows[0, 3] = bad
    first, second = choose(rows, [Draw(SamplingParams(max_tokens=1), 0, 0)] * 2)
    assert first is None
    assert second is not None


@pytest.mark.parametrize(
    ("field", "value"),
    list(
        itertools.chain(
            itertools.product(["max_tokens"], [-1]),
            itertools.product(["temperature"], [-0.1, math.nan, math.inf]),
            itertools.product(["top_p"], [0.0, -0.5, 1.01, math.nan]),
            itertools.product(["top_k"], [-1]),
            itertools.product(["logprobs", "prompt_logprobs"], [-1, MAX_LOGPROBS + 1]),
            itertools.product(["stop"], [("",)]),
        )
    ),
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**({"max_tokens": 1} | {field: value}))

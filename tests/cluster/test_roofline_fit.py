"""The fitted constants are those of the published figures, within the errors that the page says."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from cluster.fit import EARLY_LAYER_S, SINCE, Constants, error, fit, needed_margin, predict, spread
from cluster.published import FIGURES, Figure
from cluster.roofline import FITTED
from cluster.slo import MARGINS
from cluster.uncompared import NOT_COMPARED
from cluster.work import Attention

FIT = [figure for figure in FIGURES if figure.role == "fit"]
CONSTANTS = Constants(FITTED, EARLY_LAYER_S)
#: Source -> the largest error of its fitted figures. The outliers are explained on the page.
STATED = {
    "InferenceX #870": 0.10,
    "TensorRT-LLM guide": 0.60,
    "tt-inference-server #356": 0.20,
    "SGLang #3922": 0.20,
    "SGLang #4287": 0.05,
    "SGLang #4220": 0.15,
    "SGLang #8118": 0.35,
    "SGLang #15315": 0.15,
    "GPUStack lab": 0.30,
    "LMSYS, H20": 0.45,
    "LMSYS, 96 H100": 0.35,
}


@pytest.mark.heavy
@pytest.mark.parametrize("figure", FIT, ids=lambda figure: f"{figure.source} {figure.batch:.0f}")
def test_a_fitted_figure_is_within_the_error_of_its_source(figure: Figure) -> None:
    assert abs(error(figure, CONSTANTS)) <= STATED[figure.source]


@pytest.mark.heavy
def test_the_constants_are_the_fit_s() -> None:
    found = fit(FIT)
    for name, value in asdict(found.efficiency).items():
        assert getattr(FITTED, name) == pytest.approx(value, rel=0.01), name
    assert pytest.approx(found.early_layer_s, rel=0.01) == EARLY_LAYER_S


@pytest.mark.heavy
def test_no_other_constant_fits_better_alone() -> None:
    """A tenth more or less of any fitted constant makes the sum of errors no smaller."""

    def total(constants: Constants) -> float:
        return sum(min(abs(error(figure, constants)), 1.0) for figure in FIT)

    best = total(CONSTANTS)
    for name in ("memory", "decode", "activation_bytes", "layer_s", "hop_s"):
        for factor in (0.8, 1.25):
            other = replace(FITTED, **{name: factor * getattr(FITTED, name)})
            assert total(Constants(other, EARLY_LAYER_S)) > 0.97 * best, (name, factor)


@pytest.mark.heavy
def test_the_median_error_is_below_a_tenth() -> None:
    median, worst = spread(error(figure, CONSTANTS) for figure in FIT)
    assert median < 0.10
    assert worst < 0.60


@pytest.mark.heavy
@pytest.mark.parametrize("attention", MARGINS)
def test_a_plan_s_margin_is_the_fit_s_most_optimistic_figure(attention: Attention) -> None:
    needed = needed_margin(attention)
    assert needed <= MARGINS[attention] < needed + 0.01


@pytest.mark.heavy
def test_earlier_software_has_its_own_fixed_cost() -> None:
    early, now = (next(f for f in FIT if (f.date >= SINCE) is is_now) for is_now in (False, True))
    slower = Constants(FITTED, 2 * EARLY_LAYER_S)
    assert predict(early, slower) != predict(early, CONSTANTS)
    assert predict(now, slower) == predict(now, CONSTANTS)


def test_every_figure_says_where_it_was_read() -> None:
    for figure in FIGURES:
        assert figure.url.startswith("https://")
        assert figure.role == "fit" or figure.note, figure
    for what, url, why in NOT_COMPARED:
        assert what
        assert why
        assert url.startswith("https://")
    assert set(STATED) == {figure.source for figure in FIT}


def test_the_median_of_an_even_number_is_the_middle_of_two() -> None:
    assert spread([0.125, -0.5, 0.25, -0.375]) == (0.3125, 0.5)
    assert spread([-0.5]) == (0.5, 0.5)

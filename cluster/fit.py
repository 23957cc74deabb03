"""Fits the roofline's constants on published figures, and says how far off they leave it.

    python -m cluster.fit

prints the constants and the errors; the constants are then written into `cluster/roofline.py` by
hand, and a test fits again. Engines became faster at what a layer costs besides its bytes, so that
this constant is fitted twice: on figures since `SINCE`, which plans take, and on earlier ones.

The fit minimizes the sum of sqrt(r^2 + d^2) - d over the figures, r the logarithm of predicted over
published and d 0.1: near squares for small errors, near absolute values for outliers, which
therefore do not pull the rest. A source of n figures weighs as much as sqrt(n) others, because
figures of one series err together. A figure's left-out error comes from a fit without its source.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from cluster.built_bytes import RELEASE
from cluster.hardware import parse_hardware
from cluster.published import FIGURES, Figure
from cluster.roofline import FITTED, LINK, Efficiency, ReplicaSpeed, replica_speed
from cluster.work import Attention
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import load_recipe

#: Figures of software from this month on tell what a layer costs now.
SINCE = "2025-09"
#: Where errors stop being counted as squares.
_SOFT = 0.1
#: Constants that are fitted -> where the search starts, and the range that it stays in. Tensor
#: cores are not taken to reach more than DeepGEMM does: 1550 of an H800's 1979 TFLOP/s in FP8
#: (https://github.com/deepseek-ai/DeepGEMM).
SEARCH: dict[str, tuple[float, float, float]] = {
    "memory": (0.7, 0.2, 1.0),
    "decode": (0.5, 0.05, 0.78),
    "prefill": (0.5, 0.05, 0.78),
    "activation_bytes": (1e6, 1e5, 1e7),
    "layer_s": (100e-6, 10e-6, 400e-6),
    "hop_s": (100e-6, 1e-6, 400e-6),
    "early_layer_s": (200e-6, 10e-6, 400e-6),
}


@dataclass(frozen=True, slots=True)
class Constants:
    """What a fit finds: `early_layer_s` stands for `layer_s` in figures before `SINCE`."""

    efficiency: Efficiency
    early_layer_s: float

    def of(self, figure: Figure) -> Efficiency:
        if figure.date >= SINCE:
            return self.efficiency
        return replace(self.efficiency, layer_s=self.early_layer_s)


def predict(figure: Figure, constants: Constants) -> float:
    """What the roofline says for a figure, in the figure's unit."""
    speed = replace(_speed(figure), efficiency=constants.of(figure))
    batch, isl, osl = figure.batch, figure.isl, figure.osl
    if figure.metric == "prefill":
        return speed.prefill_tokens_per_s(isl)
    if figure.metric == "ttft":
        return 1000 * speed.prefill_s(isl)
    alone = figure.alone or batch == 1
    if figure.metric == "tpot":
        tpot = speed.decode_s(batch, isl + osl / 2) if alone else speed.tpot_s(batch, isl, osl)
        return 1000 * tpot
    if alone:
        return batch / speed.decode_s(batch, isl + osl / 2)
    return speed.output_tokens_per_s(batch, isl, osl)


@lru_cache(maxsize=256)
def _speed(figure: Figure) -> ReplicaSpeed:
    """KV formats are BF16 in all figures, which every target lays out alike."""
    recipe = RELEASE if figure.recipe == RELEASE.name else load_recipe(figure.recipe)
    return replica_speed(
        DEEPSEEK_V3,
        recipe,
        parse_hardware(figure.hardware),
        attention=figure.attention,
        ep=figure.ep,
        chunk_tokens=figure.chunk,
    )


def error(figure: Figure, constants: Constants) -> float:
    """Predicted over published, less one, of the figure as published: 0.1 is a prediction 10 %
    above it, of a time or of a rate."""
    return predict(figure, constants) / figure.value - 1.0


def fit(figures: Sequence[Figure], near: Constants | None = None) -> Constants:
    """The constants that fit best: a pattern search over their logarithms until its step is below
    a percent, from the same start every time, or in small steps from `near`."""
    numbers = Counter(figure.source for figure in figures)

    def loss(logs: Sequence[float]) -> float:
        constants = _constants(logs)
        return sum(
            (math.hypot(math.log(1.0 + error(figure, constants)), _SOFT) - _SOFT)
            / math.sqrt(numbers[figure.source])
            for figure in figures
        )

    if near is None:
        start, step = [first for first, _, _ in SEARCH.values()], 0.4
    else:
        known = {**asdict(near.efficiency), "early_layer_s": near.early_layer_s}
        start, step = [known[name] for name in SEARCH], 0.1
    return _constants(_pattern_search(loss, [math.log(value) for value in start], step))


#: `early_layer_s` of the fit that `FITTED` comes from.
EARLY_LAYER_S = 293e-6


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside the roofline's answer. `left_out` and `source_left_out` are the errors
    after a fit without the figure, and without all of its source; None of figures that are not
    fitted on."""

    figure: Figure
    predicted: float
    error: float
    left_out: float | None
    source_left_out: float | None


def rows() -> list[Row]:
    """All figures, with the constants of `cluster/roofline.py`. Fits once for every figure and
    every source, some seconds."""
    fitted = [figure for figure in FIGURES if figure.role == "fit"]
    constants = Constants(FITTED, EARLY_LAYER_S)
    without = {
        source: fit([figure for figure in fitted if figure.source != source], constants)
        for source in dict.fromkeys(figure.source for figure in fitted)
    }
    found = []
    for figure in FIGURES:
        left_out = source_left_out = None
        if figure.role == "fit":
            others = [other for other in fitted if other != figure]
            left_out = error(figure, fit(others, constants))
            source_left_out = error(figure, without[figure.source])
        off = error(figure, constants)
        found.append(Row(figure, predict(figure, constants), off, left_out, source_left_out))
    return found


def needed_margin(attention: Attention) -> float:
    """How much slower predictions must be made so that no fitted figure with attention split that
    way is slower than predicted."""
    constants = Constants(FITTED, EARLY_LAYER_S)
    most = 0.0
    for figure in FIGURES:
        if figure.role == "fit" and figure.attention == attention:
            ratio = predict(figure, constants) / figure.value
            most = max(most, (1.0 / ratio if figure.is_time else ratio) - 1.0)
    return most


def spread(errors: Iterable[float]) -> tuple[float, float]:
    """Median and largest size of errors."""
    sizes = sorted(abs(one) for one in errors)
    middle = len(sizes) // 2
    median = sizes[middle] if len(sizes) % 2 else (sizes[middle - 1] + sizes[middle]) / 2
    return median, sizes[-1]


def _constants(logs: Sequence[float]) -> Constants:
    found = dict(zip(SEARCH, map(math.exp, logs), strict=True))
    early = found.pop("early_layer_s")
    return Constants(Efficiency(link=LINK, **found), early)


def _pattern_search(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], step: float
) -> list[float]:
    """The place of the smallest loss that is found by trying a step up and down in every
    direction, and halving the step when none is better."""
    best = list(start)
    limits = [(math.log(low), math.log(high)) for _, low, high in SEARCH.values()]
    lowest = loss(best)
    while step > 0.005:
        improved = False
        for place, (low, high) in enumerate(limits):
            for move in (step, -step):
                tried = best.copy()
                tried[place] = min(high, max(low, tried[place] + move))
                found = loss(tried)
                if found < lowest - 1e-9:
                    best, lowest, improved = tried, found, True
                    break
        step = step if improved else step / 2
    return best


def main() -> None:
    """Print the constants and the errors."""
    print(fit([figure for figure in FIGURES if figure.role == "fit"]))
    for row in rows():
        figure = row.figure
        errors = [row.error, row.left_out, row.source_left_out]
        print(
            f"{figure.role:6}{figure.source:26}{figure.hardware:14}{figure.metric:8}"
            f"{figure.value:11.1f}{row.predicted:11.1f}",
            *("" if one is None else f"{one:+.0%}" for one in errors),
        )


if __name__ == "__main__":
    main()

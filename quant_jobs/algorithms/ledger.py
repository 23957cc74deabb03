"""Fallbacks: what the job did instead of what the recipe asked for. Every substitution is counted.

Every kind is listed here with its meaning. The manifest stores the counts, the gate compares them
with the recipe's `max_fallbacks`, the report shows them. Expert coverage is not a fallback: it is a
measurement, and has its own place in the manifest. Nor is what loses nothing on any data (zeros of
the weights, `exact.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from deepseek.artifact.manifest import Fallback

FallbackKind = Literal[
    "dead_channel",
    "unseen_expert",
    "clipped_smoothing",
    "outlier_input_scale",
    "unseen_input_scale",
    "starved_expert",
    "damped_hessian",
    "unusable_hessian",
]

MEANING: dict[FallbackKind, str] = {
    "dead_channel": "input channels that calibration never activated; not smoothed",
    "unseen_expert": "no calibration token reached the expert; its down_proj is not smoothed",
    "clipped_smoothing": "smoothing scales that met the limit of 2^-10 or 2^10",
    "outlier_input_scale": "inputs of the expert that clip: far larger than those of its layer",
    "unseen_input_scale": "no calibration token reached the expert; input scales of its layer",
    "starved_expert": "too few calibration tokens for AWQ or GPTQ; rounded to nearest",
    "damped_hessian": "GPTQ's Hessian was not positive definite; damped more than asked",
    "unusable_hessian": "GPTQ's Hessian could not be inverted; rounded to nearest",
}


class Ledger:
    """Collects fallbacks; a count of zero is not one."""

    def __init__(self) -> None:
        self._entries: list[Fallback] = []

    def note(self, kind: FallbackKind, layer: int | None, module: str, count: int = 1) -> None:
        """Count `count` fallbacks of one kind at one module (a full module name)."""
        if count:
            self._entries.append(
                Fallback(kind=kind, layer=layer, module=module, count=count, detail=MEANING[kind])
            )

    def extend(self, entries: Iterable[Fallback]) -> None:
        """Add fallbacks that were counted elsewhere."""
        self._entries.extend(entries)

    def entries(self) -> tuple[Fallback, ...]:
        """All fallbacks, in an order that does not depend on the order in which they were noted."""
        return tuple(
            sorted(
                self._entries,
                key=lambda e: (e.layer is None, e.layer or 0, e.module, e.kind),
            )
        )

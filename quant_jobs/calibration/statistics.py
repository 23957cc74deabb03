"""Statistics of one input of linears over the calibration blocks. Runs no layer.

Each block has its own statistics; the worker that owns the linears (`units.py`) adds them up in
block order, so that the bytes depend neither on the number of workers nor on crashes. Called by
`measuring.py`. Statistics of one input (gate and up of an expert read the same one,
`deepseek/inventory.py`):

    amax      the largest magnitude of each channel (SmoothQuant)
    mean_abs  the mean magnitude of each channel (AWQ)
    gram      the sum of x x^T (GPTQ's Hessian up to a factor), only for GPTQ
    sample    a few tokens, spread evenly over the blocks (output errors, AWQ's searches)
    tokens    the number of tokens (expert coverage)

R sampled tokens · T tokens of one block · K inputs of the linear
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.errors import CheckpointError

#: Sampled tokens per input over all blocks, on which output errors are measured.
SAMPLE_TOKENS = 256

#: Elements of an input that are summed at once.
_BAND_ELEMENTS = 1 << 22


@dataclass(slots=True)
class InputStatistics:
    """Statistics of one input over all measured tokens: `amax` and `mean_abs` f32 [K] are the
    largest and the mean magnitude of each channel, `sample` f32 [R, K] sampled tokens, `gram` f32
    [K, K] the sum of x x^T (only for GPTQ)."""

    amax: Tensor
    sample: Tensor
    tokens: int
    mean_abs: Tensor
    gram: Tensor | None = None

    def take_gram(self) -> Tensor:
        """Transfers ownership of the Gram matrix to the caller; this object no longer holds one."""
        assert self.gram is not None, "no Gram matrix, or taken already"
        gram, self.gram = self.gram, None
        return gram


@dataclass(frozen=True, slots=True)
class InputShare:
    """Statistics of one input over one calibration block: `amax` f32 [K], `abs_sum` f64 [K],
    `sample` f32 [R, K], and the block's `rows` f32 [T, K] if a Gram matrix needs them."""

    amax: Tensor
    abs_sum: Tensor
    sample: Tensor
    tokens: int
    rows: Tensor | None = None

    def check_finite(self, name: str, block: int) -> None:
        """Check the block's activations; `name` and `block` are for the error sentence.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        if not bool(self.amax.isfinite().all()):
            raise CheckpointError(
                f"{name}: its input is not finite on calibration block {block}; the source "
                "weights before it are damaged"
            )


def rows_per_block(num_rows: int, num_blocks: int) -> int:
    """Number of tokens to sample from one block for `num_rows` tokens over all blocks."""
    return math.ceil(num_rows / num_blocks)


def spread(num_tokens: int, num_rows: int) -> Tensor:
    """At most `num_rows` positions, spread evenly over 0..num_tokens-1: int64 [R]."""
    rows = min(num_rows, num_tokens)
    return torch.arange(rows) * num_tokens // max(rows, 1)


def observe(x_TK: Tensor, num_rows: int, *, keep_rows: bool = False) -> InputShare:
    """Statistics of one block's input x f32 [T, K], T at least 1. `sample` has at most `num_rows`
    rows."""
    # In bands of channels, because a float64 sum first copies its operand to float64.
    width = max(_BAND_ELEMENTS // len(x_TK) // 64, 1) * 64
    bands = [_magnitudes(band) for band in torch.split(x_TK, width, dim=1)]
    return InputShare(
        amax=torch.cat([amax for amax, _ in bands]),
        abs_sum=torch.cat([abs_sum for _, abs_sum in bands]),
        sample=x_TK[spread(len(x_TK), num_rows)],
        tokens=len(x_TK),
        rows=x_TK if keep_rows else None,
    )


def _magnitudes(band: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude f32 [k] and the sum of magnitudes f64 [k] of k channels f32 [T, k]."""
    magnitude = band.abs()
    return magnitude.amax(dim=0), magnitude.sum(dim=0, dtype=torch.float64)


class Accumulator:
    """Accumulates the statistics of one input; blocks come in ascending order."""

    def __init__(self, name: str, *, gram: bool) -> None:
        self._name = name
        self._wants_gram = gram
        self._amax: Tensor | None = None
        self._abs_sum: Tensor | None = None
        self._gram: Tensor | None = None
        self._samples: list[Tensor] = []
        self._sampled = 0
        self._tokens = 0
        self._last_block = -1

    def add(self, block: int, share: InputShare) -> None:
        """Add the statistics of one block.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        assert block > self._last_block, f"block {block} after {self._last_block}"
        self._last_block = block
        share.check_finite(self._name, block)
        first = self._amax is None
        self._amax = share.amax if first else torch.maximum(self._amax, share.amax)  # type: ignore[arg-type]
        self._abs_sum = share.abs_sum if first else self._abs_sum + share.abs_sum  # type: ignore[operator]
        if self._wants_gram:
            assert share.rows is not None, f"{self._name}: a Gram matrix needs the rows"
            if self._gram is None:
                self._gram = share.rows.T @ share.rows
            else:  # in place: the matrix is large, and every block updates it
                self._gram.addmm_(share.rows.T, share.rows)
        if self._sampled < SAMPLE_TOKENS:
            self._samples.append(share.sample[: SAMPLE_TOKENS - self._sampled].clone())
            self._sampled += len(self._samples[-1])
        self._tokens += share.tokens

    def finish(self) -> InputStatistics | None:
        """The statistics over all blocks added; None if there was none."""
        if self._amax is None or self._abs_sum is None:
            return None
        return InputStatistics(
            amax=self._amax,
            sample=torch.cat(self._samples),
            tokens=self._tokens,
            mean_abs=(self._abs_sum / self._tokens).float(),
            gram=self._gram,
        )

"""Step 3, calibrate: what goes into every linear, measured on the calibration blocks.

Statistics are taken per block and merged in the order of the blocks, whichever worker held which
block: any number of workers, and any crash in between, gives the same bytes. Per distinct input of
a layer (gate and up of one expert share theirs) a block yields

    amax     float32 [K]   the largest magnitude of each channel (SmoothQuant)
    tokens   int           how many tokens came by (expert coverage)
    sample   float32 [R,K] a few of them, spread evenly over the block (output errors)

No sums yet: AWQ's means and GPTQ's second moments will be further fields, added in block order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek.errors import CheckpointError
from deepseek.inventory import TensorSpec

#: Tokens per linear on which its output error is measured, over all blocks.
SAMPLE_TOKENS = 256

#: Linears that see the input of another one, which stands for both.
_SHARES_INPUT_WITH = {"kv_a_proj_with_mqa": "q_a_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What came into one linear, over all tokens: `amax` and `mean_abs` f32 [K] are the largest and
    the mean magnitude of each channel, `sample` f32 [R, K] some of the tokens, `gram` f32 [K, K]
    the sum of x x^T (only where GPTQ asks for it)."""

    amax: Tensor
    sample: Tensor
    tokens: int
    mean_abs: Tensor
    gram: Tensor | None = None


#: By the module name that stands for the input, see `input_of`. Unseen experts are absent.
Statistics = dict[str, InputStatistics]


@dataclass(frozen=True, slots=True)
class InputShare:
    """One worker's blocks' statistics of one input, kept apart: n `blocks` by index, `amax`
    f32 [n, K], `tokens` and the `rows` that each contributes to `sample` f32 [sum of rows, K].

    Stacked, because a layer of DeepSeek-V3 has 520 distinct inputs: one message of a few large
    tensors instead of 520 small ones per block.
    """

    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    amax: Tensor
    sample: Tensor


#: What one worker saw, by input.
Share = dict[str, InputShare]


def input_of(module: str) -> str:
    """The linear under whose name the statistics of this linear's input are kept."""
    parent, _, role = module.rpartition(".")
    return f"{parent}.{_SHARES_INPUT_WITH.get(role, role)}"


def rows_per_block(num_blocks: int) -> int:
    """How many tokens of one block enter the sample of one linear."""
    return math.ceil(SAMPLE_TOKENS / num_blocks)


def linear_modules(module: nn.Module, layer: int) -> dict[str, nn.Linear]:
    """The layer's linears by their full module names, `model.layers.3.mlp.experts.7.up_proj`."""
    return {
        f"model.layers.{layer}.{name}": part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }


class Collector:
    """Hooks on the linears of one layer that note what each block brings."""

    def __init__(self, module: nn.Module, layer: int, num_rows: int) -> None:
        self._num_rows = num_rows
        self._block = -1
        self._seen: dict[str, dict[int, InputStatistics]] = {}
        self._handles = [
            linear.register_forward_pre_hook(self._hook(name))
            for name, linear in linear_modules(module, layer).items()
            if input_of(name) == name
        ]

    def start_block(self, block: int) -> None:
        """What comes now is of this block."""
        self._block = block

    def finish(self) -> Share:
        """Take the hooks off and return what was seen, block by block.

        Raises:
            CheckpointError: an activation was NaN or infinite.
        """
        for handle in self._handles:
            handle.remove()
        return {name: _stack(name, seen) for name, seen in self._seen.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(_: nn.Module, args: tuple[Tensor]) -> None:
            seen = self._seen.setdefault(name, {})
            assert self._block not in seen, f"{name} ran twice within block {self._block}"
            seen[self._block] = observe(args[0].flatten(0, -2), self._num_rows)

        return see


def observe(x_TK: Tensor, num_rows: int) -> InputStatistics:
    """Statistics of one block's input to one linear: f32 [T, K], T at least 1."""
    tokens = len(x_TK)
    rows = min(num_rows, tokens)
    chosen = torch.arange(rows) * tokens // rows
    return InputStatistics(amax=x_TK.abs().amax(dim=0), sample=x_TK[chosen], tokens=tokens)


def _stack(name: str, seen: dict[int, InputStatistics]) -> InputShare:
    amax = torch.stack([one.amax for one in seen.values()])
    finite = amax.isfinite().all(dim=1).tolist()
    if not all(finite):
        block = list(seen)[finite.index(False)]
        raise CheckpointError(
            f"{name}: its input is not finite on calibration block {block}; the source weights "
            "before it are damaged"
        )
    return InputShare(
        blocks=tuple(seen),
        tokens=tuple(one.tokens for one in seen.values()),
        rows=tuple(len(one.sample) for one in seen.values()),
        amax=amax,
        sample=torch.cat([one.sample for one in seen.values()]),
    )


def merge(shares: Sequence[Share]) -> Statistics:
    """All workers' shares as one, in block order: the same whoever held which block."""
    names = sorted({name for share in shares for name in share})
    return {name: _merge([share[name] for share in shares if name in share]) for name in names}


def _merge(shares: Sequence[InputShare]) -> InputStatistics:
    samples: dict[int, Tensor] = {}
    for share in shares:
        parts = share.sample.split_with_sizes(list(share.rows))
        samples.update(zip(share.blocks, parts, strict=True))
    ordered = torch.cat([samples[block] for block in sorted(samples)])
    return InputStatistics(
        amax=torch.cat([share.amax for share in shares]).amax(dim=0),
        sample=ordered[:SAMPLE_TOKENS].contiguous(),
        tokens=sum(sum(share.tokens) for share in shares),
    )


def coverage(statistics: Statistics, specs: Iterable[TensorSpec]) -> tuple[int, ...]:
    """Tokens that reached each routed expert, in the order of the experts; empty when dense."""
    gates = [spec.module for spec in specs if spec.expert is not None and spec.role == "gate_proj"]
    return tuple(statistics[name].tokens if name in statistics else 0 for name in gates)

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek.errors import CheckpointError
from deepseek.inventory import TensorSpec
from quant_jobs.layer import Rotary, linear_modules, run_block

#: Tokens per linear on which its output error is measured, over all blocks.
SAMPLE_TOKENS = 256

#: Linears that see the input of another one, which stands for both.
_SHARES_INPUT_WITH = {"kv_a_proj_with_mqa": "q_a_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What came into one linear: `amax` f32 [K], `sample` f32 [R, K], number of tokens."""

    amax: Tensor
    sample: Tensor
    tokens: int


#: By the module name that stands for the input, see `input_of`. Unseen experts are absent.
Statistics = dict[str, InputStatistics]


def input_of(module: str) -> str:
    """The linear under whose name the statistics of this linear's input are kept."""
    parent, _, role = module.rpartition(".")
    return f"{parent}.{_SHARES_INPUT_WITH.get(role, role)}"


def rows_per_block(num_blocks: int) -> int:
    """How many tokens of one block enter the sample of one linear."""
    return math.ceil(SAMPLE_TOKENS / num_blocks)


class Collector:
    """Hooks on the linears of one layer; each block forwarded through it leaves its statistics."""

    def __init__(self, module: nn.Module, layer: int, num_rows: int) -> None:
        self._num_rows = num_rows
        self._found: Statistics = {}
        self._handles = [
            linear.register_forward_pre_hook(self._hook(name))
            for name, linear in linear_modules(module, layer).items()
            if input_of(name) == name
        ]

    def take(self) -> Statistics:
        """What was seen since the last call."""
        found, self._found = self._found, {}
        return found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def see(_: nn.Module, args: tuple[Tensor]) -> None:
            assert name not in self._found, f"{name} ran twice within one block"
            self._found[name] = observe(args[0].flatten(0, -2), self._num_rows)

        return see


def observe(x_TK: Tensor, num_rows: int) -> InputStatistics:
    """Statistics of one block's input to one linear: f32 [T, K], T at least 1."""
    tokens = len(x_TK)
    rows = min(num_rows, tokens)
    chosen = torch.arange(rows) * tokens // rows
    return InputStatistics(
        amax=x_TK.abs().amax(dim=0), sample=x_TK[chosen].contiguous(), tokens=tokens
    )


def calibrate_block(
    module: nn.Module, rotary: Rotary, collector: Collector, x_TD: Tensor, where: str
) -> Statistics:
    """Forward one block through the original layer and return what its linears saw.

    Raises:
        CheckpointError: an activation is NaN or infinite; `where` says in which block.
    """
    y_TD = run_block(module, rotary, x_TD)
    statistics = collector.take()
    for name, seen in statistics.items():
        if not bool(seen.amax.isfinite().all()):
            raise CheckpointError(
                f"{name}: its input is not finite on {where}; the source weights are damaged"
            )
    if not bool(y_TD.isfinite().all()):
        raise CheckpointError(f"the output is not finite on {where}; the source is damaged")
    return statistics


def merge(blocks: Iterable[Statistics]) -> Statistics:
    """Statistics of all blocks, given in block order."""
    parts: dict[str, list[InputStatistics]] = {}
    for block in blocks:
        for name, seen in block.items():
            parts.setdefault(name, []).append(seen)
    return {name: _merge_input(parts[name]) for name in sorted(parts)}


def _merge_input(parts: Sequence[InputStatistics]) -> InputStatistics:
    return InputStatistics(
        amax=torch.stack([part.amax for part in parts]).amax(dim=0),
        sample=torch.cat([part.sample for part in parts])[:SAMPLE_TOKENS],
        tokens=sum(part.tokens for part in parts),
    )


def coverage(statistics: Statistics, specs: Iterable[TensorSpec]) -> tuple[int, ...]:
    """Tokens that reached each routed expert, in the order of the experts; empty when dense."""
    gates = [spec.module for spec in specs if spec.expert is not None and spec.role == "gate_proj"]
    return tuple(statistics[name].tokens if name in statistics else 0 for name in gates)

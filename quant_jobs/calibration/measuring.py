"""Statistics of the inputs of one layer's linears, attention and MLP. Quantizes nothing.

    observe_attention   statistics of the attention's inputs on one calibration block
    LayerInputs         accumulates them over all blocks; computes those of the MLP inputs

Only `LayerInputs` knows on which tokens a linear is measured: every token for attention, shared
expert and dense MLP; for a routed expert those of the recipe's policy (`ExpertCoverage`: the tokens
routed to it; all; or those routed to it and a few of each block). The input of `down_proj` is
computed with the *original* gate and up. Called by `workers/original.py` with the blocks of all
workers; a search that needs only statistics may pass its own blocks.

Memory: the MLP inputs of all blocks, until `release`, and the statistics over all tokens. Other
statistics belong to the caller, who frees their Gram matrix (`InputStatistics.take_gram`).

D hidden size · I intermediate size · T tokens of one block · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.inventory import MLP_READERS
from deepseek.recipe import ExpertCoverage
from quant_jobs.calibration.forward import Rotary, Routed, Trunk, hidden, tokens_of
from quant_jobs.calibration.statistics import (
    SAMPLE_TOKENS,
    Accumulator,
    InputShare,
    InputStatistics,
    observe,
    rows_per_block,
    spread,
)


def observe_attention(
    trunk: Trunk,
    rotary: Rotary,
    x_TD: Tensor,
    *,
    block: int,
    num_blocks: int,
    inputs: Sequence[str],
    wants_rows: Callable[[str], bool],
) -> tuple[Routed, dict[str, InputShare]]:
    """Run one calibration block x f32 [T, D] through the original attention. Returns the MLP input,
    and the statistics of each of `inputs` (`LinearInput.name`). `wants_rows(name)` says whether
    they include the rows, for a Gram matrix.

    Raises:
        CheckpointError: an activation is not finite.
    """
    num_rows = rows_per_block(SAMPLE_TOKENS, num_blocks)
    shares: dict[str, InputShare] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        def add_share(x: Tensor) -> None:
            share = observe(x.flatten(0, -2), num_rows, keep_rows=wants_rows(name))
            share.check_finite(name, block)  # here, so that the error names the first such input
            shares[name] = share

        return add_share

    for name in inputs:
        trunk.watch(name, observer(name))
    _, routed = trunk.attend(rotary, x_TD)
    return routed, shares


@dataclass(frozen=True, slots=True)
class MlpInput:
    """The input of one MLP. `statistics` is of the input of gate and up, None if no token is
    measured; `routed_tokens` is the number of tokens that the router sent; `is_starved`: too few
    for an algorithm that needs statistics. `expert` is None for a shared expert or a dense MLP."""

    mlp: str
    expert: int | None
    statistics: InputStatistics | None
    routed_tokens: int
    is_starved: bool


class LayerInputs:
    """Accumulates the input statistics of one layer's linears over calibration blocks.

    `weight(module)` returns the original weight f32 [N, K]; `wants_gram(name)` says whether the
    Gram matrix of an input (`LinearInput.name`) is needed. Blocks must come in ascending order, so
    that the sums do not depend on the number of workers.
    """

    def __init__(
        self,
        layer: int,
        coverage: ExpertCoverage,
        num_blocks: int,
        *,
        weight: Callable[[str], Tensor],
        wants_gram: Callable[[str], bool],
    ) -> None:
        self._layer, self._coverage = layer, coverage
        self._weight, self._wants_gram = weight, wants_gram
        self._num_rows = rows_per_block(SAMPLE_TOKENS, num_blocks)
        self._num_shrink = rows_per_block(coverage.shrink_tokens, num_blocks)
        self._attention: dict[str, Accumulator] = {}
        self._blocks: Sequence[tuple[int, Routed]] = ()
        self._all_tokens: InputStatistics | None = None

    # --- input ---

    def add_attention(self, name: str, block: int, share: InputShare) -> None:
        """Add one block's statistics of the attention input `name`.

        Raises:
            CheckpointError: an activation is not finite.
        """
        if name not in self._attention:
            self._attention[name] = Accumulator(name, gram=self._wants_gram(name))
        self._attention[name].add(block, share)

    def set_mlp_blocks(self, blocks: Sequence[tuple[int, Routed]]) -> None:
        """Set the MLP inputs of all blocks, in ascending block order."""
        self._blocks = blocks

    def release(self) -> None:
        """Free the MLP inputs and all statistics, once the layer is solved."""
        self._attention.clear()
        self._blocks, self._all_tokens = (), None

    # --- statistics ---

    def take_attention(self, name: str) -> InputStatistics:
        """Transfer the statistics of the attention input `name` to the caller."""
        statistics = self._attention.pop(name).finish()
        assert statistics is not None, "every token passes the attention"
        return statistics

    def mlp(self, mlp: str, expert: int | None) -> MlpInput:
        """The input of the MLP of this module name: over all tokens, or for a routed `expert` over
        the tokens of the recipe's policy."""
        input_name = f"{mlp}.{MLP_READERS[0][0]}"
        gram = self._wants_gram(input_name)
        routed_tokens = sum(
            len(routed.z) if expert is None else len(tokens_of(routed, expert)[0])
            for _, routed in self._blocks
        )
        if self._measures_all(expert):
            statistics: InputStatistics | None = self.all_tokens(gram=gram)
        else:
            accumulator = Accumulator(input_name, gram=gram)
            for block, routed in self._blocks:
                x = routed.z[self._measured_tokens(routed, expert)]
                if len(x):
                    accumulator.add(block, observe(x, self._num_rows, keep_rows=gram))
            statistics = accumulator.finish()
        # An expert without any token is starved even where the floor is 0.
        floor = max(self._coverage.floor_tokens, 1)
        is_topk = expert is not None and self._coverage.policy == "topk"
        return MlpInput(mlp, expert, statistics, routed_tokens, is_topk and routed_tokens < floor)

    def down(self, mlp: MlpInput) -> InputStatistics | None:
        """Statistics of the input of `down_proj`, computed with the original gate and up; None if
        no token is measured. Every call computes them anew; this object keeps nothing."""
        gate, up = (self._weight(f"{mlp.mlp}.{role}") for role in MLP_READERS[0])
        input_name = f"{mlp.mlp}.{MLP_READERS[1][0]}"
        gram = self._wants_gram(input_name)
        accumulator = Accumulator(input_name, gram=gram)
        for block, routed in self._blocks:
            measures_all = self._measures_all(mlp.expert)
            x = routed.z if measures_all else routed.z[self._measured_tokens(routed, mlp.expert)]
            if len(x):
                share = observe(hidden(x, gate, up), self._num_rows, keep_rows=gram)
                accumulator.add(block, share)
        return accumulator.finish()

    def all_tokens(self, *, gram: bool) -> InputStatistics:
        """Statistics of the MLP input over all tokens. Kept until `release`, because all experts
        may share them."""
        if self._all_tokens is None or (gram and self._all_tokens.gram is None):
            accumulator = Accumulator(f"model.layers.{self._layer}.mlp", gram=gram)
            for block, routed in self._blocks:
                accumulator.add(block, observe(routed.z, self._num_rows, keep_rows=gram))
            self._all_tokens = accumulator.finish()
        assert self._all_tokens is not None
        return self._all_tokens

    def is_shared(self, statistics: InputStatistics) -> bool:
        """Whether all experts share these statistics, whose Gram matrix must then stay intact."""
        return statistics is self._all_tokens and self._coverage.policy == "all"

    def sample(self, expert: int | None) -> Tensor | None:
        """Sampled inputs f32 [R, D] of gate and up, equal to `mlp(...).statistics.sample` without
        computing the rest; None if no token is measured."""
        if self._measures_all(expert):
            return self.all_tokens(gram=False).sample
        rows = []
        for _, routed in self._blocks:
            x = routed.z[self._measured_tokens(routed, expert)]
            rows.append(x[spread(len(x), self._num_rows)])
        sample = torch.cat(rows)[:SAMPLE_TOKENS]
        return sample if len(sample) else None

    def _measures_all(self, expert: int | None) -> bool:
        return expert is None or self._coverage.policy == "all"

    def _measured_tokens(self, routed: Routed, expert: int | None) -> Tensor:
        """The tokens of one block on which an expert is measured, int64 [n]."""
        assert expert is not None
        token, _ = tokens_of(routed, expert)
        if self._coverage.policy != "shrink":
            return token
        return torch.cat([token, spread(len(routed.z), self._num_shrink).to(token.device)])

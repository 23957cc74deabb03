"""Statistics of the inputs of one layer's linears, attention and MLP alike. Quantizes nothing.

    observe_attention   one calibration block through the original attention: what its linears see
    LayerInputs         adds up what all blocks bring; gives the statistics of any linear's input

`LayerInputs` is the one place that knows on which tokens a linear is measured: every token for
attention, shared expert and dense MLP; for a routed expert those of the recipe's policy
(`ExpertCoverage`: those that the router sends, all, or those and a few of everybody's). The input
of `down_proj` follows from the *original* gate and up. Workers feed it what the router sent from
all of them (`workers/original.py`); a search that only wants statistics feeds it its own blocks.

Memory: what enters the MLP, all blocks, and the statistics that were asked for last. A Gram matrix
belongs to whoever asked for the statistics (`InputStatistics.take_gram`).

D hidden size · I intermediate size · T tokens of one block · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """One calibration block x f32 [T, D] through the original attention: what enters the MLP, and
    what each of `inputs` (module names) brings to its statistics. `wants_rows(name)` says whether
    the rows themselves are needed, for a Gram matrix.

    Raises:
        CheckpointError: an activation is not finite.
    """
    num_rows = rows_per_block(SAMPLE_TOKENS, num_blocks)
    shares: dict[str, InputShare] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            share = observe(x.flatten(0, -2), num_rows, keep_rows=wants_rows(name))
            share.check_finite(name, block)  # here, where the first to meet it says so
            shares[name] = share

        return see

    for name in inputs:
        trunk.watch(name, observer(name))
    _, routed = trunk.attend(rotary, x_TD)
    return routed, shares


@dataclass(frozen=True, slots=True)
class MlpInput:
    """What one MLP of the layer sees. `statistics` is of the input of gate and up, None where no
    token is measured; `routed_tokens` counts what the router sent; `is_starved`: too few for an
    algorithm that needs statistics. `expert` is None for a shared expert or a dense MLP."""

    mlp: str
    expert: int | None
    statistics: InputStatistics | None
    routed_tokens: int
    is_starved: bool


class LayerInputs:
    """Adds up what calibration blocks bring to the linears of one layer.

    `weight(module)` is the original weight f32 [N, K]; `wants_gram(name)` says whether the Gram
    matrix of an input is needed (`LinearInput.name`). Blocks come in ascending order, whoever
    computed them, so that no number of workers shows in the sums.
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

    # --- feeding ---

    def add_attention(self, name: str, block: int, share: InputShare) -> None:
        """Add what one block brings to the attention input `name`.

        Raises:
            CheckpointError: an activation is not finite.
        """
        if name not in self._attention:
            self._attention[name] = Accumulator(name, gram=self._wants_gram(name))
        self._attention[name].add(block, share)

    def set_mlp_blocks(self, blocks: Sequence[tuple[int, Routed]]) -> None:
        """Give what enters the MLP, all blocks in ascending order."""
        self._blocks = blocks

    def release(self) -> None:
        """Let go of what entered the MLP and of all statistics: the layer is solved."""
        self._attention.clear()
        self._blocks, self._all_tokens = (), None

    # --- statistics ---

    def take_attention(self, name: str) -> InputStatistics:
        """Statistics of the attention input `name`; its sums are given away with them."""
        statistics = self._attention.pop(name).finish()
        assert statistics is not None, "every token passes the attention"
        return statistics

    def mlp(self, mlp: str, expert: int | None) -> MlpInput:
        """What the MLP of that module name sees: on all tokens, or where `expert` is given on the
        tokens of the recipe's policy."""
        gram = self._wants_gram(f"{mlp}.gate_proj")
        routed_tokens = sum(
            len(routed.z) if expert is None else len(tokens_of(routed, expert)[0])
            for _, routed in self._blocks
        )
        if self._measures_all(expert):
            statistics: InputStatistics | None = self.all_tokens(gram=gram)
        else:
            accumulator = Accumulator(f"{mlp}.gate_proj", gram=gram)
            for block, routed in self._blocks:
                x = routed.z[self._measured_tokens(routed, expert)]
                if len(x):
                    accumulator.add(block, observe(x, self._num_rows, keep_rows=gram))
            statistics = accumulator.finish()
        # Without any token there is nothing to solve on, whatever the floor.
        floor = max(self._coverage.floor_tokens, 1)
        is_topk = expert is not None and self._coverage.policy == "topk"
        return MlpInput(mlp, expert, statistics, routed_tokens, is_topk and routed_tokens < floor)

    def down(self, mlp: MlpInput) -> InputStatistics | None:
        """Statistics of the input of `down_proj`, which is that of the original gate and up; None
        where no token is measured. Computed at every call: nothing of it stays here."""
        gate, up = (self._weight(f"{mlp.mlp}.{role}") for role in ("gate_proj", "up_proj"))
        gram = self._wants_gram(f"{mlp.mlp}.down_proj")
        accumulator = Accumulator(f"{mlp.mlp}.down_proj", gram=gram)
        for block, routed in self._blocks:
            measures_all = self._measures_all(mlp.expert)
            x = routed.z if measures_all else routed.z[self._measured_tokens(routed, mlp.expert)]
            if len(x):
                share = observe(hidden(x, gate, up), self._num_rows, keep_rows=gram)
                accumulator.add(block, share)
        return accumulator.finish()

    def all_tokens(self, *, gram: bool) -> InputStatistics:
        """Statistics of what enters the MLP over all tokens. Kept: every expert may share them."""
        if self._all_tokens is None or (gram and self._all_tokens.gram is None):
            accumulator = Accumulator(f"model.layers.{self._layer}.mlp", gram=gram)
            for block, routed in self._blocks:
                accumulator.add(block, observe(routed.z, self._num_rows, keep_rows=gram))
            self._all_tokens = accumulator.finish()
        assert self._all_tokens is not None
        return self._all_tokens

    def is_shared(self, statistics: InputStatistics) -> bool:
        """Whether all experts share these statistics, so that nobody may use their Gram up."""
        return statistics is self._all_tokens and self._coverage.policy == "all"

    def sample(self, mlp: str, expert: int | None) -> Tensor | None:
        """Sampled inputs f32 [R, D] of gate and up, as `mlp(...).statistics` has them, without the
        rest of the statistics; None where no token is measured."""
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
        """The tokens of one block that an expert is measured on, int64 [n]."""
        assert expert is not None
        token, _ = tokens_of(routed, expert)
        if self._coverage.policy != "shrink":
            return token
        return torch.cat([token, spread(len(routed.z), self._num_shrink).to(token.device)])

"""The steps of one layer, in their order, on a pool of workers.

    read      every worker its own experts, one the trunk; the next layer's while this one runs
    attend    everybody's blocks through the original attention; each linear's owner adds up
    agree     the one scale that router, shared and all routed experts have in common
    solve     every worker its own units
    write     one worker the layer's file, while the next layer is read and attended
    carry     everybody's blocks through the quantized layer: attention here, experts at their
              owners, sums in the order of the experts

Tensors go from worker to worker through the object store; what passes through this process is
small. Blocks go in waves, so that what is under way is bounded. Nothing here depends on how many
workers there are: owners add up in block order, sums over modules run in the order of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint import join_digests
from deepseek.config import ModelConfig
from deepseek.inventory import linears
from deepseek.recipe import Recipe, Scheme
from quant_jobs.awq import candidate_scales, note_fallbacks
from quant_jobs.calibrate import InputStatistics
from quant_jobs.folding import FoldingSet, Smoothing, Wanted, foldable, wanted_sets
from quant_jobs.input_scales import agree
from quant_jobs.ledger import Ledger
from quant_jobs.messages import Account
from quant_jobs.pool import WorkerPool
from quant_jobs.smoothquant import smoothing_scale
from quant_jobs.units import share_out, trunk_reader

#: Tokens that are between workers at a time.
WAVE_TOKENS = 1 << 16


@dataclass(slots=True)
class Solution:
    """One solved layer. `parts` are references to packed tensors by full name, for the writer;
    `trunk`, of those, what every worker needs to go on, `kept` norms and router."""

    account: Account
    source_sha256: str
    input_scales: dict[str, float]
    kept: Any
    trunk: list[Any]
    parts: list[Any]


class LayerRun:
    """Runs layers on a pool whose workers hold `num_blocks` blocks, dealt out in turn."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        pool: WorkerPool,
    ) -> None:
        self._config, self._recipe, self._schemes, self._pool = config, recipe, schemes, pool
        settings = recipe.calibration
        self._blocks = range(settings.num_blocks)
        self._per_wave = max(WAVE_TOKENS // settings.block_tokens, 1)

    def blocks_of(self, index: int) -> range:
        """The blocks that a worker holds."""
        return self._blocks[index :: len(self._pool)]

    def prefetch(self, layer: int) -> None:
        """Have everybody begin to read a layer; returns at once."""
        shares = share_out(self._config, layer, len(self._pool))
        reader = trunk_reader(layer, len(self._pool))
        self._pool.submit(lambda worker, i: worker.prefetch.remote(layer, shares[i], i == reader))

    def attend(self, layer: int, following: int | None) -> list[Any]:
        """Statistics of the attention, and references to what enters the MLP."""
        self.prefetch(layer)
        reader = trunk_reader(layer, len(self._pool))
        (trunk,) = self._pool.submit(lambda worker, _: worker.trunk.remote(layer), [reader])
        routed: list[Any] = []
        for wave in self._waves():
            sent = self._attend_wave(layer, trunk, wave)
            if following is not None:
                self.prefetch(following)
                following = None
            routed += [blocks for blocks, _ in sent]
            self._observe_wave(layer, [share for _, share in sent])
        return routed

    def _attend_wave(self, layer: int, trunk: Any, wave: list[list[int]]) -> list[Any]:
        return self._pool.submit(lambda worker, i: worker.attend.remote(layer, trunk, wave[i]))

    def _observe_wave(self, layer: int, shares: list[Any]) -> None:
        self._pool.each(lambda worker, _: worker.observe.remote(layer, *shares))

    def agree(self, layer: int, routed: list[Any], ledger: Ledger) -> Smoothing:
        """The vector of the set that the router's norm feeds, if the recipe wants one."""
        shared = Smoothing()
        for one, how in wanted_sets(self._config, self._schemes, layer):
            if one.router is not None:
                shared.add(one, self._shared_scale(layer, one, how, routed, ledger))
        return shared

    def _shared_scale(
        self, layer: int, one: FoldingSet, how: Wanted, routed: list[Any], ledger: Ledger
    ) -> Tensor:
        answers = self._pool.each(lambda worker, _: worker.weigh.remote(layer, *routed))
        brought: dict[str, tuple[Tensor, int]] = {}
        measured: InputStatistics | None = None
        for weights, seen in answers:
            brought |= weights
            measured = seen or measured
        assert measured is not None
        ordered = [brought[module] for module in one.consumers]
        if how.strength is not None:
            amax_w = torch.stack([amax for amax, _ in ordered]).amax(dim=0)
            return smoothing_scale(measured.amax, amax_w, how.strength, one.measured, layer, ledger)
        total = torch.stack([each for each, _ in ordered]).sum(dim=0)
        mean_w = (total / sum(count for _, count in ordered)).float()
        candidates = foldable(candidate_scales(measured.mean_abs, mean_w), None, True)
        losses: dict[str, Tensor] = {}
        for found in self._pool.each(
            lambda worker, _: worker.lose.remote(layer, candidates, *routed)
        ):
            losses |= found
        whole = torch.stack([losses[m] for m in one.consumers if m in losses]).sum(dim=0)
        scale = candidates[int(whole.argmin())]
        note_fallbacks(scale, measured.mean_abs, one.measured, layer, ledger)
        return scale

    def solve(self, layer: int, shared: Smoothing, routed: list[Any], ledger: Ledger) -> Solution:
        """Every unit quantized and packed, in the object store."""
        given = self._pool.share(shared)
        sent = self._pool.submit(lambda worker, _: worker.solve.remote(layer, given, *routed))
        accounts = self._pool.each(lambda _, i: sent[i][2])
        whole = _join(accounts, shared)
        ledger.extend(whole.fallbacks)
        (kept,) = self._pool.submit(
            lambda worker, _: worker.keep.remote(layer, whole.smoothing), [0]
        )
        scales = self._input_scales(layer, whole, ledger)
        whole.fallbacks = ledger.entries()
        extra = {f"{module}.input_scale": torch.tensor([scale]) for module, scale in scales.items()}
        trunk = [part for part, _, _ in sent]
        parts = [kept, self._pool.share(extra), *trunk, *(experts for _, experts, _ in sent)]
        digest = join_digests(whole.source_digests)
        return Solution(whole, digest, scales, kept, trunk, parts)

    def _input_scales(self, layer: int, account: Account, ledger: Ledger) -> dict[str, float]:
        wanted = [
            spec.module
            for spec in linears(self._config, layer)
            if self._schemes[spec.module].activations == "fp8"
        ]
        if not wanted:
            return {}
        scales, fallbacks = agree(
            {module: account.input_amax[module] for module in wanted},
            {module: account.tokens[module] for module in wanted},
        )
        ledger.extend(fallbacks)
        return scales

    def write(self, layer: int, solution: Solution) -> Any:
        """Have one worker, each in its turn, publish the layer; a reference to its record."""
        (record,) = self._pool.submit(
            lambda worker, _: worker.write.remote(
                layer, solution.source_sha256, solution.account.errors, *solution.parts
            ),
            [layer % len(self._pool)],
        )
        return record

    def adopt(self, layer: int, solution: Solution) -> None:
        """The layer just solved takes the place of the original."""
        self._pool.each(
            lambda worker, _: worker.adopt.remote(
                layer, solution.input_scales, solution.kept, *solution.trunk
            )
        )

    def restore(self, layer: int, published: Path) -> None:
        """`adopt`, from the layer's file."""
        shares = share_out(self._config, layer, len(self._pool))
        self._pool.each(lambda worker, i: worker.restore.remote(layer, published, shares[i]))

    def carry(self, layer: int, files: Sequence[Path]) -> None:
        """Everybody's blocks through the quantized layer, and stored, each worker's in its file."""
        for wave in self._waves():
            self._carry_wave(layer, wave)
        self._pool.each(lambda worker, i: worker.store.remote(layer, files[i]))

    def _carry_wave(self, layer: int, wave: list[list[int]]) -> None:
        pool = self._pool
        routed = pool.submit(lambda worker, i: worker.reattend.remote(layer, wave[i]))
        parts: list[Any] = []
        if self._config.is_moe(layer):
            parts = pool.submit(lambda worker, _: worker.run_experts.remote(layer, *routed))
        pool.each(lambda worker, i: worker.combine.remote(layer, wave[i], *parts))

    def _waves(self) -> list[list[list[int]]]:
        """wave -> worker -> its blocks in it; waves follow each other in block order."""
        waves = []
        for first in range(0, len(self._blocks), self._per_wave):
            wave = self._blocks[first : first + self._per_wave]
            waves.append(
                [
                    [block for block in self.blocks_of(index) if block in wave]
                    for index in range(len(self._pool))
                ]
            )
        return waves


def _join(accounts: Sequence[Account], shared: Smoothing) -> Account:
    whole = Account(smoothing=Smoothing(dict(shared.columns), dict(shared.rows)))
    ledger = Ledger()
    for one in accounts:
        whole.errors |= one.errors
        whole.tokens |= one.tokens
        whole.input_amax |= one.input_amax
        whole.source_digests |= one.source_digests
        whole.smoothing.rows |= one.smoothing.rows
        if one.kv_latent_amax is not None:
            whole.kv_latent_amax = one.kv_latent_amax
        ledger.extend(one.fallbacks)
    whole.fallbacks = ledger.entries()
    return whole

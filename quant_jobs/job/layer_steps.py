"""The steps of one layer, in their order, on a pool of workers.

    read      every worker its own experts, one the trunk; the next layer's while this one runs
    attend    everybody's blocks through the original attention; each linear's owner adds up;
              every worker receives what enters the MLP
    smooth    the one scale that router, shared and all routed experts have in common
    solve     every worker its own units
    write     one worker the layer's file, while the next layer is read and attended
    carry     everybody's blocks through the quantized layer: attention here, experts at their
              owners, sums in the order of the experts
    store     what comes out, wave by wave beside the next wave and the next layer

Tensors go from worker to worker through the object store; what passes through this process is
small. What an expert makes of a token, and the rows that GPTQ needs of the attention's inputs, go
to the node that waits for them and to no other. Blocks go in waves, two of them under way at a
time, so that memory is bounded and nobody waits for the slowest of a wave. Nothing here depends on
how many workers or nodes there are: owners add up in block order, sums over modules run in the
order of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.inventory import linears
from deepseek.recipe import Recipe, Scheme
from deepseek.source.checkpoint import join_digests
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, Smoothing, scaled_groups
from quant_jobs.algorithms.input_scales import share_input_scales
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.scaling import WeightStatistics, choose_scale
from quant_jobs.calibration.units import WAVE_BLOCKS, WAVE_TOKENS, share_out, trunk_reader
from quant_jobs.workers.boundary import boundary_files
from quant_jobs.workers.messages import SolveSummary
from quant_jobs.workers.protocol import Workers


@dataclass(slots=True)
class Solution:
    """One solved layer. `pieces` are references to packed tensors by full name, for the writer;
    among them `trunk`, which every worker needs to go on, and `norms`, which are norms and
    router."""

    summary: SolveSummary
    source_sha256: str
    input_scales: dict[str, float]
    norms: Any
    trunk: list[Any]
    pieces: list[Any]


class LayerSteps:
    """The steps of a layer on a pool whose workers hold `num_blocks` blocks, dealt out in turn."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        pool: Workers,
        wave_blocks: int | None = None,
    ) -> None:
        self._config, self._recipe, self._schemes, self._pool = config, recipe, schemes, pool
        settings = recipe.calibration
        self._blocks = range(settings.num_blocks)
        self._wave_blocks = wave_blocks
        self._min_wave_blocks = max(WAVE_TOKENS // settings.block_tokens, 1)

    def blocks_of(self, index: int) -> range:
        """The blocks that a worker holds."""
        return self._blocks[index :: len(self._pool)]

    def prefetch(self, layer: int) -> None:
        """Have everybody begin to read a layer; returns at once."""
        shares = share_out(self._config, layer, len(self._pool))
        reader = trunk_reader(layer, len(self._pool))
        self._pool.submit(lambda worker, i: worker.prefetch.remote(layer, shares[i], i == reader))

    def attend(self, layer: int, following: int | None) -> list[Any]:
        """Statistics of the attention; references, by worker, to its having received what enters
        the MLP from all blocks. Begins to read the layer `following`."""
        self.prefetch(layer)
        reader = trunk_reader(layer, len(self._pool))
        (trunk,) = self._pool.submit(lambda worker, _: worker.trunk.remote(layer), [reader])
        waves = self._waves()
        sent = [self._attend_wave(layer, trunk, waves[0])]
        if following is not None:
            self.prefetch(following)
        routed: list[Any] = []
        observed: list[Any] = []
        for number in range(len(waves)):
            if number + 1 < len(waves):
                sent.append(self._attend_wave(layer, trunk, waves[number + 1]))
            routed += [blocks for blocks, *_ in sent[number]]
            shares = [by_node for _, *by_node in sent[number]]
            sent[number] = []  # the object store may forget them
            self._pool.gather(observed)  # of the wave before
            observed = self._observe_wave(layer, shares)
        self._pool.gather(observed)
        return self._pool.submit(lambda worker, _: worker.receive.remote(layer, *routed))

    def _attend_wave(self, layer: int, trunk: Any, wave: list[list[int]]) -> list[Any]:
        inputs = self._inputs_by_node(layer)
        return self._pool.submit(
            lambda worker, i: worker.attend.options(num_returns=1 + len(inputs)).remote(
                layer, trunk, wave[i], inputs
            )
        )

    def _inputs_by_node(self, layer: int) -> list[tuple[str, ...]]:
        """node -> the inputs of the attention whose statistics are added up there."""
        shares = share_out(self._config, layer, len(self._pool))
        return [
            tuple(
                linear_input.name
                for index in members
                for unit in shares[index]
                if unit.kind == "attention"
                for linear_input in unit.inputs
            )
            for members in self._workers_by_node()
        ]

    def _observe_wave(self, layer: int, shares: list[list[Any]]) -> list[Any]:
        """`shares` by worker that sent them, then by node that they are for."""
        nodes = self._pool.nodes
        return self._pool.submit(
            lambda worker, i: worker.observe.remote(layer, *(one[nodes[i]] for one in shares))
        )

    def _workers_by_node(self) -> list[list[int]]:
        """node -> the workers on it."""
        nodes = self._pool.nodes
        return [
            [index for index, node in enumerate(nodes) if node == wanted]
            for wanted in range(max(nodes) + 1)
        ]

    def shared_smoothing(self, layer: int, received: list[Any], ledger: Ledger) -> Smoothing:
        """The scale of the group that the router's norm feeds, if the recipe wants one."""
        shared = Smoothing()
        for group, method in scaled_groups(self._config, self._schemes, layer):
            if group.router is not None:
                shared.add(group, self._shared_scale(layer, group, method, received, ledger))
        return shared

    def _shared_scale(
        self,
        layer: int,
        group: FoldingGroup,
        method: ScaleMethod,
        received: list[Any],
        ledger: Ledger,
    ) -> Tensor:
        brought = self._pool.each(
            lambda worker, i: worker.scale_statistics.remote(layer, received[i])
        )
        by_module: dict[str, WeightStatistics] = {}
        for of_worker, _ in brought:
            by_module |= of_worker
        (measured,) = (statistics for _, statistics in brought if statistics is not None)

        def losses_of(candidates: Tensor) -> list[Tensor]:
            losses: dict[str, Tensor] = {}
            for of_worker in self._pool.each(
                lambda worker, _: worker.scale_losses.remote(layer, candidates)
            ):
                losses |= of_worker
            return [losses[module] for module in group.consumers if module in losses]

        return choose_scale(
            group,
            method,
            [by_module[module] for module in group.consumers],
            amax=measured.amax,
            mean_abs=measured.mean_abs,
            divided=None,
            losses_of=losses_of,
            layer=layer,
            ledger=ledger,
        )

    def solve(self, layer: int, shared: Smoothing, received: list[Any], ledger: Ledger) -> Solution:
        """Every unit quantized and packed, in the object store."""
        given = self._pool.share(shared)
        sent = self._pool.submit(lambda worker, i: worker.solve.remote(layer, given, received[i]))
        summaries = self._pool.each(lambda _, i: sent[i][2])
        whole = _merge(summaries, shared)
        ledger.extend(whole.fallbacks)
        (norms,) = self._pool.submit(
            lambda worker, _: worker.folded_norms.remote(layer, whole.smoothing), [0]
        )
        scales = self._input_scales(layer, whole, ledger)
        whole.fallbacks = ledger.entries()
        extra = {f"{module}.input_scale": torch.tensor([scale]) for module, scale in scales.items()}
        trunk = [tensors for tensors, _, _ in sent]
        pieces = [norms, self._pool.share(extra), *trunk, *(experts for _, experts, _ in sent)]
        digest = join_digests(whole.source_digests)
        return Solution(whole, digest, scales, norms, trunk, pieces)

    def _input_scales(self, layer: int, summary: SolveSummary, ledger: Ledger) -> dict[str, float]:
        wanted = [
            spec.module
            for spec in linears(self._config, layer)
            if self._schemes[spec.module].activations == "fp8"
        ]
        if not wanted:
            return {}
        scales, fallbacks = share_input_scales(
            {module: summary.input_amax[module] for module in wanted},
            {module: summary.tokens[module] for module in wanted},
        )
        ledger.extend(fallbacks)
        return scales

    def write(self, layer: int, solution: Solution) -> Any:
        """Have one worker, each in its turn, publish the layer; a reference to its record."""
        (record,) = self._pool.submit(
            lambda worker, _: worker.write.remote(
                layer, solution.source_sha256, solution.summary.errors, *solution.pieces
            ),
            [layer % len(self._pool)],
        )
        return record

    def use_solved(self, layer: int, solution: Solution) -> None:
        """The layer just solved takes the place of the original."""
        self._pool.each(
            lambda worker, _: worker.use_solved.remote(
                layer, solution.input_scales, solution.norms, *solution.trunk
            )
        )

    def use_published(self, layer: int, published: Path) -> None:
        """`use_solved`, from the layer's file."""
        shares = share_out(self._config, layer, len(self._pool))
        self._pool.each(lambda worker, i: worker.use_published.remote(layer, published, shares[i]))

    def carry(self, layer: int, folder: Path, stored: list[Any]) -> None:
        """Everybody's blocks through the quantized layer. What comes out is stored in `folder`, a
        file for each worker and wave, beside whatever workers do next: references to those who
        store are added to `stored`."""
        pool, waves = self._pool, self._waves()
        # A worker does what it is told in that order: the attention of later waves fills the time
        # in which it would wait for others' experts.
        routed = [self._attend_quantized_wave(layer, wave) for wave in waves[:2]]
        before: list[Any] = []
        for number, wave in enumerate(waves):
            parts = self._expert_wave(layer, wave, routed[number])
            routed[number] = []  # the object store may forget them
            if number + 2 < len(waves):
                routed.append(self._attend_quantized_wave(layer, waves[number + 2]))
            combined = self._combine_wave(layer, wave, parts)
            stored += self._store_wave(layer + 1, wave, folder, number, combined)
            del parts
            pool.gather(before)
            before = combined
        pool.gather(before)
        pool.each(lambda worker, _: worker.advance.remote(layer))

    def _attend_quantized_wave(self, layer: int, wave: list[list[int]]) -> list[Any]:
        return self._pool.submit(lambda worker, i: worker.attend_quantized.remote(layer, wave[i]))

    def _expert_wave(self, layer: int, wave: list[list[int]], routed: list[Any]) -> list[list[Any]]:
        """What everybody's experts make of a wave, by worker, then by the node that it is for."""
        if not self._config.is_moe(layer):
            return []
        homes = [
            [b for index in members for b in wave[index]] for members in self._workers_by_node()
        ]
        parts = self._pool.submit(
            lambda worker, _: worker.run_experts.options(num_returns=len(homes)).remote(
                layer, homes, *routed
            )
        )
        return parts if len(homes) > 1 else [[one] for one in parts]

    def _combine_wave(self, layer: int, wave: list[list[int]], parts: list[list[Any]]) -> list[Any]:
        nodes = self._pool.nodes
        return self._pool.submit(
            lambda worker, i: worker.combine.remote(
                layer, wave[i], *(one[nodes[i]] for one in parts)
            )
        )

    def _store_wave(
        self, layer: int, wave: list[list[int]], folder: Path, number: int, combined: list[Any]
    ) -> list[Any]:
        files = boundary_files(folder, len(self._pool), number)
        return self._pool.submit(
            lambda worker, i: worker.store.remote(layer, wave[i], files[i], combined[i])
        )

    def _waves(self) -> list[list[list[int]]]:
        """wave -> worker -> its blocks in it; waves follow each other in block order."""
        waves = []
        size = self._wave_blocks or max(self._min_wave_blocks, WAVE_BLOCKS * len(self._pool))
        for first in range(0, len(self._blocks), size):
            wave = self._blocks[first : first + size]
            waves.append(
                [
                    [block for block in self.blocks_of(index) if block in wave]
                    for index in range(len(self._pool))
                ]
            )
        return waves


def _merge(summaries: Sequence[SolveSummary], shared: Smoothing) -> SolveSummary:
    """What all workers' solving of a layer amounts to."""
    whole = SolveSummary(smoothing=Smoothing(dict(shared.columns), dict(shared.rows)))
    ledger = Ledger()
    for summary in summaries:
        whole.errors |= summary.errors
        whole.tokens |= summary.tokens
        whole.input_amax |= summary.input_amax
        whole.source_digests |= summary.source_digests
        whole.smoothing.rows |= summary.smoothing.rows
        if summary.kv_latent_amax is not None:
            whole.kv_latent_amax = summary.kv_latent_amax
        ledger.extend(summary.fallbacks)
    whole.fallbacks = ledger.entries()
    return whole

"""The steps of one layer on a pool of workers. Orders calls; computes nothing but the shared scale.

    read      each worker reads its own experts, one worker the trunk; layer N+1 while N runs
    attend    each worker runs its blocks through the original attention; the owner of a linear
              accumulates its statistics; every worker receives the MLP inputs of all blocks
    smooth    choose the scale that router, shared expert and all routed experts share
    solve     each worker quantizes its own units
    write     one worker writes the layer's file, while the next layer is read and attended
    carry     each worker runs its blocks through the quantized layer: attention locally, experts
              on their owners, outputs added in the order of the experts
    store     each worker stores its outputs, one file per wave, while others run
    head      behind the last layer, where the recipe quantizes the head: one worker accumulates the
              statistics of its input, quantizes it and writes the file of the globals

Called by `driver.py`, which also decides when a layer counts as published. Tensors go from worker
to worker through the object store; only small values pass through the driver. Expert outputs, and
the rows of attention inputs that GPTQ needs, go only to the node that uses them. Blocks go in
waves, two in flight at a time, which bounds memory and hides the slowest worker of a wave. Results
depend on neither the number of workers nor of nodes: owners add up in block order, and sums over
modules run in the order of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerRecord
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
    """One solved layer. `pieces` are references to all packed tensors by full name, for the writer.
    They include `trunk`, which every worker needs for `use_solved`, and `norms` (norms and router).
    The object store frees the tensors with the last reference."""

    summary: SolveSummary
    source_sha256: str
    input_scales: dict[str, float]
    norms: Any
    trunk: list[Any]
    pieces: list[Any]


class LayerSteps:
    """The steps of a layer on a pool whose workers hold the calibration blocks round-robin."""

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
        """The calibration blocks that a worker holds."""
        return self._blocks[index :: len(self._pool)]

    def prefetch(self, layer: int) -> None:
        """Start reading a layer on all workers; returns at once."""
        shares = share_out(self._config, layer, len(self._pool))
        reader = trunk_reader(layer, len(self._pool))
        self._pool.submit(lambda worker, i: worker.prefetch.remote(layer, shares[i], i == reader))

    def attend(self, layer: int, following: int | None) -> list[Any]:
        """Accumulate the attention's input statistics and send the MLP inputs of all blocks to all
        workers. Starts reading the layer `following`.

        Returns one reference per worker, which resolves once it has received the MLP inputs.
        """
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
            sent[number] = []  # frees them in the object store
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
        """By node, the names of the attention inputs whose statistics are accumulated there."""
        shares = share_out(self._config, layer, len(self._pool))
        return [
            tuple(
                linear_input.name
                for index in workers
                for unit in shares[index]
                if unit.kind == "attention"
                for linear_input in unit.inputs
            )
            for workers in self._workers_by_node()
        ]

    def _observe_wave(self, layer: int, shares: list[list[Any]]) -> list[Any]:
        """`shares` by worker that sent them, then by node that they are for."""
        nodes = self._pool.nodes
        return self._pool.submit(
            lambda worker, i: worker.observe.remote(
                layer, *(by_node[nodes[i]] for by_node in shares)
            )
        )

    def _workers_by_node(self) -> list[list[int]]:
        """The indices of the workers on each node, by node."""
        nodes = self._pool.nodes
        return [
            [index for index, worker_node in enumerate(nodes) if worker_node == node]
            for node in range(max(nodes) + 1)
        ]

    def shared_smoothing(self, layer: int, received: list[Any], ledger: Ledger) -> Smoothing:
        """The smoothing scale of the group that reads the router's norm, if the recipe has one.
        `received` are the references that `attend` returned."""
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
        answers = self._pool.each(
            lambda worker, i: worker.scale_statistics.remote(layer, received[i])
        )
        by_module: dict[str, WeightStatistics] = {}
        for weight_statistics, _, _ in answers:
            by_module |= weight_statistics
        (measured,) = (statistics for _, statistics, _ in answers if statistics is not None)
        silent = answers[0][2]  # the same of every worker

        def losses_of(candidates: Tensor) -> list[Tensor]:
            losses: dict[str, Tensor] = {}
            for worker_losses in self._pool.each(
                lambda worker, _: worker.scale_losses.remote(layer, candidates)
            ):
                losses |= worker_losses
            return [losses[module] for module in group.consumers if module in losses]

        return choose_scale(
            group,
            method,
            [by_module[module] for module in group.consumers],
            amax=measured.amax,
            mean_abs=measured.mean_abs,
            divided=None,
            silent=lambda: silent,
            losses_of=losses_of,
            layer=layer,
            ledger=ledger,
        )

    def solve(self, layer: int, shared: Smoothing, received: list[Any], ledger: Ledger) -> Solution:
        """Quantize and pack every unit. The tensors stay in the object store.

        Raises:
            CheckpointError: a weight cannot be represented, or an activation is not finite.
            WorkersLost: a worker died.
        """
        smoothing = self._pool.share(shared)
        answers = self._pool.submit(
            lambda worker, i: worker.solve.remote(layer, smoothing, received[i])
        )
        summaries = self._pool.each(lambda _, i: answers[i][2])
        whole = _merge(summaries, shared)
        ledger.extend(whole.fallbacks)
        (norms,) = self._pool.submit(
            lambda worker, _: worker.folded_norms.remote(layer, whole.smoothing), [0]
        )
        scales = self._input_scales(layer, whole, ledger)
        whole.fallbacks = ledger.entries()
        extra = {f"{module}.input_scale": torch.tensor([scale]) for module, scale in scales.items()}
        trunk = [tensors for tensors, _, _ in answers]
        pieces = [norms, self._pool.share(extra), *trunk, *(experts for _, experts, _ in answers)]
        digest = join_digests(whole.source_digests)
        return Solution(whole, digest, scales, norms, trunk, pieces)

    def _input_scales(self, layer: int, summary: SolveSummary, ledger: Ledger) -> dict[str, float]:
        """Static FP8 input scales by module; empty where no linear has one."""
        modules = [
            spec.module
            for spec in linears(self._config, layer)
            if self._schemes[spec.module].activations == "fp8"
        ]
        if not modules:
            return {}
        scales, fallbacks = share_input_scales(
            {module: summary.input_amax[module] for module in modules},
            {module: summary.tokens[module] for module in modules},
        )
        ledger.extend(note for note in fallbacks if note.module not in summary.computing_zero)
        return scales

    def write(self, layer: int, solution: Solution) -> Any:
        """Start writing the layer's file on one worker; workers take turns. Returns a reference to
        the file's LayerRecord."""
        (record,) = self._pool.submit(
            lambda worker, _: worker.write.remote(
                layer, solution.source_sha256, solution.summary.errors, *solution.pieces
            ),
            [layer % len(self._pool)],
        )
        return record

    def use_solved(self, layer: int, solution: Solution) -> None:
        """Replace the original layer by the solved one on all workers."""
        self._pool.each(
            lambda worker, _: worker.use_solved.remote(
                layer, solution.input_scales, solution.norms, *solution.trunk
            )
        )

    def use_published(self, layer: int, published: Path) -> None:
        """Replace the original layer by the one in the file `published` on all workers."""
        shares = share_out(self._config, layer, len(self._pool))
        self._pool.each(lambda worker, i: worker.use_published.remote(layer, published, shares[i]))

    def carry(self, layer: int, folder: Path, stored: list[Any]) -> None:
        """Run all blocks through the quantized layer, whose outputs become the workers' inputs.

        Workers store the outputs in `folder`, one file per worker and wave, while they compute
        further. References to these calls are appended to `stored`.
        """

        def store(number: int, wave: list[list[int]], combined: list[Any]) -> None:
            stored.extend(self._store_wave(layer + 1, wave, folder, number, combined))

        self._run_waves(layer, store)
        self._pool.each(lambda worker, _: worker.advance.remote(layer))

    def solve_head(self) -> tuple[LayerRecord, SolveSummary]:
        """Quantize the head by the outputs of the last layer, which the workers hold, and publish
        the tensors outside the layers. Two waves are in flight at a time.

        Raises:
            CheckpointError: the weight cannot be represented, or an activation is not finite.
            WorkersLost: a worker died.
        """
        owner = [trunk_reader(self._config.num_hidden_layers, len(self._pool))]
        self._pool.each(lambda worker, _: worker.begin_head.remote(), owner)
        before: list[Any] = []
        for wave in self._waves():
            shares = self._head_wave(wave)
            self._pool.gather(before)
            before = self._observe_head_wave(shares, owner)
        self._pool.gather(before)
        (solved,) = self._pool.each(lambda worker, _: worker.write_head.remote(), owner)
        return cast("tuple[LayerRecord, SolveSummary]", solved)

    def _head_wave(self, wave: list[list[int]]) -> list[Any]:
        return self._pool.submit(lambda worker, i: worker.head_shares.remote(wave[i]))

    def _observe_head_wave(self, shares: list[Any], owner: list[int]) -> list[Any]:
        return self._pool.submit(lambda worker, _: worker.observe_head.remote(*shares), owner)

    def measure(self, layer: int) -> dict[int, tuple[float, float]]:
        """Run all blocks through a layer of a finished artifact, whose outputs become the workers'
        inputs. Returns the largest inputs, of gate and up and of down, of each expert that saw a
        token."""
        shares = share_out(self._config, layer, len(self._pool))
        self._pool.each(lambda worker, i: worker.use_artifact.remote(layer, shares[i]))
        self._run_waves(layer, lambda number, wave, combined: None)
        maxima: dict[int, tuple[float, float]] = {}
        for own in self._pool.each(lambda worker, _: worker.expert_maxima.remote(layer)):
            maxima |= own
        self._pool.each(lambda worker, _: worker.advance.remote(layer))
        return maxima

    def _run_waves(
        self, layer: int, combined_wave: Callable[[int, list[list[int]], list[Any]], None]
    ) -> None:
        """Run all blocks through the quantized layer. Calls `combined_wave(number, wave,
        references)` once the outputs of a wave are being computed."""
        pool, waves = self._pool, self._waves()
        # A worker runs its calls in order: submitting the attention of later waves first fills the
        # time in which it would wait for the experts of other workers.
        routed = [self._attend_quantized_wave(layer, wave) for wave in waves[:2]]
        before: list[Any] = []
        for number, wave in enumerate(waves):
            outputs = self._expert_wave(layer, wave, routed[number])
            routed[number] = []  # frees them in the object store
            if number + 2 < len(waves):
                routed.append(self._attend_quantized_wave(layer, waves[number + 2]))
            combined = self._combine_wave(layer, wave, outputs)
            combined_wave(number, wave, combined)
            del outputs
            pool.gather(before)
            before = combined
        pool.gather(before)

    def _attend_quantized_wave(self, layer: int, wave: list[list[int]]) -> list[Any]:
        return self._pool.submit(lambda worker, i: worker.attend_quantized.remote(layer, wave[i]))

    def _expert_wave(self, layer: int, wave: list[list[int]], routed: list[Any]) -> list[list[Any]]:
        """References to the expert outputs of a wave, by worker, then by destination node; empty
        for a dense layer."""
        if not self._config.is_moe(layer):
            return []
        blocks_by_node = [
            [block for index in workers for block in wave[index]]
            for workers in self._workers_by_node()
        ]
        num_nodes = len(blocks_by_node)
        outputs = self._pool.submit(
            lambda worker, _: worker.run_experts.options(num_returns=num_nodes).remote(
                layer, blocks_by_node, *routed
            )
        )
        return outputs if num_nodes > 1 else [[reference] for reference in outputs]

    def _combine_wave(
        self, layer: int, wave: list[list[int]], outputs: list[list[Any]]
    ) -> list[Any]:
        nodes = self._pool.nodes
        return self._pool.submit(
            lambda worker, i: worker.combine.remote(
                layer, wave[i], *(by_node[nodes[i]] for by_node in outputs)
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
        """The blocks by wave, then by worker; waves follow each other in block order."""
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
    """Merge the summaries of all workers into that of the whole layer."""
    whole = SolveSummary(smoothing=Smoothing(dict(shared.columns), dict(shared.rows)))
    ledger = Ledger()
    for summary in summaries:
        whole.errors |= summary.errors
        whole.tokens |= summary.tokens
        whole.input_amax |= summary.input_amax
        whole.source_digests |= summary.source_digests
        whole.computing_zero |= summary.computing_zero
        whole.smoothing.rows |= summary.smoothing.rows
        if summary.kv_latent_amax is not None:
            whole.kv_latent_amax = summary.kv_latent_amax
        ledger.extend(summary.fallbacks)
    whole.fallbacks = ledger.entries()
    return whole

"""One worker of a quantize job: holds some calibration blocks and owns some units of every layer.

A plain class; `actor.py` makes it a Ray actor, `in_process.py` calls it directly. A worker decides
nothing that depends on other workers; what needs several (a scale that all experts share) is done
by the driver. Per layer, the driver calls (`job/layer_steps.py` has the order and the workers):

    prefetch          start reading the stored bytes of this worker's units        read_ahead.py
    trunk             (one worker) return the trunk, for all workers
    attend            run this worker's blocks through the original attention      original.py
    observe           accumulate statistics of this worker's attention units, from all blocks
    receive           take the MLP inputs of all blocks
    scale_statistics, scale_losses   return what the scale shared by all experts is chosen from
    solve             quantize and pack this worker's units
    folded_norms      (one worker) return norms and router, folded
    write             (one worker) write the layer's file, in the background       files.py
    use_solved        replace the original layer by the quantized one              quantized.py
    use_published     the same, from the layer's file
    attend_quantized, run_experts, combine, advance   run this worker's blocks through it
    store             write its outputs for a resumed run, in the background       files.py

Behind the last layer, where the recipe quantizes the head (`head.py`):

    begin_head        (one worker) forget what was accumulated
    head_shares       return the statistics of the head's input on this worker's blocks
    observe_head      (one worker) accumulate those of all workers
    write_head        (one worker) quantize the head and write the file of the globals

A pass that measures a finished artifact (`job/measure_pass.py`) calls `begin_measuring`, `embed`,
and per layer `use_artifact`, `attend_quantized`, `run_experts`, `combine`, `expert_maxima`,
`advance`; it writes nothing.

Every call may be repeated: a layer is redone when a worker dies in it. The inputs of a layer
therefore stay in memory until `attend` of the next one, which frees them.

Memory: stored bytes of this worker's units of two layers and of one trunk; its packed tensors of
one layer; at most three float32 weights of one MLP and what GPTQ needs for it
(`algorithms/gptq.py`; on a GPU those of a group of experts); the activations of its blocks. Values
from other workers (`Routed`, `ExpertOutputs`) lie in the node's object store, shared by all workers
of the node. On `cuda` only operands are in GPU memory: the trunk as stored, weights in use, the
blocks of a wave, and during solve the MLP inputs of all blocks.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerRecord
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.inventory import NORM, global_tensors
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import CheckpointReader, SourceTensor, join_digests
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.algorithms.linear import modelopt_quantizer
from quant_jobs.algorithms.scaling import WeightStatistics
from quant_jobs.calibration.forward import ExpertOutputsByBlock, Rotary, RoutedBlocks
from quant_jobs.calibration.statistics import InputShare, InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.boundary import load_blocks
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.devices import Device, make_repeatable, use_one_thread
from quant_jobs.workers.files import WorkerFiles
from quant_jobs.workers.head import HeadInput, HeadOwner
from quant_jobs.workers.messages import (
    AttentionShare,
    MeasureJob,
    SolveSummary,
    Tensors,
    WorkerJob,
    WorkerUsage,
)
from quant_jobs.workers.original import OriginalLayer
from quant_jobs.workers.quantized import ExpertMaxima, QuantizedLayer
from quant_jobs.workers.read_ahead import ReadAhead

#: The tensor whose rows are the inputs of layer 0.
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class _Solved:
    """The packed routed experts of a layer that this worker has solved; freed by `advance`."""

    layer: int
    share: Sequence[Unit]
    experts: Tensors


class Worker:
    """See the module. Not thread-safe: one call at a time, and beside it one `write` or `store`.
    `close` ends the reading thread."""

    def __init__(self) -> None:
        use_one_thread()
        # modelopt's import takes seconds; here it is outside the first layer's time.
        modelopt_quantizer(num_bits=8, axis=0)
        self._seconds: dict[str, float] = {}

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        if hasattr(self, "_read_ahead"):
            self._read_ahead.close()
            del self._read_ahead

    def begin(self, job: WorkerJob) -> None:
        """Set up a job, discarding all state of the previous one.

        Raises:
            DeployError: PyTorch cannot use the GPU assigned to this process.
        """
        self.close()
        self._seconds = {}
        self._reader = CheckpointReader(job.model, warn=False)  # the driver has warned
        self._read_ahead = ReadAhead(self._reader, lambda seconds: self._count("read", seconds))
        self._files: WorkerFiles | None = WorkerFiles(job, self._reader)
        self._set_up(self._reader.config, job.recipe, job.num_blocks, job.device)

    def begin_measuring(self, job: MeasureJob) -> None:
        """Set up a pass through a finished artifact, discarding all state of what was before.

        Raises:
            ArtifactError: the artifact is damaged, or not to be seen from this node.
            DeployError: PyTorch cannot use the GPU assigned to this process.
        """
        self.close()
        self._seconds = {}
        self._artifact = ArtifactReader(job.artifact, ignore_input_maxima=True)
        self._files = None
        self._set_up(self._artifact.config, self._artifact.recipe, job.num_blocks, job.device)

    def _set_up(self, config: ModelConfig, recipe: Recipe, num_blocks: int, device: Device) -> None:
        make_repeatable(device)
        self._context = LayerContext(
            config=config,
            recipe=recipe,
            schemes=recipe.resolve(config),
            num_blocks=num_blocks,
            device=torch.device(device),
            rotary=Rotary(config),
        )
        self._inputs: dict[int, dict[int, Tensor]] = {}  # layer -> block -> f32 [T, D]
        self._original: OriginalLayer | None = None
        self._quantized: QuantizedLayer | None = None
        self._maxima: ExpertMaxima | None = None
        self._solved: _Solved | None = None
        self._head: HeadOwner | None = None
        self._head_input: HeadInput | None = None

    def load_boundary(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        """Make these blocks this worker's own, with their inputs of `layer`: embedded from their
        token ids int64 [T] for layer 0, else loaded from the folder `boundary`.

        Raises:
            ArtifactError: a boundary file is damaged.
        """
        with self._timed("load"):
            if layer == 0:
                blocks = {block: self._reader.embed(ids[block]) for block in sorted(ids)}
            else:
                shape = (len(next(iter(ids.values()), ())), self._reader.config.hidden_size)
                blocks = load_blocks(boundary, sorted(ids), shape)
            self._inputs = {layer: blocks}
            self._quantized = None

    def embed(self, ids: Mapping[int, Tensor]) -> None:
        """Make these blocks (token ids int64 [T]) this worker's own, embedded by the artifact.

        Raises:
            ArtifactError: the embedding is damaged.
        """
        with self._timed("load"):
            (table,) = self._artifact.read_some("globals", lambda name: name == EMBEDDING).values()
            self._inputs = {0: {block: table[ids[block]].float() for block in sorted(ids)}}

    # --- reading ---

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        """Start reading this worker's units of a layer, and its trunk if `with_trunk`.

        If the worker already computes on this layer, discards it: the layer is being redone.
        """
        if self._original is not None and self._original.layer == layer:
            self._original = None
        self._read_ahead.prefetch(layer, share, with_trunk)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        """Wait for the stored trunk of a layer, which `prefetch` was asked for."""
        with self._timed("wait"):
            return self._read_ahead.trunk(layer)

    # --- the original layer ---

    def attend(
        self,
        layer: int,
        trunk: Mapping[str, SourceTensor],
        blocks: Sequence[int],
        inputs: Sequence[Sequence[str]],
    ) -> tuple[RoutedBlocks | AttentionShare, ...]:
        """Run some of this worker's blocks through the original attention. Frees the inputs of the
        layer before.

        Returns the MLP inputs, then for each node the statistics of the attention inputs named in
        its entry of `inputs`.
        """
        original = self._open_original(layer, trunk)
        self._inputs = {layer: self._inputs[layer]}
        routed: RoutedBlocks = {}
        shares: AttentionShare = {}
        with self._timed("forward"):
            for block in sorted(blocks):
                routed[block], by_name = original.attend(block, self._inputs[layer][block])
                for name, share in by_name.items():
                    shares.setdefault(name, {})[block] = share
        return routed, *({name: shares.get(name, {}) for name in names} for names in inputs)

    def observe(self, layer: int, *shares: AttentionShare) -> None:
        """See `OriginalLayer.observe`."""
        with self._timed("forward"):
            self._original_of(layer).observe(shares)

    def receive(self, layer: int, *routed: RoutedBlocks) -> None:
        """See `OriginalLayer.receive`."""
        with self._timed("solve"):
            self._original_of(layer).receive(routed)

    def scale_statistics(
        self, layer: int, received: None
    ) -> tuple[dict[str, WeightStatistics], InputStatistics | None, Tensor]:
        """See `OriginalLayer.scale_statistics`. Runs after the call whose result `received` is."""
        with self._timed("solve"):
            return self._original_of(layer).scale_statistics()

    def scale_losses(self, layer: int, candidates: Tensor) -> dict[str, Tensor]:
        """See `OriginalLayer.scale_losses`."""
        with self._timed("solve"):
            return self._original_of(layer).scale_losses(candidates)

    def solve(
        self, layer: int, smoothing: Smoothing, received: None
    ) -> tuple[Tensors, Tensors, SolveSummary]:
        """See `OriginalLayer.solve`. Runs after the call whose result `received` is."""
        with self._timed("solve"):
            original = self._original_of(layer)
            trunk, experts, summary = original.solve(smoothing)
            self._solved = _Solved(layer, original.share, experts)
            return trunk, experts, summary

    def folded_norms(self, layer: int, smoothing: Smoothing) -> Tensors:
        """See `OriginalLayer.folded_norms`."""
        return self._original_of(layer).folded_norms(smoothing)

    def write(
        self, layer: int, source_sha256: str, errors: Mapping[str, float], *pieces: Tensors
    ) -> LayerRecord:
        """Publish a layer's file from the packed tensors of all workers. Runs in the background."""
        assert self._files is not None
        with self._timed("write"):
            return self._files.write_layer(layer, source_sha256, errors, pieces)

    # --- the quantized layer ---

    def use_solved(
        self, layer: int, input_scales: Mapping[str, float], norms: Tensors, *trunk: Tensors
    ) -> None:
        """Replace the original layer, which is freed, by the quantized one: `norms` and `trunk`
        come from all workers, the routed experts are those that this worker has solved."""
        solved = self._solved
        assert solved is not None
        assert solved.layer == layer
        self._original = None
        tensors = dict(norms)
        for piece in trunk:
            tensors |= piece
        self._quantized = QuantizedLayer(
            self._context, layer, solved.share, tensors, solved.experts, input_scales
        )

    def use_published(self, layer: int, published: Path, share: Sequence[Unit]) -> None:
        """Like `use_solved`, for a layer published by an earlier run: everything comes from its
        file, which the driver has verified."""
        with self._timed("load"):
            self._original = None
            self._quantized = QuantizedLayer.load(self._context, layer, share, published)

    def use_artifact(self, layer: int, share: Sequence[Unit]) -> None:
        """Load a layer of the artifact; `run_experts` then notes what enters its experts."""
        with self._timed("load"):
            self._maxima = ExpertMaxima(layer)
            self._quantized = QuantizedLayer.of_artifact(
                self._context, layer, share, self._artifact, self._maxima
            )

    def expert_maxima(self, layer: int) -> dict[int, tuple[float, float]]:
        """See `ExpertMaxima.by_expert`; of the experts of this worker that saw a token."""
        self._quantized_of(layer)
        assert self._maxima is not None
        return self._maxima.by_expert

    def attend_quantized(self, layer: int, blocks: Sequence[int]) -> RoutedBlocks:
        """Run some of this worker's blocks through the quantized attention."""
        quantized = self._quantized_of(layer)
        with self._timed("forward"):
            inputs = self._inputs[layer]
            return {block: quantized.attend(block, inputs[block]) for block in sorted(blocks)}

    def run_experts(
        self, layer: int, blocks_by_node: Sequence[Sequence[int]], *routed: RoutedBlocks
    ) -> list[ExpertOutputsByBlock]:
        """See `QuantizedLayer.run_experts`."""
        with self._timed("forward"):
            return self._quantized_of(layer).run_experts(blocks_by_node, routed)

    def combine(self, layer: int, blocks: Sequence[int], *outputs: ExpertOutputsByBlock) -> None:
        """Compute the layer's outputs for some of this worker's blocks, and buffer them for
        `store`."""
        with self._timed("forward"):
            combined = self._quantized_of(layer).combine(blocks, outputs)
            if self._files is not None:  # a pass that measures stores nothing
                self._files.buffer(layer + 1, combined)

    def store(self, layer: int, blocks: Sequence[int], file: Path, combined: None) -> None:
        """Write the buffered inputs of `layer` for some of this worker's blocks. Runs in the
        background, after the `combine` of these blocks, whose result is `combined`."""
        assert self._files is not None
        with self._timed("write"):
            self._files.store(layer, blocks, file)

    def advance(self, layer: int) -> None:
        """Make the outputs of `layer` the inputs of the next one, and free the quantized layer."""
        self._inputs[layer + 1] = self._quantized_of(layer).outputs
        self._quantized = None
        self._solved = None

    # --- the head ---

    def begin_head(self) -> None:
        """Make this worker the owner of the head, which has seen no block."""
        self._head = HeadOwner.of(self._context)

    def head_shares(self, blocks: Sequence[int]) -> dict[int, InputShare]:
        """Statistics of the head's input on some of this worker's blocks, by block."""
        with self._timed("forward"):
            if self._head_input is None:
                spec = next(s for s in global_tensors(self._context.config) if s.name == NORM)
                norm = self._reader.load([spec])[NORM].data
                self._head_input = HeadInput(self._context, norm)
            inputs = self._inputs[self._context.config.num_hidden_layers]
            return {block: self._head_input.share(block, inputs[block]) for block in sorted(blocks)}

    def observe_head(self, *shares: Mapping[int, InputShare]) -> None:
        """See `HeadOwner.add`."""
        with self._timed("forward"):
            assert self._head is not None
            self._head.add(shares)

    def write_head(self) -> tuple[LayerRecord, SolveSummary]:
        """Quantize the head and publish the tensors outside the layers.

        Raises:
            CheckpointError: the head's weight cannot be represented.
        """
        assert self._head is not None
        assert self._files is not None
        source = self._reader.load(global_tensors(self._context.config))
        with self._timed("solve"):
            tensors, summary = self._head.solve(source)
        self._head = None
        with self._timed("write"):
            digest = join_digests(summary.source_digests)
            record = self._files.write_layer("globals", digest, summary.errors, [tensors])
        return record, summary

    def usage(self) -> WorkerUsage:
        """The resources that this worker used since `begin`."""
        assert self._files is not None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return WorkerUsage(
            os.getpid(),
            socket.gethostname(),
            dict(self._seconds),
            peak,
            self._reader.bytes_read,
            self._files.bytes_written,
        )

    # --- the current layer ---

    def _open_original(self, layer: int, trunk: Mapping[str, SourceTensor]) -> OriginalLayer:
        if self._original is not None and self._original.layer == layer:
            return self._original
        with self._timed("wait"):
            share, experts, digests = self._read_ahead.take(layer)
        source = {**trunk, **experts}
        self._original = OriginalLayer(self._context, layer, share, source, digests)
        return self._original

    def _original_of(self, layer: int) -> OriginalLayer:
        assert self._original is not None
        assert self._original.layer == layer
        return self._original

    def _quantized_of(self, layer: int) -> QuantizedLayer:
        assert self._quantized is not None
        assert self._quantized.layer == layer
        return self._quantized

    def _count(self, step: str, seconds: float) -> None:
        self._seconds[step] = self._seconds.get(step, 0.0) + seconds

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._count(step, time.monotonic() - begun)

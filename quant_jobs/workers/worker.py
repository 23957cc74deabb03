"""One worker of a quantize job: holds some calibration blocks, and owns some units of every layer.

A plain class; `pool.py` makes Ray actors of it, `in_process.py` calls it directly. A worker decides
nothing that depends on others; what needs several of them (a scale that all experts share) goes
through the driver. The driver calls, per layer (`job/layer_steps.py` has the order, and who is
called):

    prefetch          begin to read the stored bytes of this worker's units       read_ahead.py
    trunk             (one worker) the trunk, for all to hold
    attend            this worker's blocks through the original attention         original.py
    observe           statistics of this worker's attention units, from everybody's blocks
    receive           what enters the MLP, everybody's blocks
    scale_statistics, scale_losses   what this worker's experts bring to the scale that all share
    solve             quantize and pack this worker's units
    folded_norms      (one worker) norms and router, folded
    write             (one worker) the layer's file, while the next layer is in hand   files.py
    use_solved        the quantized layer takes the original's place              quantized.py
    use_published     the same, from the layer's file
    attend_quantized, run_experts, combine, advance   this worker's blocks through it
    store             what comes out of it, to resume from, while the next layer is in hand

Every call may be repeated: a layer is redone when some worker died in it. The inputs of the
current layer therefore stay in memory until the driver moves on.

Memory: the stored bytes of this worker's units of two layers and of one trunk, what it has packed
of one layer, at most three float32 weights of one MLP and what GPTQ needs for it
(`algorithms/gptq.py`; on a GPU those of a group of experts), and the activations of its blocks.
What others made (`Routed`, `ExpertOutputs`) lies in the node's object store, once for all workers
of the node. On `cuda` all of that is host memory but for what is computed with: weights in work,
the blocks of a wave, and to solve a layer what entered its MLP.
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
from deepseek.source.checkpoint import CheckpointReader, SourceTensor
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.algorithms.linear import modelopt_quantizer
from quant_jobs.algorithms.scaling import WeightStatistics
from quant_jobs.calibration.forward import ExpertOutputsByBlock, Rotary, RoutedBlocks
from quant_jobs.calibration.statistics import InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.boundary import load_blocks
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.devices import make_repeatable, use_one_thread
from quant_jobs.workers.files import WorkerFiles
from quant_jobs.workers.messages import (
    AttentionShare,
    SolveSummary,
    Tensors,
    WorkerJob,
    WorkerUsage,
)
from quant_jobs.workers.original import OriginalLayer
from quant_jobs.workers.quantized import QuantizedLayer
from quant_jobs.workers.read_ahead import ReadAhead


@dataclass(frozen=True, slots=True)
class _Solved:
    """This worker's routed experts of a layer, packed."""

    layer: int
    share: Sequence[Unit]
    experts: Tensors


class Worker:
    """See the module. Not thread-safe; one call at a time, `write` and `store` apart, of which
    there is one at a time too."""

    def __init__(self) -> None:
        use_one_thread()
        # Its import takes seconds; not within the first layer.
        modelopt_quantizer(num_bits=8, axis=0)
        self._seconds: dict[str, float] = {}

    def close(self) -> None:
        """End the thread that reads ahead."""
        if hasattr(self, "_read_ahead"):
            self._read_ahead.close()

    def begin(self, job: WorkerJob) -> None:
        """Start on a job, forgetting the one before."""
        self.close()
        self._seconds = {}
        self._reader = CheckpointReader(job.model)
        self._read_ahead = ReadAhead(self._reader, lambda seconds: self._count("read", seconds))
        self._files = WorkerFiles(job, self._reader)
        make_repeatable(job.device)
        config = self._reader.config
        self._context = LayerContext(
            config=config,
            recipe=job.recipe,
            schemes=job.recipe.resolve(config),
            num_blocks=job.num_blocks,
            device=torch.device(job.device),
            rotary=Rotary(config),
        )
        self._inputs: dict[int, dict[int, Tensor]] = {}  # layer -> block -> f32 [T, D]
        self._original: OriginalLayer | None = None
        self._quantized: QuantizedLayer | None = None
        self._solved: _Solved | None = None

    def load_boundary(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        """Take charge of blocks, by index, where they enter `layer`: embedded from their token ids
        int64 [T] at layer 0, else loaded from the files of the boundary's folder.

        Raises:
            ArtifactError: a boundary file is damaged.
        """
        with self._timed("load"):
            if layer == 0:
                blocks = {block: self._reader.embed(ids[block]) for block in sorted(ids)}
            else:
                blocks = load_blocks(boundary, sorted(ids))
            self._inputs = {layer: blocks}
            self._quantized = None

    # --- reading ---

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        """Begin to read this worker's units of a layer; and its trunk, if asked.

        For a layer that was in hand already, everything starts anew: it is being redone.
        """
        if self._original is not None and self._original.layer == layer:
            self._original = None
        self._read_ahead.prefetch(layer, share, with_trunk)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        """The trunk of a layer as stored; `prefetch` was asked for it."""
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
        """Some of this worker's blocks through the original attention: what enters the MLP, then
        what the attention's linears saw, for each node those whose `inputs` it adds up."""
        original = self._open_original(layer, trunk)
        self._inputs = {layer: self._inputs[layer]}
        routed: RoutedBlocks = {}
        shares: AttentionShare = {}
        with self._timed("forward"):
            for block in sorted(blocks):
                routed[block], of_block = original.attend(block, self._inputs[layer][block])
                for name, share in of_block.items():
                    shares.setdefault(name, {})[block] = share
        return routed, *({name: shares.get(name, {}) for name in names} for names in inputs)

    def observe(self, layer: int, *shares: AttentionShare) -> None:
        """Add what everybody's blocks of one wave brought to this worker's attention units."""
        with self._timed("forward"):
            self._original_of(layer).observe(shares)

    def receive(self, layer: int, *routed: RoutedBlocks) -> None:
        """Take what enters the MLP, everybody's blocks; measuring and solving read it."""
        with self._timed("solve"):
            self._original_of(layer).receive(routed)

    def scale_statistics(
        self, layer: int, received: None
    ) -> tuple[dict[str, WeightStatistics], InputStatistics | None]:
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
        """Norms and router of the trunk, in the source's own type, folded."""
        return self._original_of(layer).folded_norms(smoothing)

    def write(
        self, layer: int, source_sha256: str, errors: Mapping[str, float], *pieces: Tensors
    ) -> LayerRecord:
        """Publish a layer's file from everybody's tensors. Runs beside the other calls."""
        with self._timed("write"):
            return self._files.write_layer(layer, source_sha256, errors, pieces)

    # --- the quantized layer ---

    def use_solved(
        self, layer: int, input_scales: Mapping[str, float], norms: Tensors, *trunk: Tensors
    ) -> None:
        """From now on this layer is the quantized one: `norms` and `trunk` are everybody's, the
        routed experts this worker's own. The original is let go of."""
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
        """`use_solved`, of a layer that was published before: everything comes from its file, which
        the driver has verified."""
        with self._timed("load"):
            self._original = None
            self._quantized = QuantizedLayer.load(self._context, layer, share, published)

    def attend_quantized(self, layer: int, blocks: Sequence[int]) -> RoutedBlocks:
        """Some of this worker's blocks through the quantized attention."""
        quantized = self._quantized_of(layer)
        with self._timed("forward"):
            inputs = self._inputs[layer]
            return {block: quantized.attend(block, inputs[block]) for block in sorted(blocks)}

    def run_experts(
        self, layer: int, homes: Sequence[Sequence[int]], *routed: RoutedBlocks
    ) -> list[ExpertOutputsByBlock]:
        """See `QuantizedLayer.run_experts`."""
        with self._timed("forward"):
            return self._quantized_of(layer).run_experts(homes, routed)

    def combine(self, layer: int, blocks: Sequence[int], *outputs: ExpertOutputsByBlock) -> None:
        """The layer's outputs for some of this worker's blocks."""
        with self._timed("forward"):
            self._files.buffer(layer + 1, self._quantized_of(layer).combine(blocks, outputs))

    def store(self, layer: int, blocks: Sequence[int], file: Path, combined: None) -> None:
        """Store what goes into `layer`, of some of this worker's blocks. Runs beside other calls,
        after that whose result `combined` is: the one that made those blocks."""
        with self._timed("write"):
            self._files.store(layer, blocks, file)

    def advance(self, layer: int) -> None:
        """The layer is done: what came out of it goes into the next."""
        self._inputs[layer + 1] = self._quantized_of(layer).outputs
        self._quantized = None
        self._solved = None

    def usage(self) -> WorkerUsage:
        """What this worker took since `begin`."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return WorkerUsage(
            os.getpid(),
            socket.gethostname(),
            dict(self._seconds),
            peak,
            self._reader.bytes_read,
            self._files.bytes_written,
        )

    # --- the layer in hand ---

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

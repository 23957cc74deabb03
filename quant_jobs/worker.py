"""One worker of a quantize job: holds some calibration blocks, and runs and solves layers on them.

A plain class; `pool.py` makes Ray actors of it, tests call it directly. A worker decides nothing
and publishes nothing but the boundary files of its own blocks. The driver calls, per layer:

    calibrate   this worker's blocks through the original layer; statistics per block
    smooth      (one worker) SmoothQuant's vectors from the merged statistics
    solve       this worker's share of the linears
    keep        (one worker) norms and router, folded where smoothing asks for it
    carry       this worker's blocks through the layer as it was published; boundary files

Every call may be repeated: a layer is redone when some other worker died in it. The inputs of the
current layer therefore stay in memory until the driver moves on to the next.

Reading: every worker reads each layer once, straight from the checkpoint, the next one in a thread
while the current one is computed. Memory: that layer in float32, the stored bytes of two, and the
activations of this worker's blocks before and after the layer.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from deepseek.checkpoint import CheckpointReader, SourceTensor, content_digest
from deepseek.config import ModelConfig
from deepseek.formats import decompress
from deepseek.inventory import layer_tensors
from deepseek.layout import pop_linear
from deepseek.manifest import Fallback
from deepseek.recipe import Scheme
from quant_jobs.calibrate import (
    Collector,
    Share,
    Statistics,
    input_of,
    linear_modules,
    rows_per_block,
)
from quant_jobs.layer import Rotary, build_layer, fake_quantize_inputs, run_block
from quant_jobs.ledger import Ledger
from quant_jobs.messages import Solved, Usage, WorkerJob
from quant_jobs.resume import load_blocks, save_blocks
from quant_jobs.smoothquant import Smoothing, solve_smoothing, wanted_sets
from quant_jobs.solve import modelopt_quantizer, solve_linear, use_one_thread


@dataclass(slots=True)
class _Current:
    """The layer in hand: as stored, and as a float32 module."""

    layer: int
    source: dict[str, SourceTensor]
    source_sha256: str
    module: nn.Module


class Worker:
    """See the module. Not thread-safe; one call at a time."""

    def __init__(self) -> None:
        use_one_thread()
        modelopt_quantizer(
            num_bits=8, axis=0
        )  # its import takes seconds; not within the first layer
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._seconds: dict[str, float] = {}

    def begin(self, job: WorkerJob) -> None:
        """Start on a job, forgetting the one before."""
        self._job = job
        self._reader = CheckpointReader(job.model)
        self._config: ModelConfig = self._reader.config
        self._schemes: dict[str, Scheme] = job.recipe.resolve(self._config)
        self._rotary = Rotary(self._config)
        self._inputs: dict[int, dict[int, Tensor]] = {}  # layer -> block -> f32 [T, D]
        self._current: _Current | None = None
        self._next: tuple[int, Future[tuple[dict[str, SourceTensor], str]]] | None = None
        self._seconds = {}

    def hold(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        """Take charge of blocks, by index, where they enter `layer`: embedded from their token ids
        int64 [T] at layer 0, else loaded from the files of the boundary's folder.

        Raises:
            ArtifactError: a boundary file is damaged.
        """
        with self._timed("load"):
            if layer == 0:
                (table,) = (
                    tensor.dequantize()
                    for name, tensor in self._reader.read_globals().items()
                    if name == "model.embed_tokens.weight"
                )
                self._inputs = {0: {block: table[ids[block]] for block in sorted(ids)}}
            else:
                self._inputs = {layer: load_blocks(boundary, sorted(ids))}

    def calibrate(self, layer: int, prefetch: int | None) -> Share:
        """Forward the blocks through the original layer; what its linears saw, block by block.
        Meanwhile layer `prefetch` is read.

        Raises:
            CheckpointError: activations are not finite.
        """
        self._inputs = {layer: self._inputs[layer]}
        current = self._open(layer, prefetch)
        with self._timed("calibrate"):
            rows = rows_per_block(self._job.num_blocks)
            collector = Collector(current.module, layer, rows)
            for block, x_TD in self._inputs[layer].items():
                collector.start_block(block)
                run_block(current.module, self._rotary, x_TD)
            return collector.finish()

    def smooth(self, layer: int, statistics: Statistics) -> tuple[Smoothing, tuple[Fallback, ...]]:
        """SmoothQuant's vectors for the whole layer."""
        current = self._opened(layer)
        linears = linear_modules(current.module, layer)
        wanted = wanted_sets(self._config, self._schemes, layer)
        ledger = Ledger()
        with self._timed("solve"):
            smoothing = solve_smoothing(
                wanted, lambda name: linears[name].weight, statistics, layer, ledger
            )
        return smoothing, ledger.entries()

    def solve(
        self, layer: int, modules: Sequence[str], statistics: Statistics, smoothing: Smoothing
    ) -> Solved:
        """Quantize these linears of the layer.

        Raises:
            CheckpointError: a weight cannot be represented.
        """
        current = self._opened(layer)
        linears = linear_modules(current.module, layer)
        solved, ledger = Solved(), Ledger()
        with self._timed("solve"):
            for module in modules:
                one = solve_linear(
                    current.source[f"{module}.weight"],
                    linears[module].weight,
                    self._schemes[module],
                    statistics.get(input_of(module)),
                    smoothing,
                    ledger,
                )
                solved.tensors |= one.tensors
                if one.error is not None:
                    solved.errors[module] = one.error
        solved.fallbacks = ledger.entries()
        return solved

    def keep(self, layer: int, smoothing: Smoothing) -> Solved:
        """What is not a linear, in the source's own type, and the digest of the source layer."""
        current = self._opened(layer)
        kept = {
            name: smoothing.fold(name, tensor.data)
            for name, tensor in current.source.items()
            if tensor.spec.kind != "linear"
        }
        return Solved(tensors=kept, source_sha256=current.source_sha256)

    def carry(self, layer: int, published: Path, boundary: Path) -> None:
        """Forward the blocks through the layer that was published, and store what comes out, which
        goes into the next layer, in the file `boundary`.

        Its folder must exist: a worker whose driver is gone must not bring it back.
        """
        self._current = None  # its float32 weights make room for the quantized ones
        with self._timed("carry"):
            module = load_published(published, self._config, self._schemes, layer)
            outputs = {
                block: run_block(module, self._rotary, x_TD)
                for block, x_TD in self._inputs[layer].items()
            }
        with self._timed("store"):
            save_blocks(boundary, outputs)
        self._inputs[layer + 1] = outputs

    def usage(self) -> Usage:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Usage(os.getpid(), dict(self._seconds), peak)

    # --- the layer in hand ---

    def _open(self, layer: int, prefetch: int | None) -> _Current:
        if self._current is None or self._current.layer != layer:
            self._current = None
            with self._timed("read"):
                if self._next is None or self._next[0] != layer:
                    self._next = (layer, self._prefetcher.submit(self._read, layer))
                source, digest = self._next[1].result()
                weights = {name: tensor.dequantize() for name, tensor in source.items()}
                module = build_layer(self._config, layer, weights)
            self._current = _Current(layer, source, digest, module)
            self._next = None
        if prefetch is not None and self._next is None:
            self._next = (prefetch, self._prefetcher.submit(self._read, prefetch))
        return self._current

    def _opened(self, layer: int) -> _Current:
        assert self._current is not None
        assert self._current.layer == layer
        return self._current

    def _read(self, layer: int) -> tuple[dict[str, SourceTensor], str]:
        source = self._reader.read_layer(layer)
        # safetensors maps the file; the digest, needed anyhow, is what brings its pages in.
        return source, content_digest(source)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[step] = self._seconds.get(step, 0.0) + time.monotonic() - started


def load_published(
    path: Path, config: ModelConfig, schemes: Mapping[str, Scheme], layer: int
) -> nn.Module:
    """The layer as its published file restores it: float32 weights, INT8 activations where the
    scheme has them. The driver has verified the file."""
    with safe_open(path, framework="pt") as file:
        stored: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights: dict[str, Tensor] = {}
    for spec in layer_tensors(config, layer):
        if spec.kind != "linear":
            weights[spec.name] = stored.pop(spec.name).float()
            continue
        scheme = schemes[spec.module]
        parts = pop_linear(stored, spec.module, scheme)
        weights[spec.name] = decompress(parts, scheme, (spec.shape[0], spec.shape[1]))
    assert not stored, f"{path} holds {sorted(stored)[0]}, which nothing uses"
    module = build_layer(config, layer, weights)
    for name, linear in linear_modules(module, layer).items():
        if schemes[name].activations == "int8":
            fake_quantize_inputs(linear)
    return module

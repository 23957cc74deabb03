"""One worker of a quantize job: holds some calibration blocks, and owns some units of every layer.

A plain class; `pool.py` makes Ray actors of it, `here.py` calls it directly. A worker decides
nothing that depends on others; what needs several of them (a scale that all experts share) goes
through the driver. The driver calls, per layer (`layer_run.py` has the order and who is called):

    prefetch     start to read the stored bytes of this worker's units
    trunk        (one worker) the trunk, for all to hold
    attend       this worker's blocks through the original attention; what entered the MLP
    observe      statistics of this worker's attention units, from everybody's blocks
    weigh, lose  what this worker's experts say about the scale that the whole layer shares
    solve        quantize and pack this worker's units
    keep         (one worker) norms and router, folded
    write        (one worker) the layer's file, while the next layer is in hand
    adopt        the quantized layer takes the original's place
    reattend, run_experts, combine, advance   this worker's blocks through the quantized layer
    store        what comes out of it, to resume from, while the next layer is in hand

Every call may be repeated: a layer is redone when some worker died in it. The inputs of the
current layer therefore stay in memory until the driver moves on.

Memory: the stored bytes of this worker's units of two layers and of one trunk, what it has packed
of one layer, at most three float32 weights of one MLP and what GPTQ needs for it (`gptq.py`; on a
GPU those of a group of experts), and the activations of its blocks. What others made (`Routed`,
`Part`) lies in the node's object store, once for all workers of the node. On `cuda` all of that is
host memory but for what is computed with: weights in work, the blocks of a wave, and to solve a
layer what entered its MLP.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek.artifact.manifest import LayerRecord
from deepseek.artifact.writer import ArtifactWriter
from deepseek.config import ModelConfig
from deepseek.formats import decompress, stored_shapes
from deepseek.inventory import layer_tensors
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader, SourceTensor, source_digests
from quant_jobs.algorithms.awq import scale_losses, weight_means
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, Smoothing, scaled_groups
from quant_jobs.algorithms.linear import modelopt_quantizer, use_one_thread
from quant_jobs.algorithms.smoothquant import column_amax
from quant_jobs.calibration.forward import (
    Part,
    Parts,
    Prepare,
    Rotary,
    RoutedBlocks,
    Trunk,
    preparation,
    run_expert,
)
from quant_jobs.calibration.statistics import (
    SAMPLE_TOKENS,
    Accumulator,
    InputShare,
    InputStatistics,
    input_of,
    observe,
    rows_per_block,
)
from quant_jobs.calibration.units import MLP_ROLES, Unit, expert_specs, trunk_specs
from quant_jobs.workers.boundary import load_blocks, save_blocks
from quant_jobs.workers.devices import make_repeatable
from quant_jobs.workers.messages import (
    Account,
    AttentionShare,
    Message,
    Tensors,
    Usage,
    WorkerJob,
    in_block_order,
    moved,
)
from quant_jobs.workers.unit_solver import Scales, UnitSolver

#: What was read of a layer: tensors by name, and the digests of their stored bytes.
Read = tuple[dict[str, SourceTensor], dict[str, str]]


@dataclass(slots=True)
class _Original:
    """The layer in hand as the source has it: the trunk, and this worker's routed experts."""

    layer: int
    source: dict[str, SourceTensor]
    trunk: Trunk
    digests: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Accumulator] = field(default_factory=dict)


@dataclass(slots=True)
class _Quantized:
    """The layer in hand as it was published: the trunk, and this worker's experts, packed."""

    layer: int
    trunk: Trunk
    packed: dict[str, Tensor]
    input_scales: Mapping[str, float]
    residual: dict[int, Tensor] = field(default_factory=dict)
    routed: RoutedBlocks = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Worker:
    """See the module. Not thread-safe; one call at a time, `write` and `store` apart, of which
    there is one at a time too."""

    def __init__(self) -> None:
        use_one_thread()
        # Its import takes seconds; not within the first layer.
        modelopt_quantizer(num_bits=8, axis=0)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._seconds: dict[str, float] = {}

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.shutdown(cancel_futures=True)

    def begin(self, job: WorkerJob) -> None:
        """Start on a job, forgetting the one before."""
        self._job = job
        self._reader = CheckpointReader(job.model)
        self._config: ModelConfig = self._reader.config
        self._schemes: dict[str, Scheme] = job.recipe.resolve(self._config)
        self._writer: ArtifactWriter | None = None
        self._device = torch.device(job.device)
        make_repeatable(job.device)
        self._rotary = Rotary(self._config)
        self._inputs: dict[int, dict[int, Tensor]] = {}  # layer -> block -> f32 [T, D]
        self._unsaved: dict[tuple[int, int], Tensor] = {}  # of them, by layer and block
        self._shares: dict[int, Sequence[Unit]] = {}
        self._reading: dict[tuple[int, str], Future[Read]] = {}
        self._original: _Original | None = None
        self._quantized: _Quantized | None = None
        self._packed: tuple[int, dict[str, Tensor]] | None = None
        self._seconds = {}
        self._bytes_written = 0

    def hold(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        """Take charge of blocks, by index, where they enter `layer`: embedded from their token ids
        int64 [T] at layer 0, else loaded from the files of the boundary's folder.

        Raises:
            ArtifactError: a boundary file is damaged.
        """
        with self._timed("load"):
            if layer == 0:
                held = {block: self._reader.embed(ids[block]) for block in sorted(ids)}
            else:
                held = load_blocks(boundary, sorted(ids))
            self._inputs = {layer: held}
            self._quantized = None

    # --- reading ---

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        """Begin to read this worker's units of a layer, in a thread; and its trunk, if asked.

        For a layer that was in hand already, everything starts anew: it is being redone.
        """
        if self._original is not None and self._original.layer == layer:
            self._original = None
        if self._shares.get(layer) != share:
            self._shares[layer] = share
            self._reading.pop((layer, "experts"), None)
        wanted = ["trunk", "experts"] if with_trunk else ["experts"]
        for what in wanted:
            if (layer, what) not in self._reading:
                self._reading[layer, what] = self._ahead.submit(self._read, layer, what)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        """The trunk of a layer as stored; `prefetch` was asked for it."""
        with self._timed("wait"):
            return self._reading[layer, "trunk"].result()[0]

    def _read(self, layer: int, what: str) -> Read:
        specs = (
            trunk_specs(self._config, layer)
            if what == "trunk"
            else expert_specs(self._config, layer, self._shares[layer])
        )
        begun = time.monotonic()
        source = self._reader.load(specs)
        found = source, source_digests(source)
        self._count("read", time.monotonic() - begun)
        return found

    # --- statistics ---

    def attend(
        self,
        layer: int,
        trunk: Mapping[str, SourceTensor],
        blocks: Sequence[int],
        inputs: Sequence[Sequence[str]],
    ) -> tuple[RoutedBlocks | AttentionShare, ...]:
        """Some of this worker's blocks through the original attention: what enters the MLP, then
        what the attention's linears saw, for each node those whose `inputs` it adds up."""
        original = self._open(layer, trunk)
        self._inputs = {layer: self._inputs[layer]}
        routed: RoutedBlocks = {}
        shares: AttentionShare = {}
        num_rows = rows_per_block(SAMPLE_TOKENS, self._job.num_blocks)
        with self._timed("forward"):
            for block in sorted(blocks):
                for name in self._attention_inputs(layer):
                    original.trunk.watch(
                        name, self._see(shares.setdefault(name, {}), name, block, num_rows)
                    )
                x_TD = self._inputs[layer][block].to(self._device)
                _, routed[block] = original.trunk.attend(self._rotary, x_TD)
        return routed, *({name: shares.get(name, {}) for name in names} for names in inputs)

    def _see(
        self, share: dict[int, InputShare], name: str, block: int, num_rows: int
    ) -> Callable[[Tensor], None]:
        keep_rows = self._wants_gram(name)

        def see(x: Tensor) -> None:
            share[block] = observe(x.flatten(0, -2), num_rows, keep_rows=keep_rows)
            share[block].check_finite(name, block)  # here, where the first to meet it says so

        return see

    def observe(self, layer: int, *shares: AttentionShare) -> None:
        """Add what everybody's blocks of one wave brought to this worker's attention units."""
        original = self._opened(layer)
        with self._timed("forward"):
            for unit in self._shares[layer]:
                if unit.kind != "attention":
                    continue
                name = input_of(unit.modules[0])
                if name not in original.inputs:
                    original.inputs[name] = Accumulator(name, gram=self._wants_gram(name))
                for block, share in in_block_order(one[name] for one in shares if name in one):
                    original.inputs[name].add(block, self._moved(share))

    def weigh(
        self, layer: int, *routed: RoutedBlocks
    ) -> tuple[dict[str, tuple[Tensor, int]], InputStatistics | None]:
        """What this worker's consumers of the layer's shared scale bring to it: by module, the
        channel maxima f32 [K] of the weight (SmoothQuant, count 1), or AWQ's sums f64 [K] and their
        count; and, from the owner of the shared expert, the statistics of the input."""
        found = self._shared_set(layer)
        assert found is not None
        one, how = found
        brought: dict[str, tuple[Tensor, int]] = {}
        solver = self._solver(layer, routed)
        with self._timed("solve"):
            for module in self._mine(layer, one.consumers):
                weight = solver.weight(module)
                if how.algorithm == "smoothquant":
                    brought[module] = column_amax(weight), 1
                else:
                    brought[module] = weight_means(weight, self._schemes[module])
            if not self._mine(layer, [one.measured]):
                return brought, None
            return brought, solver.layer_input(gram=False)

    def lose(self, layer: int, candidates: Tensor, *routed: RoutedBlocks) -> dict[str, Tensor]:
        """AWQ's losses f64 [A] of candidates f32 [A, K] for the scale that the layer shares, by
        module; of this worker's modules that have seen a token."""
        found = self._shared_set(layer)
        assert found is not None
        losses: dict[str, Tensor] = {}
        candidates = self._moved(candidates)
        solver = self._solver(layer, routed)
        with self._timed("solve"):
            for module in self._mine(layer, found[0].consumers):
                sample = solver.sample_of(module)
                if sample is not None:
                    weight = solver.weight(module)
                    scheme = self._schemes[module]
                    losses[module] = scale_losses([weight], sample, candidates, scheme)
        return losses

    # --- solving ---

    def solve(
        self, layer: int, smoothing: Smoothing, *routed: RoutedBlocks
    ) -> tuple[Tensors, Tensors, Account]:
        """Quantize this worker's units. `smoothing` is what the whole layer shares.

        Returns the packed tensors of the trunk, those of the routed experts, and the account.

        Raises:
            CheckpointError: a weight cannot be represented, or an activation is not finite.
        """
        with self._timed("solve"):
            solver = self._solver(layer, routed)
            smoothing = self._moved(smoothing)
            self._opened(layer).inputs.clear()  # the solver uses the Gram matrices up
            trunk: Tensors = {}
            experts: Tensors = {}
            for unit in self._shares[layer]:
                solved = solver.solve(unit, smoothing)
                (experts if unit.experts else trunk).update(solved)
            self._packed = layer, experts
            account = solver.account()
            account.source_digests = self._opened(layer).digests
            return trunk, experts, account

    def keep(self, layer: int, smoothing: Smoothing) -> Tensors:
        """What is not a linear, in the source's own type, folded."""
        return {
            name: smoothing.fold(name, tensor.data)
            for name, tensor in self._opened(layer).source.items()
            if tensor.spec.kind != "linear"
        }

    def write(
        self, layer: int, source_sha256: str, errors: Mapping[str, float], *parts: Tensors
    ) -> LayerRecord:
        """Publish a layer's file from everybody's parts. Runs beside the other calls."""
        begun = time.monotonic()
        if self._writer is None:
            self._writer = ArtifactWriter(
                self._job.output, source=self._reader, recipe=self._job.recipe
            )
        whole: dict[str, Tensor] = {}
        for part in parts:
            assert not whole.keys() & part.keys(), "two workers solved the same tensor"
            whole |= part
        record = self._writer.publish_layer(
            layer, whole, source_sha256=source_sha256, errors=errors
        )
        self._bytes_written += record.num_bytes
        self._count("write", time.monotonic() - begun)
        return record

    # --- through the quantized layer ---

    def adopt(
        self, layer: int, input_scales: Mapping[str, float], kept: Tensors, *trunk: Tensors
    ) -> None:
        """From now on this layer is the quantized one: `kept` and `trunk` are everybody's, the
        routed experts this worker's own."""
        assert self._packed is not None
        assert self._packed[0] == layer
        self._original = None
        whole = dict(kept)
        for part in trunk:
            whole |= part
        self._quantize(layer, whole, self._packed[1], input_scales)

    def restore(self, layer: int, published: Path, share: Sequence[Unit]) -> None:
        """`adopt`, of a layer that was published before: everything comes from its file, which the
        driver has verified."""
        with self._timed("load"):
            self._original = None
            self._shares[layer] = share
            mine = {spec.module for spec in expert_specs(self._config, layer, share)}
            trunk, packed, scales = {}, {}, {}
            with safe_open(published, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    module = name.rpartition(".")[0]
                    if name.endswith(".input_scale"):
                        scales[module] = float(file.get_tensor(name))
                    if ".mlp.experts." not in name:
                        trunk[name] = file.get_tensor(name)
                    elif module in mine:
                        packed[name] = file.get_tensor(name)
            self._quantize(layer, trunk, packed, scales)

    def _quantize(
        self,
        layer: int,
        trunk: dict[str, Tensor],
        packed: dict[str, Tensor],
        input_scales: Mapping[str, float],
    ) -> None:
        specs = {spec.module: spec for spec in trunk_specs(self._config, layer)}
        linears = {m: s for m, s in specs.items() if s.kind == "linear"}
        high = {s.name: trunk[s.name] for s in specs.values() if s.kind != "linear"}

        def load(module: str) -> Tensor:
            return self._restore(trunk, module, linears[module].shape)

        prepare = {m: p for m in linears if (p := self._preparation(m, input_scales)) is not None}
        module = Trunk(self._config, layer, self._moved(high), load, prepare)
        self._quantized = _Quantized(layer, module, packed, input_scales)

    def reattend(self, layer: int, blocks: Sequence[int]) -> RoutedBlocks:
        """Some of this worker's blocks through the quantized attention."""
        quantized = self._adopted(layer)
        with self._timed("forward"):
            for block in sorted(blocks):
                x_TD = self._inputs[layer][block].to(self._device)
                h_TD, routed = quantized.trunk.attend(self._rotary, x_TD)
                quantized.residual[block] = h_TD
                quantized.routed[block] = routed
        return {block: quantized.routed[block] for block in blocks}

    def run_experts(
        self, layer: int, homes: Sequence[Sequence[int]], *routed: RoutedBlocks
    ) -> list[Parts]:
        """Everybody's tokens of one wave through this worker's routed experts; `homes` are the
        blocks of each node, which gets the rows of its own."""
        quantized = self._adopted(layer)
        parts: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        shape = {
            s.module: s.shape for s in layer_tensors(self._config, layer) if s.expert is not None
        }
        with self._timed("forward"), torch.no_grad():
            blocks = [(b, self._moved(r)) for b, r in in_block_order(iter(routed))]
            for unit in self._shares[layer]:
                for block_name, expert in zip(unit.blocks, unit.experts, strict=False):
                    modules = {role: f"{block_name}.{role}" for role in MLP_ROLES}
                    weights = {
                        role: self._restore(quantized.packed, module, shape[module])
                        for role, module in modules.items()
                    }
                    prepare = {
                        role: p
                        for role, module in modules.items()
                        if (p := self._preparation(module, quantized.input_scales)) is not None
                    }
                    for block, one in blocks:
                        found = run_expert(one, expert, weights, prepare)
                        if found is not None:
                            parts.setdefault(block, {})[expert] = found
        return [{block: Part(parts[block]) for block in home if block in parts} for home in homes]

    def combine(self, layer: int, blocks: Sequence[int], *parts: Parts) -> None:
        """The layer's outputs for some of this worker's blocks."""
        quantized = self._adopted(layer)
        with self._timed("forward"):
            for block in sorted(blocks):
                mine = [one[block] for one in parts if block in one]
                h_TD, routed = quantized.residual.pop(block), quantized.routed.pop(block)
                y_TD = quantized.trunk.combine(h_TD, routed, mine)
                quantized.outputs[block] = y_TD.cpu()
                self._unsaved[layer + 1, block] = quantized.outputs[block]

    def store(self, layer: int, blocks: Sequence[int], file: Path, combined: None) -> None:
        """Store what goes into `layer`, of some of this worker's blocks. Runs beside other calls,
        after that whose result `combined` is: the one that made those blocks.

        The file's folder must exist: a worker whose driver is gone must not bring it back.
        """
        begun = time.monotonic()
        leaving = {block: self._unsaved.pop((layer, block)) for block in sorted(blocks)}
        self._bytes_written += save_blocks(file, leaving)
        self._count("write", time.monotonic() - begun)

    def advance(self, layer: int) -> None:
        """The layer is done: what came out of it goes into the next."""
        self._inputs[layer + 1] = self._adopted(layer).outputs
        self._quantized = None
        self._packed = None

    def usage(self) -> Usage:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Usage(
            os.getpid(),
            socket.gethostname(),
            dict(self._seconds),
            peak,
            self._reader.bytes_read,
            self._bytes_written,
        )

    # --- the layer in hand ---

    def _open(self, layer: int, trunk: Mapping[str, SourceTensor]) -> _Original:
        if self._original is not None and self._original.layer == layer:
            return self._original
        with self._timed("wait"):
            experts, digests = self._reading.pop((layer, "experts")).result()
            if (found := self._reading.pop((layer, "trunk"), None)) is not None:
                digests = digests | found.result()[1]
        for old in [old for old in self._shares if old < layer]:
            del self._shares[old]
        high = {n: t.data for n, t in trunk.items() if t.spec.kind != "linear"}

        def load(module: str) -> Tensor:
            return self._moved(trunk[f"{module}.weight"]).dequantize()

        module = Trunk(self._config, layer, self._moved(high), load)
        self._original = _Original(layer, {**trunk, **experts}, module, digests)
        return self._original

    def _opened(self, layer: int) -> _Original:
        assert self._original is not None
        assert self._original.layer == layer
        return self._original

    def _adopted(self, layer: int) -> _Quantized:
        assert self._quantized is not None
        assert self._quantized.layer == layer
        return self._quantized

    def _solver(self, layer: int, routed: Sequence[RoutedBlocks]) -> UnitSolver:
        original = self._opened(layer)
        blocks = [(b, self._moved(r)) for b, r in in_block_order(iter(routed))]
        attention = {name: inputs.finish() for name, inputs in original.inputs.items()}
        scales = Scales(scaled_groups(self._config, self._schemes, layer), self._shared_set(layer))
        return UnitSolver(
            self._job.recipe,
            self._schemes,
            layer,
            original.source,
            attention,
            blocks,
            scales,
            self._job.num_blocks,
            self._device,
        )

    def _shared_set(self, layer: int) -> tuple[FoldingGroup, ScaleMethod] | None:
        """The set whose consumers belong to several workers: what the router's norm feeds."""
        for one, how in scaled_groups(self._config, self._schemes, layer):
            if one.router is not None:
                return one, how
        return None

    def _mine(self, layer: int, modules: Sequence[str]) -> list[str]:
        owned = {module for unit in self._shares[layer] for module in unit.modules}
        return [module for module in modules if module in owned]

    def _restore(self, stored: Mapping[str, Tensor], module: str, shape: tuple[int, ...]) -> Tensor:
        scheme, (outputs, inputs) = self._schemes[module], shape
        # A static input scale is not among the tensors of a layer that was just solved.
        parts = {
            suffix: stored[name]
            for suffix in stored_shapes(scheme, outputs, inputs)
            if (name := f"{module}.{suffix}") in stored
        }
        return decompress(self._moved(parts), scheme, (outputs, inputs))

    def _preparation(self, module: str, input_scales: Mapping[str, float]) -> Prepare | None:
        scale = input_scales.get(module)
        given = None if scale is None else torch.tensor([scale], device=self._device)
        return preparation(self._schemes[module], given)

    def _attention_inputs(self, layer: int) -> list[str]:
        prefix = f"model.layers.{layer}.self_attn"
        return [f"{prefix}.{role}" for role in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")]

    def _wants_gram(self, name: str) -> bool:
        """Whether GPTQ solves one of the linears that read this input."""
        parent, _, role = name.rpartition(".")
        readers = [name, *([f"{parent}.kv_a_proj_with_mqa"] if role == "q_a_proj" else [])]
        return any(self._schemes[reader].algorithm == "gptq" for reader in readers)

    def _moved(self, value: Message) -> Message:
        return moved(value, self._device)

    def _count(self, step: str, seconds: float) -> None:
        self._seconds[step] = self._seconds.get(step, 0.0) + seconds

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._count(step, time.monotonic() - begun)

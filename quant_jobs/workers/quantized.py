"""One worker's view of the quantized layer, which computes the inputs of the next layer.

Made by `worker.py` from the packed tensors just solved, or from the layer's file when a job
resumes. Called in this order, wave by wave: `attend`, `run_experts` (the tokens of all workers
through this worker's experts), `combine`. A weight is dequantized when it is used, one expert at a
time, and freed afterwards.

T tokens of one block · D hidden size
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.formats import RoundInput, decompress, input_rounding, stored_shapes
from deepseek.inventory import MLP_READERS, MLP_ROLES, layer_tensors
from quant_jobs.calibration.forward import (
    ExpertOutputs,
    ExpertOutputsByBlock,
    Routed,
    RoutedBlocks,
    Trunk,
    run_expert,
)
from quant_jobs.calibration.units import Unit, expert_specs, trunk_specs
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.messages import in_block_order


class ExpertMaxima:
    """The largest inputs of the routed experts of one layer that have run on this worker.
    `by_expert` maps each to those of gate and up, and of down."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.by_expert: dict[int, tuple[float, float]] = {}

    def observer(self, expert: int) -> Callable[[str, Tensor], None]:
        """What `run_expert` calls with the inputs of one expert.

        Raises:
            ArtifactError: an input is NaN or infinite.
        """

        def observe(role: str, x: Tensor) -> None:
            largest = float(x.abs().amax())
            if not math.isfinite(largest):
                raise ArtifactError(
                    f"layer {self._layer}, expert {expert}: an input of its {role} is not finite; "
                    "the weights before it are damaged or too large, so quantize again"
                )
            gate_up, down = self.by_expert.get(expert, (0.0, 0.0))
            if role == MLP_READERS[0][0]:  # up reads the same input
                self.by_expert[expert] = max(gate_up, largest), down
            elif role == MLP_READERS[1][0]:
                self.by_expert[expert] = gate_up, max(down, largest)

        return observe


class QuantizedLayer:
    """`trunk` has the packed tensors of the trunk by full name, norms and router included (and the
    indexer's, which is not computed);
    `experts` those of this worker's routed experts. `input_scales` are static FP8 scales by module.
    With `maxima`, `run_experts` notes what enters the experts there.
    """

    def __init__(
        self,
        context: LayerContext,
        layer: int,
        share: Sequence[Unit],
        trunk: Mapping[str, Tensor],
        experts: Mapping[str, Tensor],
        input_scales: Mapping[str, float],
        maxima: ExpertMaxima | None = None,
    ) -> None:
        self.layer = layer
        self._maxima = maxima
        self._context, self._share = context, share
        self._experts, self._input_scales = experts, input_scales
        # Every block needs the trunk's weights: on a GPU they are copied there once, as stored.
        trunk = context.to_device(dict(trunk))
        # The indexer is never computed: within the dense context it chooses every token.
        specs = [spec for spec in trunk_specs(context.config, layer) if not spec.is_indexer]
        linears = {spec.module: spec.shape for spec in specs if spec.kind == "linear"}
        high = {spec.name: trunk[spec.name] for spec in specs if spec.kind != "linear"}

        def restored(module: str) -> Tensor:
            return self._restore(trunk, module, linears[module])

        self._trunk = Trunk(context.config, layer, high, restored, self._input_roundings(linears))
        self._residual: dict[int, Tensor] = {}
        self._routed: RoutedBlocks = {}
        #: The layer's outputs, f32 [T, D] by block, in host memory.
        self.outputs: dict[int, Tensor] = {}

    @classmethod
    def load(
        cls, context: LayerContext, layer: int, share: Sequence[Unit], published: Path
    ) -> QuantizedLayer:
        """Load the trunk and the routed experts of `share` from the layer's file, which the driver
        has verified.

        Raises:
            ArtifactError: it has become unreadable since, or is not to be seen from this node.
        """
        owned = {spec.module for spec in expert_specs(context.config, layer, share)}
        routed = {
            spec.module for spec in layer_tensors(context.config, layer) if spec.expert is not None
        }
        trunk, experts, scales = {}, {}, {}
        try:
            with safe_open(published, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    module = name.rpartition(".")[0]
                    if name.endswith(".input_scale"):
                        scales[module] = float(file.get_tensor(name))
                    if module not in routed:
                        trunk[name] = file.get_tensor(name)
                    elif module in owned:
                        experts[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{published} cannot be read on {socket.gethostname()} ({error}); see that all "
                "nodes share that storage, then run again, which resumes"
            ) from error
        return cls(context, layer, share, trunk, experts, scales)

    @classmethod
    def of_artifact(
        cls,
        context: LayerContext,
        layer: int,
        share: Sequence[Unit],
        artifact: ArtifactReader,
        maxima: ExpertMaxima,
    ) -> QuantizedLayer:
        """Load the trunk and the routed experts of `share` from a finished artifact, every tensor
        verified. `run_experts` then notes what enters the experts in `maxima`.

        Raises:
            ArtifactError: a tensor is damaged.
        """
        owned = {spec.module for spec in expert_specs(context.config, layer, share)}
        routed = {
            spec.module for spec in layer_tensors(context.config, layer) if spec.expert is not None
        }

        def is_wanted(name: str) -> bool:
            module = name.rpartition(".")[0]
            return module in owned or module not in routed

        trunk: dict[str, Tensor] = {}
        experts: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        for name, tensor in artifact.read_some(layer, is_wanted).items():
            module, _, suffix = name.rpartition(".")
            if suffix == "input_scale":
                scales[module] = float(tensor)
            (experts if module in owned else trunk)[name] = tensor
        return cls(context, layer, share, trunk, experts, scales, maxima)

    def attend(self, block: int, x_TD: Tensor) -> Routed:
        """Run one calibration block f32 [T, D] through the attention. Keeps the residual and the
        MLP input until `combine`."""
        h_TD, routed = self._trunk.attend(self._context.rotary, x_TD.to(self._context.device))
        self._residual[block], self._routed[block] = h_TD, routed
        return routed

    @torch.no_grad()
    def run_experts(
        self, blocks_by_node: Sequence[Sequence[int]], routed: Sequence[RoutedBlocks]
    ) -> list[ExpertOutputsByBlock]:
        """Run the tokens of one wave, from all workers, through this worker's routed experts.
        `blocks_by_node` are the blocks of each node; returns the outputs for each node's blocks, in
        that order."""
        specs = expert_specs(self._context.config, self.layer, self._share)
        shapes = {spec.module: spec.shape for spec in specs}
        blocks = [
            (block, self._context.to_device(routed_block))
            for block, routed_block in in_block_order(iter(routed))
        ]
        outputs: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        for unit in self._share:
            for mlp, expert in unit.numbered_mlps():
                if expert is None:
                    continue
                modules = {role: f"{mlp}.{role}" for role in MLP_ROLES}
                weights = {
                    role: self._restore(self._experts, module, shapes[module])
                    for role, module in modules.items()
                }
                by_module = self._input_roundings(modules.values())
                roundings = {
                    role: by_module[module]
                    for role, module in modules.items()
                    if module in by_module
                }
                observe = None if self._maxima is None else self._maxima.observer(expert)
                for block, routed_block in blocks:
                    rows = run_expert(routed_block, expert, weights, roundings, observe)
                    if rows is not None:
                        outputs.setdefault(block, {})[expert] = rows
        return [
            {block: ExpertOutputs(outputs[block]) for block in node_blocks if block in outputs}
            for node_blocks in blocks_by_node
        ]

    def combine(
        self, blocks: Sequence[int], outputs: Sequence[ExpertOutputsByBlock]
    ) -> dict[int, Tensor]:
        """The layer's outputs f32 [T, D] for blocks that `attend` has run; also kept in `outputs`.
        Frees their residuals and MLP inputs."""
        for block in sorted(blocks):
            block_outputs = [by_block[block] for by_block in outputs if block in by_block]
            h_TD, routed = self._residual.pop(block), self._routed.pop(block)
            self.outputs[block] = self._trunk.combine(h_TD, routed, block_outputs).cpu()
        return {block: self.outputs[block] for block in blocks}

    def _restore(self, packed: Mapping[str, Tensor], module: str, shape: tuple[int, ...]) -> Tensor:
        """Dequantize the weight f32 [N, K] as a reader of the artifact will."""
        scheme, (outputs, inputs) = self._context.schemes[module], shape
        # The packed tensors of a layer just solved have no static input scale.
        stored = {
            suffix: packed[name]
            for suffix in stored_shapes(scheme, outputs, inputs)
            if (name := f"{module}.{suffix}") in packed
        }
        return decompress(self._context.to_device(stored), scheme, (outputs, inputs))

    def _input_roundings(self, modules: Iterable[str]) -> dict[str, RoundInput]:
        """The input rounding by module, for modules whose kernel quantizes its input."""
        roundings: dict[str, RoundInput] = {}
        for module in modules:
            scale = self._input_scales.get(module)
            static = None if scale is None else torch.tensor([scale], device=self._context.device)
            rounding = input_rounding(self._context.schemes[module], static)
            if rounding is not None:
                roundings[module] = rounding
        return roundings

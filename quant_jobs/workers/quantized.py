"""The layer in hand as it was published: what the next layer's calibration blocks go through.

Made of what was just solved, or of the layer's file when a job resumes. In the order of the calls,
wave by wave: `attend`, `run_experts` (everybody's tokens through this worker's experts), `combine`.
Weights are restored from their packed form when they are used, one expert at a time.

T tokens of one block · D hidden size
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek.formats import RoundInput, decompress, input_rounding, stored_shapes
from deepseek.inventory import MLP_ROLES, layer_tensors
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


class QuantizedLayer:
    """`trunk` are the packed tensors that every worker holds, by full name, norms and router among
    them; `experts` those of this worker's routed experts. `input_scales` are static FP8 scales by
    module."""

    def __init__(
        self,
        context: LayerContext,
        layer: int,
        share: Sequence[Unit],
        trunk: Mapping[str, Tensor],
        experts: Mapping[str, Tensor],
        input_scales: Mapping[str, float],
    ) -> None:
        self.layer = layer
        self._context, self._share = context, share
        self._experts, self._input_scales = experts, input_scales
        specs = trunk_specs(context.config, layer)
        linears = {spec.module: spec.shape for spec in specs if spec.kind == "linear"}
        high = {spec.name: trunk[spec.name] for spec in specs if spec.kind != "linear"}

        def restored(module: str) -> Tensor:
            return self._restore(trunk, module, linears[module])

        self._trunk = Trunk(
            context.config, layer, context.to_device(high), restored, self._input_roundings(linears)
        )
        self._residual: dict[int, Tensor] = {}
        self._routed: RoutedBlocks = {}
        #: What comes out of the layer, f32 [T, D] by block, in host memory.
        self.outputs: dict[int, Tensor] = {}

    @classmethod
    def load(
        cls, context: LayerContext, layer: int, share: Sequence[Unit], published: Path
    ) -> QuantizedLayer:
        """From the layer's file, which the driver has verified: the trunk, and of the routed
        experts those of `share`."""
        owned = {spec.module for spec in expert_specs(context.config, layer, share)}
        routed = {
            spec.module for spec in layer_tensors(context.config, layer) if spec.expert is not None
        }
        trunk, experts, scales = {}, {}, {}
        with safe_open(published, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                module = name.rpartition(".")[0]
                if name.endswith(".input_scale"):
                    scales[module] = float(file.get_tensor(name))
                if module not in routed:
                    trunk[name] = file.get_tensor(name)
                elif module in owned:
                    experts[name] = file.get_tensor(name)
        return cls(context, layer, share, trunk, experts, scales)

    def attend(self, block: int, x_TD: Tensor) -> Routed:
        """One calibration block f32 [T, D] through the attention; `combine` needs its residual."""
        h_TD, routed = self._trunk.attend(self._context.rotary, x_TD.to(self._context.device))
        self._residual[block], self._routed[block] = h_TD, routed
        return routed

    @torch.no_grad()
    def run_experts(
        self, homes: Sequence[Sequence[int]], routed: Sequence[RoutedBlocks]
    ) -> list[ExpertOutputsByBlock]:
        """Everybody's tokens of one wave through this worker's routed experts. `homes` are the
        blocks of each node; the answer has an entry for each, with the rows of its own blocks."""
        specs = expert_specs(self._context.config, self.layer, self._share)
        shapes = {spec.module: spec.shape for spec in specs}
        blocks = [
            (block, self._context.to_device(one)) for block, one in in_block_order(iter(routed))
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
                for block, routed_block in blocks:
                    rows = run_expert(routed_block, expert, weights, roundings)
                    if rows is not None:
                        outputs.setdefault(block, {})[expert] = rows
        return [
            {block: ExpertOutputs(outputs[block]) for block in home if block in outputs}
            for home in homes
        ]

    def combine(
        self, blocks: Sequence[int], outputs: Sequence[ExpertOutputsByBlock]
    ) -> dict[int, Tensor]:
        """What comes out of the layer for blocks that `attend` was called with, f32 [T, D]; kept in
        `outputs` too. The residuals are let go of."""
        for block in sorted(blocks):
            of_block = [by_block[block] for by_block in outputs if block in by_block]
            h_TD, routed = self._residual.pop(block), self._routed.pop(block)
            self.outputs[block] = self._trunk.combine(h_TD, routed, of_block).cpu()
        return {block: self.outputs[block] for block in blocks}

    def _restore(self, packed: Mapping[str, Tensor], module: str, shape: tuple[int, ...]) -> Tensor:
        """The weight f32 [N, K] as it will be read back."""
        scheme, (outputs, inputs) = self._context.schemes[module], shape
        # A static input scale is not among the tensors of a layer that was just solved.
        stored = {
            suffix: packed[name]
            for suffix in stored_shapes(scheme, outputs, inputs)
            if (name := f"{module}.{suffix}") in packed
        }
        return decompress(self._context.to_device(stored), scheme, (outputs, inputs))

    def _input_roundings(self, modules: Iterable[str]) -> dict[str, RoundInput]:
        """By module, of those whose kernel rounds its input."""
        roundings: dict[str, RoundInput] = {}
        for module in modules:
            scale = self._input_scales.get(module)
            given = None if scale is None else torch.tensor([scale], device=self._context.device)
            rounding = input_rounding(self._context.schemes[module], given)
            if rounding is not None:
                roundings[module] = rounding
        return roundings

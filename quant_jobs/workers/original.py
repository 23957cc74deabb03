"""One worker's view of the original layer: run, measured and solved, before it is quantized.

Called by `worker.py` in this order (`job/layer_steps.py`): `attend` and `observe` per wave,
`receive` once, `scale_statistics` and `scale_losses` for the scale that several workers share, then
`solve` and `folded_norms`. When a worker dies, the layer is redone with a new object.

Memory: the stored bytes of the trunk (on a GPU, there too) and of this worker's routed experts, the
accumulated statistics of its attention inputs, and from `receive` until `solve` returns the MLP
inputs of all blocks, on the worker's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats.scales import check_magnitude, largest
from deepseek.inventory import expert_of, layer_inputs
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import scale_losses
from quant_jobs.algorithms.exact import silent_channels
from quant_jobs.algorithms.folding import (
    FoldingGroup,
    ScaleMethod,
    Smoothing,
    leaves_range,
    scaled_groups,
)
from quant_jobs.algorithms.linear import copy_linear
from quant_jobs.algorithms.scaling import WeightStatistics, weight_statistics
from quant_jobs.calibration.forward import Routed, RoutedBlocks, Trunk
from quant_jobs.calibration.measuring import LayerInputs, observe_attention
from quant_jobs.calibration.statistics import InputShare, InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.messages import AttentionShare, SolveSummary, Tensors, in_block_order
from quant_jobs.workers.unit_solver import UnitSolver


class OriginalLayer:
    """`share` are this worker's units; `source` has the stored tensors of the trunk and of this
    worker's routed experts; `digests` are of the tensors that this worker read itself."""

    def __init__(
        self,
        context: LayerContext,
        layer: int,
        share: Sequence[Unit],
        source: Mapping[str, SourceTensor],
        digests: dict[str, str],
    ) -> None:
        self.layer, self.share = layer, share
        self._context, self._source, self._digests = context, source, digests
        high = {
            name: tensor.data
            for name, tensor in source.items()
            if tensor.spec.kind != "linear" and not tensor.spec.is_indexer
        }

        # Every block needs the trunk's weights: on a GPU they are copied there once, as stored.
        linears = {
            tensor.spec.module: context.to_device(tensor)
            for tensor in source.values()
            if tensor.spec.kind == "linear"
            and tensor.spec.expert is None
            and not tensor.spec.is_indexer
        }

        def dequantized(module: str) -> Tensor:
            return linears[module].dequantize()

        self._trunk = Trunk(context.config, layer, context.to_device(high), dequantized)
        self._inputs = LayerInputs(
            layer,
            context.recipe.expert_coverage,
            context.num_blocks,
            weight=self.weight,
            wants_gram=self._wants_gram,
        )
        inputs = layer_inputs(context.config, layer)
        self._attention_inputs = [x.name for x in inputs if x.is_attention]
        self._gram_inputs = {
            x.name
            for x in inputs
            if any(context.schemes[module].algorithm == "gptq" for module in x.modules)
        }
        groups = scaled_groups(context.config, context.schemes, layer)
        #: The folding group that reads the router's norm; its linears belong to several workers.
        self._shared = next((pair for pair in groups if pair[0].router is not None), None)
        self._own_groups = [pair for pair in groups if pair != self._shared]

    # --- statistics ---

    def attend(self, block: int, x_TD: Tensor) -> tuple[Routed, dict[str, InputShare]]:
        """Run one calibration block f32 [T, D] through the attention. Returns the MLP input, and
        the statistics of the attention's inputs by name.

        Raises:
            CheckpointError: an activation is not finite.
        """
        return observe_attention(
            self._trunk,
            self._context.rotary,
            x_TD.to(self._context.device),
            block=block,
            num_blocks=self._context.num_blocks,
            inputs=self._attention_inputs,
            wants_rows=self._wants_gram,
        )

    def observe(self, shares: Sequence[AttentionShare]) -> None:
        """Accumulate the statistics of one wave, from all workers, for this worker's attention
        units."""
        for unit in self.share:
            if unit.kind != "attention":
                continue
            (name,) = (linear_input.name for linear_input in unit.inputs)
            by_worker = (share[name] for share in shares if name in share)
            for block, share in in_block_order(by_worker):
                self._inputs.add_attention(name, block, self._context.to_device(share))

    def receive(self, routed: Sequence[RoutedBlocks]) -> None:
        """Copy the MLP inputs of all blocks to the device. `solve` frees them."""
        blocks = [
            (block, self._context.to_device(routed_block))
            for block, routed_block in in_block_order(iter(routed))
        ]
        self._inputs.set_mlp_blocks(blocks)

    # --- the scale that linears of several workers share ---

    def scale_statistics(
        self,
    ) -> tuple[dict[str, WeightStatistics], InputStatistics | None, Tensor]:
        """Weight statistics of this worker's linears in the shared group, by module; from the owner
        of the shared expert only, the statistics of the group's input; and the channels of that
        input, bool [K], that are zero on any data."""
        group, method = self._shared_group()
        statistics = {
            module: weight_statistics(self.weight(module), method, self._context.schemes[module])
            for module in self._owned(group.consumers)
        }
        is_measured_here = bool(self._owned([group.measured]))
        measured = self._inputs.all_tokens(gram=False) if is_measured_here else None
        silent = silent_channels(group, self._source)
        return statistics, measured, self._context.to_device(silent)

    def scale_losses(self, candidates: Tensor) -> dict[str, Tensor]:
        """AWQ's losses f64 [A] of candidates f32 [A, K] for the shared scale, by module, for this
        worker's linears that received a token."""
        group, _ = self._shared_group()
        candidates = self._context.to_device(candidates)
        losses: dict[str, Tensor] = {}
        for module in self._owned(group.consumers):
            sample = self._inputs.sample(expert_of(module))
            if sample is not None:
                scheme = self._context.schemes[module]
                losses[module] = scale_losses([self.weight(module)], sample, candidates, scheme)
        return losses

    # --- solving ---

    def solve(self, smoothing: Smoothing) -> tuple[Tensors, Tensors, SolveSummary]:
        """Quantize this worker's units. `smoothing` has the scale that the whole layer shares.

        Returns the packed tensors of the trunk, those of the routed experts, and the summary. Frees
        the MLP inputs and all statistics.

        Raises:
            CheckpointError: a weight cannot be represented, or an activation is not finite.
        """
        solver = self.solver()
        smoothing = self._context.to_device(smoothing)
        trunk: Tensors = {}
        experts: Tensors = {}
        for unit in self.share:
            (experts if unit.experts else trunk).update(solver.solve(unit, smoothing))
        self._inputs.release()
        summary = solver.summary()
        summary.source_digests = self._digests
        return trunk, experts, summary

    def solver(self) -> UnitSolver:
        """A solver of this layer's units. It consumes their statistics, so each is solved once."""
        return UnitSolver(
            self._context.recipe,
            self._context.schemes,
            self.layer,
            self._source,
            self._inputs,
            self._own_groups,
            self.weight,
            self._context.device,
            measures_experts=self._context.measures_experts,
        )

    def folded_norms(self, smoothing: Smoothing) -> Tensors:
        """Norms and router of the trunk with `smoothing` folded in, in the source's dtype; and the
        indexer, which no unit solves, as the source stores it.

        Raises:
            CheckpointError: a folded value leaves the range of that dtype.
        """
        tensors: Tensors = {}
        for name, tensor in self._source.items():
            if tensor.spec.kind != "linear":
                tensors[name] = smoothing.fold(name, tensor.data)
                if not bool(largest(tensors[name]).isfinite()):  # float32; others `fold` refuses
                    raise leaves_range(name, tensor.data.dtype)
            elif tensor.spec.is_indexer:
                scheme = self._context.schemes[tensor.spec.module]
                tensors |= copy_linear(tensor, scheme).tensors
        return tensors

    def weight(self, module: str) -> Tensor:
        """The original weight f32 [N, K].

        Raises:
            CheckpointError: it must be quantized and has values that cannot be.
        """
        name = f"{module}.weight"
        weight = self._context.to_device(self._source[name]).dequantize()
        if self._context.schemes[module].is_quantized:
            # Checked here, where the name is known: searches over several weights know none.
            try:
                check_magnitude(largest(weight))
            except CheckpointError as refusal:
                raise CheckpointError(f"tensor {name} {refusal}") from refusal
        return weight

    def _shared_group(self) -> tuple[FoldingGroup, ScaleMethod]:
        assert self._shared is not None, "the driver asks only where the recipe scales this group"
        return self._shared

    def _owned(self, modules: Sequence[str]) -> list[str]:
        owned = {module for unit in self.share for module in unit.modules}
        return [module for module in modules if module in owned]

    def _wants_gram(self, input_name: str) -> bool:
        """Whether GPTQ solves a linear that reads this input (`LinearInput.name`)."""
        return input_name in self._gram_inputs

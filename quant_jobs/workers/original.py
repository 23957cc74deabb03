"""The layer in hand as the source has it: run, measured, and solved. Nothing here is quantized yet.

Calls come in this order (`job/layer_steps.py`): `attend` and `observe` per wave, `receive`
once, then what several workers agree on (`scale_statistics`, `scale_losses`), then `solve` and
`folded_norms`. The layer is redone from the start when a worker dies in it; then all this is made
anew.

Memory: the stored bytes of the trunk and of this worker's routed experts, the sums of its attention
inputs, and from `receive` to the end of `solve` what enters the MLP, all blocks (on a GPU: there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats.scales import check_magnitude, largest
from deepseek.inventory import layer_inputs
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import scale_losses
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, Smoothing, scaled_groups
from quant_jobs.algorithms.scaling import WeightStatistics, weight_statistics
from quant_jobs.calibration.forward import Routed, RoutedBlocks, Trunk
from quant_jobs.calibration.measuring import LayerInputs, observe_attention
from quant_jobs.calibration.statistics import InputShare, InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.messages import AttentionShare, SolveSummary, Tensors, in_block_order
from quant_jobs.workers.unit_solver import UnitSolver


class OriginalLayer:
    """`share` are this worker's units; `source` holds the trunk's tensors and those of this
    worker's routed experts; `digests` are of what this worker itself has read."""

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
            name: tensor.data for name, tensor in source.items() if tensor.spec.kind != "linear"
        }

        def dequantized(module: str) -> Tensor:
            return context.to_device(source[f"{module}.weight"]).dequantize()

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
        #: The folding group whose linears belong to several workers: what the router's norm feeds.
        self.shared = next((pair for pair in groups if pair[0].router is not None), None)
        self._own_groups = [pair for pair in groups if pair != self.shared]

    # --- statistics ---

    def attend(self, block: int, x_TD: Tensor) -> tuple[Routed, dict[str, InputShare]]:
        """One calibration block f32 [T, D] through the attention: what enters the MLP, and what the
        attention's linears saw, by input."""
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
        """Add what the blocks of one wave, everybody's, bring to this worker's attention units."""
        for unit in self.share:
            if unit.kind != "attention":
                continue
            (name,) = (linear_input.name for linear_input in unit.inputs)
            of_input = (share[name] for share in shares if name in share)
            for block, share in in_block_order(of_input):
                self._inputs.add_attention(name, block, self._context.to_device(share))

    def receive(self, routed: Sequence[RoutedBlocks]) -> None:
        """Take what enters the MLP, everybody's blocks, to where it is computed with."""
        blocks = [
            (block, self._context.to_device(one)) for block, one in in_block_order(iter(routed))
        ]
        self._inputs.set_mlp_blocks(blocks)

    # --- the scale that several workers share ---

    def scale_statistics(self) -> tuple[dict[str, WeightStatistics], InputStatistics | None]:
        """What this worker's linears of the shared group bring to its scale, by module; and from
        the owner of the shared expert the statistics of the input."""
        group, method = self._shared_group()
        statistics = {
            module: weight_statistics(self.weight(module), method, self._context.schemes[module])
            for module in self._owned(group.consumers)
        }
        is_measured_here = bool(self._owned([group.measured]))
        return statistics, self._inputs.all_tokens(gram=False) if is_measured_here else None

    def scale_losses(self, candidates: Tensor) -> dict[str, Tensor]:
        """AWQ's losses f64 [A] of candidates f32 [A, K] for the shared scale, by module; of this
        worker's linears that have seen a token."""
        group, _ = self._shared_group()
        candidates = self._context.to_device(candidates)
        losses: dict[str, Tensor] = {}
        experts = {mlp: expert for unit in self.share for mlp, expert in unit.numbered_mlps()}
        for module in self._owned(group.consumers):
            mlp = module.rpartition(".")[0]
            sample = self._inputs.sample(mlp, experts[mlp])
            if sample is not None:
                scheme = self._context.schemes[module]
                losses[module] = scale_losses([self.weight(module)], sample, candidates, scheme)
        return losses

    # --- solving ---

    def solve(self, smoothing: Smoothing) -> tuple[Tensors, Tensors, SolveSummary]:
        """Quantize this worker's units. `smoothing` is what the whole layer shares.

        Returns the packed tensors of the trunk, those of the routed experts, and the summary. What
        entered the MLP is let go of.

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
        """Solves units of this layer; each once, for it uses their statistics up."""
        return UnitSolver(
            self._context.recipe,
            self._context.schemes,
            self.layer,
            self._source,
            self._inputs,
            self._own_groups,
            self.weight,
            self._context.device,
        )

    def folded_norms(self, smoothing: Smoothing) -> Tensors:
        """What of the trunk is not a linear, norms and router, in the source's own type."""
        return {
            name: smoothing.fold(name, tensor.data)
            for name, tensor in self._source.items()
            if tensor.spec.kind != "linear"
        }

    def weight(self, module: str) -> Tensor:
        """The original weight f32 [N, K].

        Raises:
            CheckpointError: it is to be quantized, and cannot be.
        """
        name = f"{module}.weight"
        weight = self._context.to_device(self._source[name]).dequantize()
        if self._context.schemes[module].is_quantized:
            # Here, where its name is known: the searches on several weights would not say whose.
            try:
                check_magnitude(largest(weight))
            except CheckpointError as refusal:
                raise CheckpointError(f"tensor {name} {refusal}") from refusal
        return weight

    def _shared_group(self) -> tuple[FoldingGroup, ScaleMethod]:
        assert self.shared is not None, "the driver asks only where the recipe scales this group"
        return self.shared

    def _owned(self, modules: Sequence[str]) -> list[str]:
        owned = {module for unit in self.share for module in unit.modules}
        return [module for module in modules if module in owned]

    def _wants_gram(self, input_name: str) -> bool:
        """Whether GPTQ solves one of the linears that read an input (`LinearInput.name`)."""
        return input_name in self._gram_inputs

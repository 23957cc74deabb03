"""The language model's head: its input, measured on calibration blocks, and its quantized weight.

Only where the recipe names it (`deepseek/recipe.py`); elsewhere it is copied. The input is the
output of the *quantized* last layer through the final norm, which every worker computes for its own
blocks. One worker, the owner, accumulates the statistics in block order, so that they depend
neither on the number of workers nor on crashes, and quantizes the weight by them. Called by
`worker.py`, in the order of `job/layer_steps.py`.

Memory of the owner: the head in float32 and a second time for the output's error (DeepSeek-V3: 3.7
GB each), and for GPTQ the Gram matrix of its input.

T tokens of one block · D hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from deepseek.artifact.tensors import store_tensor
from deepseek.errors import CheckpointError
from deepseek.formats.scales import check_magnitude, largest
from deepseek.inventory import HEAD
from deepseek.source.checkpoint import SourceTensor, source_digests
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.algorithms.gptq import Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.linear import solve_linear
from quant_jobs.calibration.statistics import (
    SAMPLE_TOKENS,
    Accumulator,
    InputShare,
    InputStatistics,
    observe,
    rows_per_block,
)
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.messages import SolveSummary, Tensors, in_block_order


class HeadInput:
    """The final norm, which makes the head's input. `weight` is the norm's, in any float dtype."""

    def __init__(self, context: LayerContext, weight: Tensor) -> None:
        self._context = context
        self._norm = DeepseekV3RMSNorm(context.config.hidden_size, context.config.rms_norm_eps)
        self._norm.requires_grad_(False)
        self._norm.weight.copy_(weight.float())
        self._norm.to(context.device)

    def share(self, block: int, x_TD: Tensor) -> InputShare:
        """Statistics of the head's input on one block, whose last layer's output is x f32 [T, D].

        Raises:
            CheckpointError: an activation is not finite.
        """
        num_rows = rows_per_block(SAMPLE_TOKENS, self._context.num_blocks)
        z_TD = self._norm(x_TD.to(self._context.device))
        share = observe(z_TD, num_rows, keep_rows=wants_gram(self._context))
        share.check_finite(HEAD, block)
        return share


@dataclass(slots=True)
class HeadOwner:
    """What the one worker that quantizes the head accumulates."""

    context: LayerContext
    inputs: Accumulator

    @classmethod
    def of(cls, context: LayerContext) -> HeadOwner:
        """An owner that has seen no block."""
        return cls(context, Accumulator(HEAD, gram=wants_gram(context)))

    def add(self, shares: Iterable[Mapping[int, InputShare]]) -> None:
        """Add the statistics of one wave, from all workers."""
        for block, share in in_block_order(iter(shares)):
            self.inputs.add(block, self.context.to_device(share))

    def solve(self, source: Mapping[str, SourceTensor]) -> tuple[Tensors, SolveSummary]:
        """Quantize the head. `source` has the tensors outside the layers; the others are copied.

        Raises:
            CheckpointError: the weight cannot be represented.
        """
        statistics = self.inputs.finish()
        assert statistics is not None, "every token reaches the head"
        head, ledger = self.context.to_device(source[f"{HEAD}.weight"]), Ledger()
        solved = solve_linear(
            head,
            lambda: _weight(head),
            self.context.schemes[HEAD],
            statistics.sample,
            Smoothing(),
            ledger,
            self._round(head, statistics, ledger),
        )
        assert solved.error is not None, "a head that is quantized"
        tensors = {name: packed.cpu() for name, packed in solved.tensors.items()}
        for tensor in source.values():
            if tensor.spec.module != HEAD:
                tensors |= store_tensor(tensor, None)
        return tensors, SolveSummary(
            errors={HEAD: solved.error},
            fallbacks=ledger.entries(),
            source_digests=source_digests(source),
        )

    def _round(
        self, head: SourceTensor, statistics: InputStatistics, ledger: Ledger
    ) -> Rounded | None:
        """GPTQ's result, where the recipe asks for it."""
        scheme = self.context.schemes[HEAD]
        if scheme.algorithm != "gptq":
            return None
        factor = inverse_factor(statistics.take_gram(), scheme.damping, act_order=scheme.act_order)
        if factor.failed:
            ledger.note("unusable_hessian", None, HEAD)
        elif factor.damping > scheme.damping:
            ledger.note("damped_hessian", None, HEAD)
        (rounded,) = gptq(_weight(head).clone()[None], [factor], scheme)
        return rounded


def wants_gram(context: LayerContext) -> bool:
    """Whether GPTQ solves the head."""
    return context.schemes[HEAD].algorithm == "gptq"


def _weight(head: SourceTensor) -> Tensor:
    """The original weight f32 [V, D].

    Raises:
        CheckpointError: it has values that cannot be quantized.
    """
    weight = head.dequantize()
    try:
        check_magnitude(largest(weight))
    except CheckpointError as refusal:
        raise CheckpointError(f"tensor {head.spec.name} {refusal}") from refusal
    return weight

"""The modules and parameters that one rank of vLLM has for a layer, before they are filled.

Modeled after 0.32's `DeepseekV2DecoderLayer`, `DeepseekV2MLAAttention`, `DeepseekV2MoE`,
`DeepSeekMultiTokenPredictorLayer` and the `create_weights` of each method.

The walk over the layers is SGLang's too (`fused_loader/rank_modules.py`). Its own: the name of the
fused queries, experts that are divided or whole, and which tiles must be whole.
"""

from __future__ import annotations

from deepseek.fused_loader import rank_modules
from deepseek.fused_loader.modules import TILE, Experts, Linear


class RankModules(rank_modules.RankModules):
    """The modules of one rank of vLLM by layer."""

    __slots__ = ()
    fused_queries = "fused_qkv_a_proj"

    def place(self, count: int, ways: int) -> tuple[int, int]:
        """Ranks divide the experts by expert, or all of them."""
        return self.rank * count if self.ranks.ep > 1 else 0, self.rank if ways > 1 else 0

    def check_linear(self, linear: Linear) -> None:
        """`validate_fp8_block_shape`."""
        if linear.method.tiles is None:
            return
        checked = [part.outputs for part in linear.parts]
        if linear.cut != 0 or linear.ways == 1:
            checked = checked[:-1]
        if linear.cut == 1 and linear.ways > 1:
            checked.append(linear.inputs)
        self.whole(linear.name, checked, TILE, "FP8 tiles")

    def check_experts(self, experts: Experts) -> None:
        """`validate_fp8_block_shape_moe`."""
        if experts.method.tiles is not None:
            self.whole(experts.name, [experts.width], TILE, "FP8 tiles")

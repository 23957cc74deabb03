"""The modules and parameters that one rank of SGLang has for a layer, before they are filled.

Modeled after 0.5.23's `DeepseekV2DecoderLayer`, `DeepseekV2AttentionMLA`, `DeepseekV2MoE`,
`DeepseekModelNextN` and the `create_weights` of each method. Packed experts are held transposed
there; here they keep the checkpoint's order, which the loader turns as it reads.

The walk over the layers is vLLM's too (`fused_loader/rank_modules.py`). Its own: the name of the
fused queries, w4afp8, experts that groups of ranks divide, and what it refuses.
"""

from __future__ import annotations

import torch

from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.fused_loader import modules, rank_modules
from deepseek.fused_loader.modules import TILE, Linear, Method, Parameter
from deepseek.sglang.loader_config import QuantConfig


class Experts(modules.Experts):
    """Routed experts of one rank, those of w4afp8 among them: two codes in a byte, scales by groups
    of 128 inputs, an input scale for each of gate and up, and one for down."""

    __slots__ = ()

    def parameters(self) -> dict[str, Parameter]:
        if self.method.kind != "w4afp8":
            return super().parameters()
        both = self.count, 2 * self.width
        down = self.count, self.hidden
        return {
            "w13_weight": ((*both, self.hidden // 2), torch.int8),
            "w2_weight": ((*down, self.width // 2), torch.int8),
            "w13_weight_scale_inv": ((*both, self.hidden // TILE), torch.float32),
            "w2_weight_scale_inv": ((*down, self.width // TILE), torch.float32),
            "w13_input_scale": ((self.count, 2), torch.bfloat16),
            "w2_input_scale": ((self.count,), torch.bfloat16),
        }


class RankModules(rank_modules.RankModules):
    """The modules of one rank of SGLang by layer."""

    __slots__ = ()
    fused_queries = "fused_qkv_a_proj_with_mqa"
    experts_class = Experts

    quant: QuantConfig

    def place(self, count: int, ways: int) -> tuple[int, int]:
        """Ranks next to each other divide the same experts."""
        return self.rank // ways * count, self.rank % ways

    def check_linear(self, linear: Linear) -> None:
        """`validate_block_quant_shapes`, and what becomes of kv_b_proj."""
        if linear.name.endswith(".kv_b_proj"):
            self._takes_apart(linear.name, linear.method)
        if linear.method.tiles is None:
            return
        checked = [part.outputs for part in linear.parts]
        if linear.cut != 0 or (linear.ways == 1 and len(checked) == 1):
            checked = checked[:-1]
        if linear.cut == 1 and linear.ways > 1:
            checked.append(linear.inputs)
        self.whole(linear.name, checked, TILE, "tiles")

    def check_experts(self, experts: modules.Experts) -> None:
        if experts.method.tiles is not None:
            self.whole(experts.name, [experts.width], TILE, "tiles")
        if experts.method.kind == "w4afp8":
            self.whole(experts.name, [experts.hidden, experts.width], TILE, "groups")

    def _takes_apart(self, name: str, method: Method) -> None:
        """`post_load_weights` takes the weight of kv_b_proj apart by head, in BF16.

        Raises:
            LoaderRefusal: it has no `weight`, or the size of its tiles is not found.
        """
        if method.kind == "wna16":
            raise LoaderRefusal(
                f"{self.quant.source} has {name} packed, but SGLang takes its `weight` apart by "
                "head and finds none"
            )
        if method.kind == "fp8" and not self.quant.knows_tiles:
            raise LoaderRefusal(
                f"{self.quant.source} has {name} in FP8 tiles, whose size SGLang looks for under "
                "the target Linear, which no group has"
            )
        in_groups = self.quant.kind == "compressed-tensors"
        if method.kind == "w8a8" and in_groups and self.quant.knows_tiles:
            raise LoaderRefusal(
                f"{self.quant.source} has {name} in INT8 beside FP8 tiles, and SGLang takes it for "
                "INT8 tiles"
            )

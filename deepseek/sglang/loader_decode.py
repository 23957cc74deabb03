"""How the parameters of a rank of SGLang are decoded: `fused_loader/decode.py`, with what is
SGLang's own. The names are those of `check_values.reference_values`: `weight` has codes, one in a
byte, and `weight_scale` f32 or BF16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.fused_loader import decode
from deepseek.fused_loader.decode import Piece
from deepseek.fused_loader.modules import Experts, Method


class Decoder(decode.Decoder):
    """Ranks that hold the same experts, `ways` of them, stand next to each other."""

    fused_queries = "fused_qkv_a_proj_with_mqa"

    def place(self, module: Experts, experts: int, local: int, rank: int) -> tuple[int, int]:
        first = 0 if experts == local else rank // module.ways * local
        return first, rank % module.ways

    def plain(self, suffix: str, values: Tensor, method: Method) -> tuple[str, Tensor]:
        """A parameter with one code in a byte, and scales by one name.

        w4afp8 packs two codes in two's complement, packed groups 32 / bits codes plus their offset.
        """
        if suffix == "weight_scale_inv":
            return "weight_scale", values.to(torch.bfloat16) if method.kind == "w4afp8" else values
        if method.kind == "w4afp8" and suffix == "weight":
            nibbles = values.view(torch.uint8)
            both = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)
            return "weight", (both ^ 8).to(torch.int8) - 8
        if suffix == "weight_packed":
            data = values.contiguous().view(torch.uint8)
            if method.bits == 4:
                data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
                return "weight", data.to(torch.int8) - 8
            return "weight", (data ^ 128).view(torch.int8)
        return suffix, values

    def expert_pieces(
        self, module: Experts, which: str, suffix: str, values: Tensor, first: int, index: int
    ) -> Iterator[Piece]:
        if suffix == "input_scale":
            return _input_scales(module, which, values, first)
        return super().expert_pieces(module, which, suffix, values, first, index)


def _input_scales(module: Experts, which: str, values: Tensor, first: int) -> Iterator[Piece]:
    """The input scales of one rank's experts: the largest counts for all of them
    (`process_weights_after_loading`), so that this is what each is said to have."""
    largest = values.max().float().reshape(1, 1)
    for n in range(values.shape[0]):
        for role in ("gate_proj", "up_proj") if which == "w13" else ("down_proj",):
            yield Piece(f"{module.name}.{first + n}.{role}.input_scale", 0, 0, largest)

"""How the parameters of a rank of vLLM are decoded: `fused_loader/decode.py`, with what is vLLM's
own."""

from __future__ import annotations

from deepseek.fused_loader import decode
from deepseek.fused_loader.modules import Experts


class Decoder(decode.Decoder):
    """A rank holds all experts, divided by the ranks, or some of them whole."""

    fused_queries = "fused_qkv_a_proj"

    def place(self, module: Experts, experts: int, local: int, rank: int) -> tuple[int, int]:
        if experts == local:
            return 0, rank if module.ways > 1 else 0
        return rank * local, 0

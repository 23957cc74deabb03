"""How SGLang copies one tensor of the checkpoint into a parameter of a rank.

Modeled after 0.5.23's `parameter.py` (`load_column_parallel_weight`, `load_merged_column_weight`,
`load_row_parallel_weight`), `fused_moe_triton/layer.py` (`_weight_loader_impl`, `_load_w13`,
`_load_w2`, `_load_per_channel_weight_scale`, `_load_single_value`), `vocab_parallel_embedding.py`
and `default_weight_loader`. Most of it is vLLM's too (`fused_loader/fill.py`). Its own: what a
smaller tensor leaves of an expert becomes zeros, of which SGLang says nothing, and input scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.fused_loader import fill
from deepseek.fused_loader.modules import Experts

#: `_weight_loader_impl`: how far the input scales of gate and up may be apart.
_SCALE_TOLERANCE = 1e-5


class Filler(fill.Filler):
    """Copies for one rank as SGLang does."""

    __slots__ = ()

    def fit(self, data: Tensor, shape: list[int], dim: int) -> Tensor:
        """The rest becomes zeros, and only along what ranks divide."""
        if data.shape[dim] > shape[dim]:
            data.zero_()
            data = data.narrow(dim, 0, shape[dim])
        return data

    def rounds_later(self, module: Experts, suffix: str) -> bool:
        """Scales of w4afp8 are read as F32 and rounded to BF16 afterwards."""
        return suffix == "weight_scale_inv" and module.method.kind == "w4afp8"

    def expert(
        self, key: str, module: Experts, index: int, role: str, suffix: str, parameter: Tensor
    ) -> None:
        """Fill one projection of one expert, or its input scale."""
        if suffix == "input_scale":
            self._input_scale(key, parameter[index])
        else:
            super().expert(key, module, index, role, suffix, parameter)

    def _input_scale(self, key: str, data: Tensor) -> None:
        """Fill the input scale of one expert: gate and up share a slot each of two, but each sets
        both, and the second must be within 1e-5 of what the first was rounded to.

        Raises:
            LoaderRefusal: it is not.
        """
        value = self.checkpoint.take(key)
        if value.numel() != 1:
            raise self.wrong(key, (1,))
        if self.checkpoint.values:
            held = data.reshape(-1)[0].item()
            if held != 1.0 and abs(held - value.item()) > _SCALE_TOLERANCE:
                raise LoaderRefusal(
                    f"{self.checkpoint.directory}: tensor {key} is {value.item()}, where the other "
                    f"of gate and up gave {held}; SGLang wants one input scale for both"
                )
            if value.to(torch.bfloat16).float().item() != value.float().item():
                self.note(key, "is rounded to BF16")
            data.fill_(value.item())

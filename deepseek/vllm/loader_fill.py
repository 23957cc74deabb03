"""How vLLM copies one tensor of the checkpoint into a parameter of a rank.

Modeled after 0.32's `parameter.py` (`load_column_parallel_weight`, `load_merged_column_weight`,
`load_row_parallel_weight`, `_assert_and_load`), `routed_experts.py` (`weight_loader`, `_load_w13`,
`_load_w2`, `_load_per_channel_weight_scale`, `_load_single_value`), `vocab_parallel_embedding.py`
and `default_weight_loader`. Most of it is SGLang's too (`fused_loader/fill.py`). Its own: experts
fill a part of the parameter where the tensor is smaller, and vLLM says nothing of it.
"""

from __future__ import annotations

from torch import Tensor

from deepseek.fused_loader import fill


class Filler(fill.Filler):
    """Copies for one rank as vLLM does."""

    __slots__ = ()

    def fit(self, data: Tensor, shape: list[int], dim: int) -> Tensor:
        """`_narrow_expert_data_for_padding`: the rest keeps what memory happens to hold."""
        for each in (0, 1):
            if data.shape[each] > shape[each]:
                data = data.narrow(each, 0, shape[each])
        return data

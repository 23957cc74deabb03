"""A model of SGLang's loader for DeepseekV3ForCausalLM: in its own layouts, quantized by
compressed-tensors, or released in FP8 or BF16.

Written from SGLang 0.5.23's public source. It is independent of what builds our directories
(`layout.py`, `quant_config.py`): it says what the loader reads, so that it finds what the builder
gets wrong. Given a directory it fills the parameters of one rank after the other, counts every key
that is read, refuses what the loader would stop at, and notes what it would take without a word
although it is wrong: SGLang does not check that its parameters were filled, and passes over most
keys that it has no parameter for with a line in its log.

What is not modeled: DeepSeek-V3.2's indexer, pipeline, context and data parallelism, redundant
experts, shared experts fused into the routed ones (`sglang.yaml` turns that off where formats
differ), and kernels, which reorder weights after loading. What vLLM's has too is
`fused_loader/loader.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.fused_loader import loader
from deepseek.fused_loader.modules import Linear
from deepseek.sglang.loader_config import QuantConfig, read_quant_config
from deepseek.sglang.loader_fill import Filler
from deepseek.sglang.loader_modules import RankModules

__all__ = ["LoaderModel", "LoaderRefusal"]

_STACKED = re.compile(r"model[.]layers[.]\d+[.]mlp[.](shared_experts[.])?(gate_proj|up_proj)")


class LoaderModel(loader.LoaderModel):
    """The loader over one directory. `quantization` is the flag `--quantization`. `mtp` loads the
    MTP layers too, as a draft model does."""

    name = "SGLang"
    draft_option = "speculative-algorithm"
    modules_class = RankModules
    filler_class = Filler

    def __init__(
        self,
        directory: Path,
        ranks: RankLayout,
        *,
        quantization: str | None = None,
        values: bool = True,
        mtp: bool = False,
    ) -> None:
        self._quantization = quantization
        super().__init__(directory, ranks, values=values, mtp=mtp)

    def read_quant(self) -> QuantConfig:
        return read_quant_config(self.directory, self._quantization)

    def passes_over(self, key: str) -> bool:
        """All but gate_proj and up_proj outside the experts, which are a KeyError in the layers
        that are loaded."""
        owner = key.rpartition(".")[0]
        if not _STACKED.fullmatch(owner):
            return True
        return int(owner.split(".")[2]) >= self.config.num_hidden_layers and not self.mtp

    def skips(self, key: str, module: Linear, suffix: str) -> bool:
        """`do_load_weights` puts the tensors of q_a_proj and kv_a_proj_with_mqa one after the
        other, also their shapes; nothing reads the parameter that stays empty without them."""
        if suffix != "weight_shape" or module.cut is not None or len(module.parts) == 1:
            return False
        if key in self.checkpoint:
            raise LoaderRefusal(
                f"{self.checkpoint.file(key)} holds {key}: SGLang puts the two shapes of "
                f"{module.name} one after the other, four numbers where it has room for two"
            )
        return True

    def initial(self, name: str) -> float | None:
        return 1.0 if name.endswith("_input_scale") else None

"""A model of vLLM's loader for DeepseekV3ForCausalLM, quantized by compressed-tensors or released
in FP8 or BF16.

Written from vLLM 0.32's public source. It is independent of what builds our directories
(`layout.py`, `quant_config.py`): it says what the loader reads, so that it finds what the builder
gets wrong. Given a directory it fills the parameters of one rank after the other, counts every key
that is read, refuses what the loader would stop at, and notes what it would take without a word
although it is wrong: of a quantized model vLLM does not check that its parameters were filled.

`tests/interop` runs vLLM's own loader over the same directories and compares. What is not modeled:
DeepSeek-V3.2's indexer, pipeline, context and data parallelism, redundant experts, and kernels,
which reorder weights after loading. What SGLang's has too is `fused_loader/loader.py`.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.fused_loader import loader
from deepseek.vllm.loader_config import QuantConfig, read_quant_config
from deepseek.vllm.loader_fill import Filler
from deepseek.vllm.loader_modules import RankModules

__all__ = ["LoaderModel", "LoaderRefusal"]

#: What a checkpoint may hold that vLLM passes over.
_IGNORED = (".bias", ".kv_scale", ".k_scale", ".v_scale", ".q_scale")


class LoaderModel(loader.LoaderModel):
    """The loader over one directory. `mtp` loads the MTP layers too, as `--speculative-config`
    does."""

    name = "vLLM"
    draft_option = "speculative-config"
    modules_class = RankModules
    filler_class = Filler

    quant: QuantConfig

    def __init__(
        self, directory: Path, ranks: RankLayout, *, values: bool = True, mtp: bool = False
    ) -> None:
        super().__init__(directory, ranks, values=values, mtp=mtp)

    def read_quant(self) -> QuantConfig:
        return read_quant_config(self.directory)

    def passes_over(self, key: str) -> bool:
        """Other keys than these, and those of an MTP layer in the main model, are a KeyError."""
        config = self.config
        drafts = range(config.num_hidden_layers, config.num_layers_with_mtp)
        if not self.mtp and key.startswith(tuple(f"model.layers.{n}." for n in drafts)):
            return True
        return key.endswith(_IGNORED) or "rotary_emb.inv_freq" in key

    def stops_without(self, key: str) -> bool:
        """Only of an unquantized model vLLM checks that its parameters were filled."""
        return self.quant.kind is None

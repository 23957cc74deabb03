"""A model of TensorRT-LLM's PyTorch loader for DeepseekV3ForCausalLM on Hopper.

Written from its public source, for the CUTLASS backend without attention data parallelism. It is
independent of what builds our directories (`layout.py`, `quant_config.py`): it says what the loader
reads, so that it finds what the builder gets wrong. Given a directory it fills the parameters of
one rank after the other, counts every key that is read, refuses what the loader would stop at, and
notes what the loader would take without a word although it is wrong.

What is not modeled: DeepSeek-V3.2's indexer, pipeline and context parallelism, kernels, and the
reordering of INT8 weights for the kernel (`loader_experts.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from deepseek.artifact.engine_checks import RankLoad
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.trtllm.loader_attention import attention
from deepseek.trtllm.loader_config import check_dtype, read_quant_config
from deepseek.trtllm.loader_experts import experts
from deepseek.trtllm.loader_files import Checkpoint, LoaderRefusal
from deepseek.trtllm.loader_linears import (
    Parameters,
    Rank,
    embedding,
    gate_up,
    head,
    linear,
    norm,
    router,
)
from deepseek.trtllm.loader_ranks import RankPlace

__all__ = ["LoaderModel", "LoaderRefusal", "RankLoad"]


class LoaderModel:
    """The loader of one version, over one directory.

    `values` False runs over names, types and shapes only: parameters are `meta` tensors. `mtp` asks
    for the MTP layers too, as a speculative configuration does.

    Raises on opening:
        LoaderRefusal: the version is unknown, or its loader would stop at the config files.
        ArtifactError: a file is damaged.
        ConfigError: config.json describes no model of the family.
    """

    def __init__(
        self,
        directory: Path,
        ranks: RankLayout,
        version: str,
        *,
        values: bool = True,
        mtp: bool = False,
    ) -> None:
        self.directory = directory
        self.ranks = ranks
        self.config = ModelConfig.from_directory(directory)
        if self.config.has_indexer:
            raise LoaderRefusal(
                f"{directory} is a model with an indexer (DeepSeek-V3.2), whose loading by "
                "TensorRT-LLM is not known here"
            )
        check_dtype(directory)
        self.quant = read_quant_config(directory, version)
        self.checkpoint = Checkpoint(directory, values=values)
        self.mtp = mtp
        #: Key -> what the loader does to it without a word although it is wrong.
        self.silent: dict[str, str] = {}
        if mtp and not self.config.num_nextn_predict_layers:
            raise LoaderRefusal(
                f"{directory / 'config.json'} has num_nextn_predict_layers 0, so TensorRT-LLM "
                "finds no MTP layer; build with the MTP layers, or serve without them"
            )
        #: Rank -> what it read and holds of all that was loaded so far.
        self.loads: dict[int, RankLoad] = {}
        for key, files in self.checkpoint.duplicates.items():
            self.silent[key] = f"is in {' and '.join(files)}; whichever is read last wins"

    @property
    def reads(self) -> Counter[str]:
        """How often each key was read, by all ranks loaded so far."""
        return self.checkpoint.reads

    def unread(self) -> list[str]:
        """Keys of the files that no rank loaded so far has read."""
        return self.checkpoint.unread()

    @property
    def layers(self) -> list[LayerKey]:
        """The layers that are loaded, and the rest, in the order of `load`."""
        count = self.config.num_layers_with_mtp if self.mtp else self.config.num_hidden_layers
        return [*range(count), "globals"]

    def load(
        self, rank: int, layer: LayerKey | None = None
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The parameters of one rank, module after module: never the whole model in memory. With
        `layer` those of one layer only, or of what is outside the layers.

        Raises:
            LoaderRefusal: the loader would stop; the sentence names the key or module and the rule.
        """
        assert 0 <= rank < self.ranks.tp, rank
        place = RankPlace(self.ranks, rank)
        context = Rank(self.checkpoint, self.config, self.quant, place, self.silent)
        for key in self.layers if layer is None else [layer]:
            modules = self._globals(context) if key == "globals" else self._layer(context, key)
            before, held = self.checkpoint.read_bytes, 0
            for name, parameters in modules:
                held += sum(_held(parameters).values())
                yield name, parameters
            load = self.loads.get(rank, RankLoad(0, 0))
            read = self.checkpoint.read_bytes - before
            self.loads[rank] = RankLoad(load.read_bytes + read, load.held_bytes + held)

    def _globals(self, rank: Rank) -> Iterator[tuple[str, Parameters]]:
        yield "model.embed_tokens", embedding(rank, "model.embed_tokens")
        yield "model.norm", norm(rank, "model.norm", self.config.hidden_size)
        yield "lm_head", head(rank, "lm_head")

    def _layer(self, rank: Rank, layer: int) -> Iterator[tuple[str, Parameters]]:
        config, name = self.config, f"model.layers.{layer}"
        hidden = config.hidden_size
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{part}", norm(rank, f"{name}.{part}", hidden)
        yield from attention(rank, f"{name}.self_attn")
        if config.is_moe(layer):
            yield f"{name}.mlp.gate", router(rank, f"{name}.mlp.gate")
            yield f"{name}.mlp.experts", experts(rank, f"{name}.mlp.experts")
            mlp, width = (
                f"{name}.mlp.shared_experts",
                config.moe_intermediate_size * config.n_shared_experts,
            )
            place = rank.place.shared_experts(width, self.quant.shared_group_size(mlp))
        else:
            mlp, width = f"{name}.mlp", config.intermediate_size
            place = rank.place.dense_mlp(width, self.quant.dense_group_size(layer))
        yield f"{mlp}.gate_up_proj", gate_up(rank, f"{mlp}.gate_up_proj", width, place)
        yield f"{mlp}.down_proj", linear(rank, f"{mlp}.down_proj", hidden, width, "row", place)
        if layer >= config.num_hidden_layers:
            for part in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{name}.{part}", norm(rank, f"{name}.{part}", hidden)
            eh_proj = f"{name}.eh_proj"
            yield eh_proj, linear(rank, eh_proj, hidden, 2 * hidden, "row", always_bf16=True)


def _held(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the parameters of a module by name; views of others take none."""
    return {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in parameters.items()
        if name not in ("v_b_proj", "v_b_proj_scale")
    }

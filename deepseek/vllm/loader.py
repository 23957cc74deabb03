"""A model of vLLM's loader for DeepseekV3ForCausalLM, quantized by compressed-tensors or released
in FP8 or BF16.

Written from vLLM 0.32's public source. It is independent of what builds our directories
(`layout.py`, `quant_config.py`): it says what the loader reads, so that it finds what the builder
gets wrong. Given a directory it fills the parameters of one rank after the other, counts every key
that is read, refuses what the loader would stop at, and notes what it would take without a word
although it is wrong: of a quantized model vLLM does not check that its parameters were filled.

`tests/interop` runs vLLM's own loader over the same directories and compares. What is not modeled:
DeepSeek-V3.2's indexer, pipeline, context and data parallelism, redundant experts, and kernels,
which reorder weights after loading.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.engine_checks import RankLoad
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import Checkpoint, LoaderRefusal
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.fused_loader.modules import Linear, Method, Module, Plain
from deepseek.vllm.loader_config import read_quant_config
from deepseek.vllm.loader_fill import Filler
from deepseek.vllm.loader_modules import RankModules

__all__ = ["LoaderModel", "LoaderRefusal"]

_INDEX = "model.safetensors.index.json"
_EXPERT = re.compile(r"(.*[.]mlp[.]experts)[.](\d+)[.](gate_proj|up_proj|down_proj)[.](\w+)")
#: What a checkpoint may hold that vLLM passes over.
_IGNORED = (".bias", ".kv_scale", ".k_scale", ".v_scale", ".q_scale")
_SLOT = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def weight_files(directory: Path) -> list[Path]:
    """The tensor files that the loader takes, by name: of all `*.safetensors` those that the index
    names, if there is an index.

    Raises:
        LoaderRefusal: there is none, or the index names one that is absent.
        ArtifactError: the directory or the index cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be listed ({error.strerror})") from error
    path = directory / _INDEX
    if path.exists():
        try:
            weight_map = untrusted.read_json_object(path, root=directory).get("weight_map")
        except untrusted.UnusableFileError as error:
            raise ArtifactError(f"{path} {error}") from error
        if not isinstance(weight_map, dict):
            raise LoaderRefusal(f"{path} has no weight_map")
        listed = {str(name) for name in weight_map.values()}
        if missing := sorted(listed - set(names)):
            raise LoaderRefusal(
                f"{path} names {untrusted.show_name(missing[0])}, which is not in the directory"
            )
        names = [name for name in names if name in listed]
    if not names:
        raise LoaderRefusal(f"{directory} holds no *.safetensors for vLLM to load")
    return [directory / name for name in names]


class LoaderModel:
    """The loader over one directory.

    `values` False runs over names, types and shapes only: parameters are `meta` tensors. `mtp`
    loads the MTP layers too, as `--speculative-config` does.

    Raises on opening:
        LoaderRefusal: its loader would stop at the config, or holds a tensor that it has no
            parameter for.
        ArtifactError: a file is damaged.
        ConfigError: config.json describes no model of the family.
    """

    def __init__(
        self, directory: Path, ranks: RankLayout, *, values: bool = True, mtp: bool = False
    ) -> None:
        self.directory = directory
        self.ranks = ranks
        self.mtp = mtp
        self.config = ModelConfig.from_directory(directory)
        if self.config.has_indexer:
            raise LoaderRefusal(
                f"{directory} is a model with an indexer (DeepSeek-V3.2), whose loader in vLLM is "
                "not modeled here"
            )
        if mtp and not self.config.num_nextn_predict_layers:
            raise LoaderRefusal(
                f"{directory / 'config.json'} has num_nextn_predict_layers 0, so vLLM finds no MTP "
                "layer; build with --mtp, or serve without speculative-config"
            )
        if self.config.num_attention_heads % ranks.tp:
            raise LoaderRefusal(
                f"{directory}: tensor-parallel-size {ranks.tp} does not divide the "
                f"{self.config.num_attention_heads} attention heads"
            )
        self.quant = read_quant_config(directory)
        files = weight_files(directory)
        self.checkpoint = Checkpoint(directory, files, values=values, loader="vLLM")
        #: Key or parameter -> what vLLM does without a word although it is wrong.
        self.silent: dict[str, str] = {}
        #: Rank -> what it read and holds of all that was loaded so far.
        self.loads: dict[int, RankLoad] = {}
        self._methods: dict[str, Method] = {}
        self._check_keys()
        for key, names in self.checkpoint.duplicates.items():
            self.silent[key] = f"is in {' and '.join(names)}; whichever is read last wins"

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

    def modules(self, rank: int, layer: LayerKey) -> Iterator[Module]:
        """The modules of one rank, of one layer or of what is outside the layers."""
        found = RankModules(self.config, self.quant, self.ranks, rank, self._methods)
        yield from found.globals() if layer == "globals" else found.layer(layer)

    def load(
        self, rank: int, layer: LayerKey | None = None
    ) -> Iterator[tuple[Module, dict[str, Tensor]]]:
        """The modules of one rank with their parameters, one after the other: never the whole model
        in memory. With `layer` those of one layer only, or of what is outside the layers.

        Raises:
            LoaderRefusal: the loader would stop; the sentence names the key or module and the rule.
        """
        assert 0 <= rank < self.ranks.tp, rank
        for key in self.layers if layer is None else [layer]:
            before, held = self.checkpoint.read_bytes, 0
            for module in self.modules(rank, key):
                parameters = self._fill(module)
                held += sum(t.numel() * t.element_size() for t in parameters.values())
                yield module, parameters
            done = self.loads.get(rank, RankLoad(0, 0))
            read = self.checkpoint.read_bytes - before
            self.loads[rank] = RankLoad(done.read_bytes + read, done.held_bytes + held)

    # --- names ---

    def _check_keys(self) -> None:
        """Check that every key of the files has a parameter.

        Raises:
            LoaderRefusal: one has none; vLLM fails with a KeyError.
        """
        config = self.config
        parameters: dict[str, set[str]] = {}
        for layer in self.layers:
            for module in self.modules(0, layer):
                for name in _checkpoint_modules(module, config.n_routed_experts):
                    parameters.setdefault(name, set()).update(_suffixes(module))
        drafts = tuple(
            f"model.layers.{layer}."
            for layer in range(config.num_hidden_layers, config.num_layers_with_mtp)
        )
        for key in self.checkpoint:
            owner, _, suffix = key.rpartition(".")
            if suffix in parameters.get(owner, ()):
                continue
            if key.startswith(drafts) and not self.mtp:
                continue  # the main model skips them
            if not key.endswith(_IGNORED) and "rotary_emb.inv_freq" not in key:
                raise LoaderRefusal(
                    f"{self.checkpoint.file(key)} holds {key}, for which vLLM has no parameter "
                    "with this quantization_config"
                )

    # --- values ---

    def _fill(self, module: Module) -> dict[str, Tensor]:
        filler = Filler(self.checkpoint, self.silent)
        if isinstance(module, Plain):
            created = {module.suffix: self._empty((module.shape, module.dtype))}
            key = f"{module.name}.{module.suffix}"
            if self._has(key, module.name):
                filler.plain(key, module, created[module.suffix])
            return created
        if isinstance(module, Linear):
            created = {n: self._empty(p) for n, p in module.parameters(module.inputs).items()}
            parent = module.name.rpartition(".")[0]
            for part in module.parts:
                for suffix, parameter in created.items():
                    key = f"{parent}.{part.role}.{suffix}"
                    if self._has(key, module.name):
                        filler.linear(key, module, part, suffix, parameter)
            return created
        created = {name: self._empty(p) for name, p in module.parameters().items()}
        for index in range(module.count):
            for role, slot in _SLOT.items():
                for name, parameter in created.items():
                    which, _, suffix = name.partition("_")
                    key = f"{module.name}.{module.first + index}.{role}.{suffix}"
                    if which == slot and self._has(key, module.name):
                        filler.expert(key, module, index, role, suffix, parameter)
        return created

    def _empty(self, parameter: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
        shape, dtype = parameter
        return torch.empty(shape, dtype=dtype, device="cpu" if self.checkpoint.values else "meta")

    def _has(self, key: str, module: str) -> bool:
        """Whether the files hold a key. Without it vLLM leaves the parameter as memory happens to
        be, and notices that in an unquantized model only."""
        if key in self.checkpoint:
            return True
        if self.quant.kind is None:
            raise LoaderRefusal(
                f"{self.directory} lacks the tensor {key}, which vLLM reads for {module}"
            )
        self.silent.setdefault(
            key, f"is in no file, so that {module} keeps what memory happens to hold"
        )
        return False


def _checkpoint_modules(module: Module, experts: int) -> list[str]:
    """The checkpoint's modules that a module of vLLM is made of."""
    if isinstance(module, Plain):
        return [module.name]
    if isinstance(module, Linear):
        parent = module.name.rpartition(".")[0]
        return [f"{parent}.{part.role}" for part in module.parts]
    return [f"{module.name}.{n}.{role}" for n in range(experts) for role in _SLOT]


def _suffixes(module: Module) -> set[str]:
    if isinstance(module, Plain):
        return {module.suffix}
    if isinstance(module, Linear):
        return set(module.parameters(module.inputs))
    return {name.partition("_")[2] for name in module.parameters()}

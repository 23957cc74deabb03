"""The loader over one directory, of an engine that says what is its own."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.engine_checks import RankLoad
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import Checkpoint, LoaderRefusal
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.fused_loader.fill import Filler
from deepseek.fused_loader.modules import Experts, Linear, Method, Module, Plain
from deepseek.fused_loader.rank_modules import QuantConfig, RankModules

_INDEX = "model.safetensors.index.json"
_SLOT = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def weight_files(directory: Path, name: str) -> list[Path]:
    """The tensor files that the loader takes, by name: of all `*.safetensors` those that the index
    names, if there is an index. `name` is the engine's.

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
        raise LoaderRefusal(f"{directory} holds no *.safetensors for {name} to load")
    return [directory / name for name in names]


class LoaderModel(ABC):
    """The loader over one directory, whose config chose the methods of `quant`.

    `values` False runs over names, types and shapes only: parameters are `meta` tensors. `mtp`
    loads the MTP layers too.

    Raises on opening:
        LoaderRefusal: the loader would stop at the config, or at a key.
        ArtifactError: a file is damaged.
        ConfigError: config.json describes no model of the family.
    """

    #: The engine's name in sentences, and its option that drafts with an MTP layer.
    name: ClassVar[str]
    draft_option: ClassVar[str]
    modules_class: ClassVar[type[RankModules]]
    filler_class: ClassVar[type[Filler]]

    def __init__(self, directory: Path, ranks: RankLayout, *, values: bool, mtp: bool) -> None:
        self.directory = directory
        self.ranks = ranks
        self.mtp = mtp
        self.config = ModelConfig.from_directory(directory)
        if self.config.has_indexer:
            raise LoaderRefusal(
                f"{directory} is a model with an indexer (DeepSeek-V3.2), whose loader in "
                f"{self.name} is not modeled here"
            )
        if mtp and not self.config.num_nextn_predict_layers:
            raise LoaderRefusal(
                f"{directory / 'config.json'} has num_nextn_predict_layers 0, so {self.name} finds "
                f"no MTP layer; build with --mtp, or serve without {self.draft_option}"
            )
        if self.config.num_attention_heads % ranks.tp:
            raise LoaderRefusal(
                f"{directory}: tensor-parallel-size {ranks.tp} does not divide the "
                f"{self.config.num_attention_heads} attention heads"
            )
        self.quant = self.read_quant()
        files = weight_files(directory, self.name)
        self.checkpoint = Checkpoint(directory, files, values=values, loader=self.name)
        #: Key or parameter -> what the engine does without a word although it is wrong.
        self.silent: dict[str, str] = {}
        #: Rank -> what it read and holds of all that was loaded so far.
        self.loads: dict[int, RankLoad] = {}
        self._methods: dict[str, Method] = {}
        self._check_keys()
        for key, names in self.checkpoint.duplicates.items():
            self.silent[key] = f"is in {' and '.join(names)}; whichever is read last wins"

    @abstractmethod
    def read_quant(self) -> QuantConfig:
        """What the engine makes of config.json.

        Raises:
            LoaderRefusal: it would stop at it.
        """

    @abstractmethod
    def passes_over(self, key: str) -> bool:
        """Whether the loader goes on at a key that it has no parameter for."""

    def stops_without(self, key: str) -> bool:
        """Whether the loader stops where the files lack a key of one of its modules."""
        return False

    def skips(self, key: str, module: Linear, suffix: str) -> bool:
        """Whether a parameter of a linear stays as it is, and its key is not read.

        Raises:
            LoaderRefusal: the engine would stop at the key.
        """
        return False

    def initial(self, name: str) -> float | None:
        """The value that a parameter of experts has before it is filled, if the engine gives it
        one."""
        return None

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
        found = self.modules_class(self.config, self.quant, self.ranks, rank, self._methods)
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

    def _check_keys(self) -> None:
        """Check that every key of the files has a parameter, or is passed over.

        Raises:
            LoaderRefusal: one has none, at which the engine fails with a KeyError.
        """
        parameters: dict[str, set[str]] = {}
        for layer in self.layers:
            for module in self.modules(0, layer):
                for name in _checkpoint_modules(module, self.config.n_routed_experts):
                    parameters.setdefault(name, set()).update(_suffixes(module))
        for key in self.checkpoint:
            owner, _, suffix = key.rpartition(".")
            if suffix not in parameters.get(owner, ()) and not self.passes_over(key):
                raise LoaderRefusal(
                    f"{self.checkpoint.file(key)} holds {key}, for which {self.name} has no "
                    "parameter with this quantization_config"
                )

    def _fill(self, module: Module) -> dict[str, Tensor]:
        filler = self.filler_class(self.checkpoint, self.silent)
        if isinstance(module, Plain):
            created = {module.suffix: self._empty((module.shape, module.dtype))}
            key = f"{module.name}.{module.suffix}"
            if self._has(key, module.name):
                filler.plain(key, module, created[module.suffix])
            return created
        if isinstance(module, Linear):
            created = {n: self._empty(p) for n, p in module.parameters(module.inputs).items()}
            for part in module.parts:
                for suffix, parameter in created.items():
                    key = f"{module.module(part)}.{suffix}"
                    if not self.skips(key, module, suffix) and self._has(key, module.name):
                        filler.linear(key, module, part, suffix, parameter)
            return created
        return self._fill_experts(filler, module)

    def _fill_experts(self, filler: Filler, module: Experts) -> dict[str, Tensor]:
        created = {name: self._empty(p) for name, p in module.parameters().items()}
        for name, parameter in created.items():
            value = self.initial(name)
            if value is not None:
                parameter.fill_(value)
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
        """Whether the files hold a key. Without it the parameter stays as memory happens to be."""
        if key in self.checkpoint:
            return True
        if self.stops_without(key):
            raise LoaderRefusal(
                f"{self.directory} lacks the tensor {key}, which {self.name} reads for {module}"
            )
        self.silent.setdefault(
            key, f"is in no file, so that {module} keeps what memory happens to hold"
        )
        return False


def _checkpoint_modules(module: Module, experts: int) -> list[str]:
    """The checkpoint's modules that a module of the engine is made of."""
    if isinstance(module, Plain):
        return [module.name]
    if isinstance(module, Linear):
        return [module.module(part) for part in module.parts]
    return [f"{module.name}.{n}.{role}" for n in range(experts) for role in _SLOT]


def _suffixes(module: Module) -> set[str]:
    if isinstance(module, Plain):
        return {module.suffix}
    if isinstance(module, Linear):
        return set(module.parameters(module.inputs))
    return {name.partition("_")[2] for name in module.parameters()}

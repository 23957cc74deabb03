"""A model of how transformers loads a DeepSeek-V3 directory on any device, dequantizing.

Written from its public source and independent of what builds our directories (`layout.py`,
`quant_config.py`), so that it finds what the builder gets wrong. It says which keys are read, what
each parameter holds in which type, where the loader would stop, and which keys it only warns of.

    files   model.safetensors where there is one, else those that the index names
    method  quantization_config.quant_method; `dequantize` from the config, else the defaults of the
            quantizer: neither is what was judged, so that both are refused here
    decode  `compressed-tensors`: all routed experts by one scheme, all other linears by another
            (`get_experts_scheme`, `get_dense_scheme`); experts from packed words alone, or from FP8
            with a scale that broadcasts. `fp8`: tiles whose size follows from the shape of the
            scales. What has no scale is taken as it is

Not modeled: tensor and expert parallelism, the path without `dequantize`, FP8 kernels of GPUs, and
the MTP layers, which `generate(use_mtp=True)` loads from elsewhere.

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.loader_files import Checkpoint, LoaderRefusal
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.hf.loader_decode import Group, decode_packed, decode_tiles, read_groups
from deepseek.inventory import TensorSpec, expert_of, global_tensors, layer_tensors
from deepseek.source.index import INDEX_FILE

LOADER = "transformers"
#: Every name that its compressed-tensors quantizer collects for one weight.
_CT_NAMES = ("weight", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape")
_FP8_NAMES = ("weight", "weight_scale_inv")
#: `DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected`.
_IGNORED = "model.layers.61."
_SINGLE_FILE = "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The tensor files that the loader takes.

    Raises:
        LoaderRefusal: there is none.
        ArtifactError: the index is damaged.
    """
    if (directory / _SINGLE_FILE).exists():
        return [directory / _SINGLE_FILE]
    path = directory / INDEX_FILE
    if not path.exists():
        raise LoaderRefusal(
            f"{directory} has neither {_SINGLE_FILE} nor {INDEX_FILE}, where transformers finds "
            "the tensors; build again"
        )
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ArtifactError(f"{path} has no weight_map of plain file names; build again")
    return [directory / name for name in sorted(set(weight_map.values()))]


class LoaderModel:
    """The loader over one directory. `values` False runs over names, types and shapes only.

    Raises on opening:
        LoaderRefusal: it would stop at the config, or load another thing than was judged.
        ArtifactError: a file is damaged.
        ConfigError: config.json describes no model of the family.
    """

    def __init__(self, directory: Path, *, values: bool = True) -> None:
        self.directory = directory
        raw = _json(directory / "config.json")
        if raw.get("model_type") != "deepseek_v3":
            raise LoaderRefusal(
                f"{directory / 'config.json'} has model_type "
                f"{untrusted.show(raw.get('model_type'))}, and only that of deepseek_v3 is known "
                "to be loaded by transformers; build again"
            )
        self.config = ModelConfig.from_dict(raw)
        self._read_method(raw.get("quantization_config"))
        files = weight_files(directory)
        self.checkpoint = Checkpoint(directory, files, values=values, loader=LOADER)

    def load(self, layer: LayerKey) -> Iterator[tuple[TensorSpec, Tensor]]:
        """What the model holds of every tensor of one layer, or of those outside: the parameters
        before routed experts are fused, in the type that they have in memory.

        Raises:
            LoaderRefusal: the loader would stop; the sentence names the linear and the rule.
        """
        specs = global_tensors(self.config) if layer == "globals" else self._specs(layer)
        for spec in specs:
            yield spec, self._parameter(spec)

    @property
    def layers(self) -> list[LayerKey]:
        """What `load` takes, in order."""
        return [*range(self.config.num_hidden_layers), "globals"]

    def unread(self) -> list[str]:
        """Keys that the loader reports as unexpected and drops, of all that was loaded so far."""
        return [key for key in self.checkpoint.unread() if not key.startswith(_IGNORED)]

    def ignored(self) -> list[str]:
        """Keys that it drops without a word: all of a layer 61 that the model does not have."""
        return [key for key in self.checkpoint.unread() if key.startswith(_IGNORED)]

    def _specs(self, layer: int) -> Iterator[TensorSpec]:
        return layer_tensors(self.config, layer)

    def _read_method(self, found: Any) -> None:
        path = self.directory / "config.json"
        self._groups: list[Group] = []
        if found is None:
            self.method = "bf16"
            return
        if not isinstance(found, dict):
            raise LoaderRefusal(f"{path}: quantization_config is no object; build again")
        self.method = str(found.get("quant_method"))
        if self.method not in ("compressed-tensors", "fp8"):
            raise LoaderRefusal(
                f"{path} has quant_method {untrusted.show(found.get('quant_method'))}; build again"
            )
        if found.get("dequantize") is not True:
            raise LoaderRefusal(
                f"{path}: quantization_config does not say dequantize, and transformers would "
                "quantize the inputs of some linears at every forward pass; build again"
            )
        if self.method == "compressed-tensors":
            self._groups = read_groups(found, where=str(path))

    def _parameter(self, spec: TensorSpec) -> Tensor:
        if not spec.name.endswith(".weight"):
            return self.checkpoint.take(spec.name)  # the router's bias: kept in FP32
        names: tuple[str, ...] = _FP8_NAMES if self.method == "fp8" else _CT_NAMES
        if self.method == "bf16":
            names = ("weight",)
        found = [name for name in names if f"{spec.module}.{name}" in self.checkpoint]
        parts = {name: self.checkpoint.take(f"{spec.module}.{name}") for name in found}
        if not parts:
            raise LoaderRefusal(
                f"{self.directory} lacks the tensor {spec.name}, which transformers would make up "
                "at random; build again"
            )
        where = f"{self.directory}: {spec.module}"
        if self.method == "fp8":
            value = decode_tiles(parts, where)
        elif self.method == "bf16":
            value = parts["weight"].to(torch.bfloat16)
        elif expert_of(spec.module) is not None:
            value = self._expert(parts, where)
        else:
            value = self._dense(parts, where)
        if tuple(value.shape) != spec.shape:
            raise LoaderRefusal(
                f"{where} would be {list(value.shape)} in transformers, where the model has "
                f"{list(spec.shape)}; build again"
            )
        return value

    def _dense(self, parts: dict[str, Tensor], where: str) -> Tensor:
        """`CompressedTensorsDequantize.convert`, the general converter: whatever has a scale is
        decoded by the scheme of the dense group, and all is cast to the model's type."""
        if "weight_scale" not in parts:
            if "weight" not in parts:
                raise LoaderRefusal(f"{where} has no weight_scale; build again")
            return parts["weight"].to(torch.bfloat16)
        plain = (group for group in self._groups if not group.names_experts)
        group = next(plain, self._groups[0])
        return group.decode(parts, where).to(torch.bfloat16)

    def _expert(self, parts: dict[str, Tensor], where: str) -> Tensor:
        """The same for routed experts: packed words without zero points, in the type of their
        scales, or FP8 with a scale that broadcasts."""
        named = (group for group in self._groups if group.names_experts)
        by_class = (group for group in self._groups if group.names_class)
        group = next(named, next(by_class, self._groups[0]))
        if group.is_fp8:
            if "weight_scale" not in parts:
                return parts["weight"]
            try:
                product = parts["weight"].float() * parts["weight_scale"].float()
            except RuntimeError:
                raise LoaderRefusal(
                    f"{where} is in FP8 tiles, and transformers multiplies an expert by its scales "
                    "without spreading them over the tiles; build again"
                ) from None
            return product.to(torch.bfloat16)
        if "weight_packed" not in parts:
            raise LoaderRefusal(
                f"{where} is not packed, and transformers reads integers of routed experts from "
                "packed words only; build again"
            )
        if not group.symmetric:
            raise LoaderRefusal(
                f"{where} has zero points, which transformers drops for routed experts; build again"
            )
        return decode_packed(parts, group, where)


def _json(path: Path) -> dict[str, Any]:
    try:
        return untrusted.read_json_object(path, root=path.parent)
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; build again") from error

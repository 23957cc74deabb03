"""A directory that was built for TensorRT-LLM, read back as the model that its runtime computes
with.

    stored       executed
    INT4         codes as they are, BF16 scales; FP8 inputs with one static scale for gate and up of
                 all experts of a layer, and one for down (`WInt4AFP8FusedMoEMethod`)
    INT8         codes as they are, scales in BF16; inputs are not quantized (W8A16)
    FP8 tiles    bit for bit
    BF16         bit for bit, also what was FP8 tiles in the artifact (dialect `single`)

The embedded engine executes it in TensorRT-LLM's arithmetic (`deepseek/engine/arithmetic.py`), so
that an evaluation judges what the target computes and not what the artifact says. What is read here
follows from the layout that the builder writes; `loader_decode.py` follows from the loader's source
alone, and tests compare the two value by value.

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.layered_reader import LayeredReader
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.formats import pack_int8
from deepseek.recipe import Scheme
from deepseek.trtllm.check_files import check_config, read_trtllm_manifest
from deepseek.trtllm.layout import stored_tensors


class TrtllmStoredModel:
    """A `StoredModel` over an engine directory of target trtllm, verified as it is read.

    Raises on opening:
        ArtifactError, DeployError, ConfigError: the directory is no such engine, or its documents
            disagree with each other.
    """

    def __init__(self, directory: Path) -> None:
        manifest, fields = read_trtllm_manifest(directory)
        built = read_engine(directory)
        self._stored = check_config(directory, built, manifest, fields)
        self._config = built.config
        self._schemes = {module: _executed(scheme) for module, scheme in self._stored.items()}
        layers = stored_layers(self._config, mtp=fields.mtp == "kept")
        self._reader = LayeredReader(directory, manifest, layers, self._layout)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer; see `StoredModel`."""
        stored, layout = self._reader.read(layer), self._layout(layer)
        tensors: dict[str, Tensor] = {}
        for name, tensor in layout.items():
            tensors |= self._convert(name, tensor, stored)
            del stored[name]
        return tensors | _runtime_input_scales(tensors)

    def read_globals(self) -> dict[str, Tensor]:
        """Embedding, final norm and head; see `StoredModel`."""
        return self._reader.read("globals")

    def finish(self) -> None:
        """Check that every tensor was read; see `StoredModel`."""
        self._reader.finish()

    def _layout(self, layer: LayerKey) -> dict[str, StoredTensor]:
        return stored_tensors(self._config, self._stored, layer)

    def _convert(
        self, name: str, tensor: StoredTensor, stored: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One tensor of the directory in the artifact's form, by the artifact's names."""
        values, module = stored[name], tensor.spec.module
        if tensor.spec.kind != "linear":
            return {name: values}
        match self._stored[module].weights, tensor.suffix:
            case "int4", "weight":  # two's complement -> code + 8 in every nibble
                packed = values.view(torch.uint8).bitwise_xor(0x88).view(torch.int32)
                return _packed(module, packed, tensor)
            case "int8", "weight":
                return _packed(module, pack_int8(values), tensor)
            case "int8", "weight_scale":  # BF16 [N] -> f32 [N, 1], the same values
                return {name: values.float().unsqueeze(1)}
            case _, "weight_scale_inv":
                return {f"{module}.weight_scale": values}
            case _:
                return {name: values}


def _executed(scheme: Scheme) -> Scheme:
    """The scheme that the runtime computes a stored linear with."""
    match scheme.weights:
        case "int4":
            return scheme.model_copy(update={"activations": "fp8"})
        case "int8":
            return scheme.model_copy(update={"activations": "none"})
        case _:
            return scheme


def _packed(module: str, packed: Tensor, tensor: StoredTensor) -> dict[str, Tensor]:
    shape = torch.tensor(tensor.spec.shape, dtype=torch.int64)
    return {f"{module}.weight_packed": packed, f"{module}.weight_shape": shape}


def _runtime_input_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The input scale of every INT4 expert as the runtime ends up with it, f32 [1]: the largest of
    the layer for gate and up, the largest for down rounded to BF16.

    A rank takes the largest of down among its own experts; `check_input_scales` has all experts of
    a layer share one value, so that it does not matter how many ranks there are.
    """
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".input_scale")}
    is_down = {name: name.endswith(".down_proj.input_scale") for name in scales}
    shared: dict[bool, Tensor] = {}
    for down in set(is_down.values()):
        largest = torch.stack([scales[name] for name in scales if is_down[name] == down]).amax(0)
        shared[down] = largest.to(torch.bfloat16).float() if down else largest
    return {name: shared[down] for name, down in is_down.items()}

"""A directory that was built for SGLang, read back as the model that it computes with.

    stored             executed
    INT4, w4afp8       codes as they are, BF16 scales; FP8 inputs with one static scale for gate and
                       up of all experts of a layer, and one for down
    INT8, w8a8_int8    codes and F32 scales as they are; inputs quantized per token while it runs
    INT8 tiles         codes and F32 scales as they are; inputs quantized per token and 128 channels
    INT4, INT8 packed  codes and zero points as they are, BF16 scales; inputs are not quantized
    FP8 tiles, BF16    bit for bit
    kv_b_proj          BF16: its absorbed MLA multiplies by the weight taken apart by head. INT8 per
                       channel is code times scale with both in BF16, tiles are code times scale in
                       F32, rounded once (`post_load_weights`)

Where a prompt is long and its prefix empty, SGLang runs kv_b_proj as any other linear instead, with
quantized inputs where the layout has them; that is not what is executed here. The embedded engine
executes this in SGLang's arithmetic (`deepseek/engine/arithmetic.py`).

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_checks import read_target_manifest
from deepseek.artifact.layered_reader import LayeredReader
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.tensors import pop_linear
from deepseek.config import ModelConfig
from deepseek.formats import decompress
from deepseek.inventory import linears
from deepseek.recipe import Scheme
from deepseek.sglang.check import check_config
from deepseek.sglang.fields import LOADER, TARGET, SglangFields
from deepseek.sglang.layout import stored_tensors

_BF16 = Scheme(weights="bf16")


class SglangStoredModel:
    """A `StoredModel` over an engine directory of target sglang, verified as it is read.

    Raises on opening:
        ArtifactError, DeployError, ConfigError: the directory is no such engine, or its documents
            disagree with each other.
    """

    def __init__(self, directory: Path) -> None:
        manifest, fields = read_target_manifest(directory, TARGET, LOADER, SglangFields)
        built = read_engine(directory)
        self._stored = check_config(directory, built, manifest, fields)
        self._dialect = fields.dialect
        self._config = built.config
        self._held = {m: self._as_held(scheme) for m, scheme in self._stored.items()}
        layers = stored_layers(self._config, mtp=fields.mtp == "kept")
        self._reader = LayeredReader(directory, manifest, layers, self._layout)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return {m: _BF16 if _is_kv_b(m) else scheme for m, scheme in self._held.items()}

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer; see `StoredModel`."""
        stored = self._reader.read(layer)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._layout(layer).items():
            tensors |= self._convert(name, tensor, stored.pop(name))
        for spec in linears(self._config, layer):
            scheme, shape = self._held[spec.module], (spec.shape[0], spec.shape[1])
            if f"{spec.module}.weight_packed" in tensors:
                tensors[f"{spec.module}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
            if _is_kv_b(spec.module):
                parts = pop_linear(tensors, spec.module, scheme)
                tensors[spec.name] = _kv_b(parts, scheme, shape)
        return tensors | _runtime_input_scales(tensors)

    def read_globals(self) -> dict[str, Tensor]:
        """Embedding, final norm and head; see `StoredModel`."""
        return self._reader.read("globals")

    def finish(self) -> None:
        """Check that every tensor was read; see `StoredModel`."""
        self._reader.finish()

    def _layout(self, layer: LayerKey) -> dict[str, StoredTensor]:
        return stored_tensors(self._config, self._stored, layer, self._dialect)

    def _as_held(self, scheme: Scheme) -> Scheme:
        if self._dialect == "w4afp8" and scheme.weights == "int4":
            return scheme.model_copy(update={"activations": "fp8"})
        return scheme

    def _convert(self, name: str, tensor: StoredTensor, values: Tensor) -> dict[str, Tensor]:
        """One tensor of the directory in the artifact's form, by the artifact's name."""
        module = tensor.spec.module
        if tensor.spec.kind != "linear":
            return {name: values}
        scheme = self._stored[module]
        match tensor.suffix:
            case "weight" if scheme.weights == "int4":  # two's complement -> code + 8
                packed = values.view(torch.uint8).bitwise_xor(0x88).view(torch.int32)
                return {f"{module}.weight_packed": packed}
            case "weight_scale_inv":
                return {f"{module}.weight_scale": values}
            case "weight_scale" if scheme.weights in ("int8", "int8-asym"):
                return {name: values.float()}  # the artifact's form; BF16 as SGLang holds it
        return {name: values}


def _is_kv_b(module: str) -> bool:
    return module.endswith(".kv_b_proj")


def _kv_b(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """The weight of kv_b_proj, BF16 [N, K], as `post_load_weights` makes it."""
    if scheme.weights == "int8":
        return parts["weight"].to(torch.bfloat16) * parts["weight_scale"].to(torch.bfloat16)
    return decompress(parts, scheme, shape).to(torch.bfloat16)


def _runtime_input_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The input scale of every INT4 expert as SGLang ends up with it, f32 [1]: the largest of the
    layer, for gate and up and for down, rounded to BF16. A rank takes the largest of its own
    experts; `check_input_scales` has all of a layer share one value, so that it does not matter."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".input_scale")}
    is_down = {name: name.endswith(".down_proj.input_scale") for name in scales}
    shared = {
        down: torch.stack([scales[name] for name in scales if is_down[name] == down])
        .to(torch.bfloat16)
        .float()
        .amax(0)
        for down in set(is_down.values())
    }
    return {name: shared[down] for name, down in is_down.items()}

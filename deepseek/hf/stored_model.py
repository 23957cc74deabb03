"""A transformers directory, read back as the model that it computes with.

Weights are dequantized to BF16, rounded once, and no input is quantized, so that every linear is a
BF16 one. The exception is a routed expert whose scales are FP32 per channel (INT8): transformers
holds it in FP32, so here it stays INT8 without quantized inputs, which has the same values. INT8
experts in groups are held in FP32 there too, and are rounded to BF16 here.

What is read here follows from the layout that the builder writes; `loader.py` follows from
transformers' source alone, and tests compare the two value by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.layered_reader import LayeredReader
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.formats import dequantize_fp8_block, unpack_int4, unpack_int8, unpack_zero_point
from deepseek.hf.check import read_checked
from deepseek.hf.layout import Form, stored_tensors
from deepseek.inventory import TensorSpec, expert_of, global_tensors, layer_tensors
from deepseek.recipe import Scheme

_BF16, _INT8 = Scheme(weights="bf16"), Scheme(weights="int8")


class TransformersStoredModel:
    """A `StoredModel` over a directory of target transformers, verified as it is read.

    Raises on opening:
        ArtifactError, DeployError, ConfigError: the directory is no such engine, or its documents
            disagree with each other.
    """

    def __init__(self, directory: Path) -> None:
        engine, _, built, stored = read_checked(directory)
        self._config, self._stored = built.config, stored
        self._schemes = {
            module: _INT8 if expert_of(module) is not None and form == Form("packed", 8) else _BF16
            for module, form in stored.forms.items()
        }
        layers = stored_layers(built.config, mtp=False)
        self._reader = LayeredReader(directory, engine, layers, self._layout)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer; see `StoredModel`."""
        return self._read(layer, layer_tensors(self._config, layer))

    def _read(self, layer: LayerKey, specs: Iterable[TensorSpec]) -> dict[str, Tensor]:
        tensors = self._reader.read(layer)
        for spec in specs:
            if spec.module not in self._schemes or self._schemes[spec.module] == _INT8:
                continue
            form = self._stored.forms[spec.module]
            parts = {
                suffix: tensors.pop(f"{spec.module}.{suffix}")
                for suffix in _suffixes(form, self._stored.method)
            }
            value = _decode(parts, form, spec.shape[0], spec.shape[1])
            tensors[spec.name] = value.to(torch.bfloat16)
        return tensors

    def read_globals(self) -> dict[str, Tensor]:
        """Embedding, final norm and head; see `StoredModel`."""
        return self._read("globals", global_tensors(self._config))

    def finish(self) -> None:
        """Check that every tensor was read; see `StoredModel`."""
        self._reader.finish()

    def _layout(self, layer: LayerKey) -> dict[str, StoredTensor]:
        return stored_tensors(self._config, self._stored, layer)


def _suffixes(form: Form, method: str) -> tuple[str, ...]:
    match form.kind:
        case "bf16":
            return ("weight",)
        case "tiles":
            return ("weight", "weight_scale_inv" if method == "fp8" else "weight_scale")
        case "packed":
            zeros = ("weight_zero_point",) if form.zero_points else ()
            return ("weight_packed", "weight_scale", "weight_shape", *zeros)


def _decode(parts: Mapping[str, Tensor], form: Form, outputs: int, inputs: int) -> Tensor:
    """A linear [N, K] in FP32."""
    if form.kind == "bf16":
        return parts["weight"]
    if form.kind == "tiles":
        codes, scale = parts.values()
        return dequantize_fp8_block(codes, scale)
    unpack = unpack_int4 if form.bits == 4 else unpack_int8
    codes = unpack(parts["weight_packed"], inputs).float()
    repeat = form.group_size or inputs
    if form.zero_points:
        zeros = unpack_zero_point(parts["weight_zero_point"], outputs, form.bits)
        codes -= zeros.float().repeat_interleave(repeat, 1)[:, :inputs]
    return codes * parts["weight_scale"].float().repeat_interleave(repeat, 1)[:, :inputs]

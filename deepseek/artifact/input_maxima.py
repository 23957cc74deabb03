"""The largest inputs that calibration saw of each routed expert: `input_maxima.json`.

    {"format_version": 1, "layers": {"3": {"gate_up": [E floats], "down": [E floats]}, ...}}

A target whose experts multiply FP8 inputs by a static scale (TensorRT-LLM's W4A8) has one scale per
layer for the inputs of gate and up, and one for those of down; `build` chooses both from these
values. They lie in a file of their own beside the tensors, listed in the manifest with its SHA-256:
as tensors of the checkpoint, vLLM would refuse them. `quantize` writes the file for every recipe
that quantizes routed experts, `quant_jobs measure` for an artifact that has none.

Each value is the largest magnitude of the input over the calibration tokens that the expert was
measured on, folded smoothing included; 0 for an expert that the router sent none. This file imports
no torch.
"""

from __future__ import annotations

import json
import statistics
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deepseek import untrusted
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.inventory import linears
from deepseek.recipe import Scheme
from deepseek.untrusted import UnusableFileError

INPUT_MAXIMA_FILE = "input_maxima.json"
FORMAT_VERSION = 1

#: An input of a routed expert: that of gate and up, or that of down.
ExpertInput = Literal["gate_up", "down"]
INPUTS: tuple[ExpertInput, ...] = ("gate_up", "down")

#: An expert whose input is larger than this many times the median of its layer is an outlier.
OUTLIER_RATIO = 8.0


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerMaxima(_Record):
    """The maxima of one MoE layer: one value per routed expert, float32 as measured."""

    gate_up: tuple[float, ...]
    down: tuple[float, ...]

    def of(self, kind: ExpertInput) -> tuple[float, ...]:
        """The maxima of one of the two inputs, by expert."""
        return self.gate_up if kind == "gate_up" else self.down


class InputMaxima(_Record):
    """The whole of input_maxima.json: the maxima by MoE layer."""

    layers: dict[int, LayerMaxima]

    def to_bytes(self) -> bytes:
        """The content of the file: the same values, the same bytes. One line per layer."""
        rows = ",\n".join(
            f'    "{layer}": ' + json.dumps({kind: list(values.of(kind)) for kind in INPUTS})
            for layer, values in sorted(self.layers.items())
        )
        head = f'{{\n  "format_version": {FORMAT_VERSION},\n  "layers": {{\n'
        return f"{head}{rows}\n  }}\n}}\n".encode()


class InputOutlier(_Record):
    """A routed expert whose input is far larger than those of the other experts of its layer:
    `ratio` times their median."""

    layer: int = Field(ge=0)
    input: ExpertInput
    expert: int = Field(ge=0)
    ratio: float = Field(gt=OUTLIER_RATIO)

    def describe(self) -> str:
        """`layer 3, down input of expert 17: 31.2 times the median of its layer`."""
        kind = "gate and up" if self.input == "gate_up" else "down"
        return (
            f"layer {self.layer}, {kind} input of expert {self.expert}: {self.ratio:.3g} times the "
            "median of its layer"
        )


def find_outliers(maxima: InputMaxima) -> tuple[InputOutlier, ...]:
    """The experts whose input is more than `OUTLIER_RATIO` times the median over the experts of
    their layer that saw anything but zeros; by layer, input and expert."""
    return tuple(
        InputOutlier(layer=layer, input=kind, expert=expert, ratio=value / median)
        for layer, of_layer in sorted(maxima.layers.items())
        for kind in INPUTS
        if (median := median_maximum(of_layer.of(kind)))
        for expert, value in enumerate(of_layer.of(kind))
        if value > OUTLIER_RATIO * median
    )


def median_maximum(values: tuple[float, ...]) -> float:
    """The median of the experts that saw anything but zeros; 0 where none did."""
    seen = [value for value in values if value > 0]
    return statistics.median(seen) if seen else 0.0


def moe_layers(config: ModelConfig) -> list[int]:
    """The decoder layers with routed experts; MTP layers are not among them."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]


def quantizes_experts(config: ModelConfig, schemes: Mapping[str, Scheme]) -> bool:
    """Whether any routed expert is quantized. If so, calibration keeps the maxima of all experts of
    all MoE layers; if not, it keeps none."""
    return any(
        schemes[spec.module].is_quantized
        for layer in moe_layers(config)
        for spec in linears(config, layer)
        if spec.expert is not None
    )


def parse_input_maxima(data: bytes, config: ModelConfig, path: Path) -> InputMaxima:
    """The maxima that the bytes of `path` hold, which must be of exactly the MoE layers and routed
    experts of `config`.

    Raises:
        ArtifactError: they are not, or a value is no float32, negative or not finite; the sentence
            says which.
    """
    try:
        return _parse(untrusted.parse_json_object(data), config)
    except UnusableFileError as error:
        raise ArtifactError(
            f"{path} {error}; restore it, or measure it anew with `python -m quant_jobs measure`"
        ) from error


def _parse(raw: dict[str, Any], config: ModelConfig) -> InputMaxima:
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnusableFileError(
            f"has format_version {untrusted.show(version)}, and only {FORMAT_VERSION} is known"
        )
    if unknown := sorted(raw.keys() - {"format_version", "layers"}):
        raise UnusableFileError(f"has the unknown field {untrusted.show_name(unknown[0])}")
    layers = raw.get("layers")
    if not isinstance(layers, dict):
        raise UnusableFileError(f"must map layers to maxima, not be {untrusted.json_kind(layers)}")
    expected = {str(layer): layer for layer in moe_layers(config)}
    if missing := [name for name in expected if name not in layers]:
        raise UnusableFileError(f"lacks layer {missing[0]} of the model")
    if foreign := sorted(layers.keys() - expected.keys()):
        raise UnusableFileError(
            f"has a layer {untrusted.show_name(foreign[0])}, which is no MoE layer of the model"
        )
    return InputMaxima(
        layers={number: _layer(layers[name], name, config) for name, number in expected.items()}
    )


def _layer(raw: Any, name: str, config: ModelConfig) -> LayerMaxima:
    if not isinstance(raw, dict) or raw.keys() != set(INPUTS):
        raise UnusableFileError(f"must have exactly {' and '.join(INPUTS)} for layer {name}")
    return LayerMaxima(**{kind: _values(raw[kind], f"{kind} of layer {name}", config)
                          for kind in INPUTS})  # fmt: skip


def _values(raw: Any, where: str, config: ModelConfig) -> tuple[float, ...]:
    if not isinstance(raw, list) or len(raw) != config.n_routed_experts:
        number = f"{len(raw)} values" if isinstance(raw, list) else untrusted.json_kind(raw)
        raise UnusableFileError(
            f"has {number} for {where}, and the model has {config.n_routed_experts} routed experts"
        )
    for expert, value in enumerate(raw):
        if type(value) not in (int, float) or not _is_magnitude(value):
            raise UnusableFileError(
                f"has {untrusted.show(value)} for expert {expert} in {where}, which is no magnitude"
                " in float32"
            )
    return tuple(float(value) for value in raw)


def _is_magnitude(value: float) -> bool:
    """Whether it is a finite float32 of no sign."""
    try:
        number = float(value)
        (single,) = struct.unpack("<f", struct.pack("<f", number))
    except OverflowError:
        return False
    return bool(single == number) and 0.0 <= number < float("inf")

"""The tensors of a transformers directory: names, types and shapes, from shapes alone.

transformers' compressed-tensors quantizer dequantizes while it loads, and it decides by the config,
not by the tensor: one scheme for all routed experts and one for all other linears. The experts are
read from packed words only, and without zero points. Its FP8 quantizer reads tiles of 128 x 128
that fill the matrix, and no integers. So a directory is in one of three methods, the first that can
say the recipe:

    fp8                 the only quantized format is FP8 tiles: as the release stores them; a linear
                        whose last tile is partial (kv_a of DeepSeek-V3, 576 rows) is BF16
    compressed-tensors  routed experts are integers without 8-bit zero points: packed words, one
                        form for all experts and one for all other linears
    bf16                everything else: a checkpoint without quantization

    form      stored tensors of one linear, [N, K]
    packed    weight_packed I32 [N, K bits/32]; weight_scale [N, 1] or [N, K/g], F32 or BF16;
              weight_shape I64 [2]; weight_zero_point I32 [N bits/32, ...] (no expert)
    tiles     weight F8_E4M3 [N, K]; weight_scale F32 [N/128, K/128], in `fp8` weight_scale_inv
    bf16      weight BF16 [N, K]

What is not stored as the artifact has it has the same values all the same, but for BF16:

    INT8 with INT8 activations   the codes packed; activations are not quantized
    INT4 with FP8 activations    without input_scale; activations are not quantized
    INT4 with zero points        experts: code - zero point, from -15 to 15, in eight bits
    INT8 tiles                   packed; the scale of a tile in each of its rows, groups of 128
    several integer forms        codes in eight bits, scales F32, the smallest group of all
    INT8 zero points, FP8 tiles  experts: BF16, rounded once, and then everything is

Read in transformers 5.23's `integrations/compressed_tensors.py`, `integrations/finegrained_fp8.py`
and `core_model_loading.py`. This file imports no torch.

N outputs · K inputs · g group size
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.inventory import TensorSpec, expert_of, global_tensors, is_within, layer_tensors
from deepseek.recipe import Scheme

Method = Literal["compressed-tensors", "fp8", "bf16"]
METHODS: tuple[Method, ...] = get_args(Method)
TILE = 128


@dataclass(frozen=True, slots=True)
class Form:
    """How one linear is stored; see the table above. `bits`, `group_size` (None: one scale per
    output), `zero_points` and `scales` (type of the scales) are of packed words."""

    kind: Literal["packed", "tiles", "bf16"]
    bits: int = 0
    group_size: int | None = None
    zero_points: bool = False
    scales: Literal["BF16", "F32"] = "F32"

    @property
    def label(self) -> str:
        """Short name for sentences: `INT8 in groups of 128`."""
        if self.kind != "packed":
            return "FP8 tiles" if self.kind == "tiles" else "BF16"
        groups = f" in groups of {self.group_size}" if self.group_size else " per channel"
        return f"INT{self.bits}{groups}{' with zero points' if self.zero_points else ''}"


BF16 = Form("bf16")
TILES = Form("tiles")


@dataclass(frozen=True, slots=True)
class Stored:
    """How a directory stores a model: the method that config.json names, and the form of every
    linear by module name. The MTP layers are left out."""

    method: Method
    forms: Mapping[str, Form]


def choose(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Stored:
    """How the linears of these schemes (none `source`) are stored."""
    kept = {m: s for m, s in schemes.items() if is_within(m, config.num_hidden_layers)}
    forms = {module: _native(scheme, expert_of(module)) for module, scheme in kept.items()}
    if {form.kind for form in forms.values()} <= {"tiles", "bf16"}:
        return _tiles(config, forms)
    experts = {form for module, form in forms.items() if expert_of(module) is not None}
    if any(form.kind != "packed" for form in experts):
        return Stored("bf16", dict.fromkeys(forms, BF16))
    for of_experts in (True, False):
        modules = [m for m in forms if (expert_of(m) is not None) == of_experts]
        forms |= _unified({module: forms[module] for module in modules})
    return Stored("compressed-tensors", forms)


def stored_tensors(config: ModelConfig, stored: Stored, layer: LayerKey) -> dict[str, StoredTensor]:
    """Every tensor of one file by full name.

    What is not a linear has the type of the release, BF16 or F32; a source may store another.
    """
    specs = global_tensors(config) if layer == "globals" else layer_tensors(config, layer)
    return {
        f"{spec.module}.{suffix}" if spec.module in stored.forms else spec.name: StoredTensor(
            dtype, shape, spec, suffix
        )
        for spec in specs
        for suffix, dtype, shape in _parts(spec, stored)
    }


def total_bytes(config: ModelConfig, stored: Stored) -> int:
    """Bytes of all tensors of the directory, headers of files apart."""
    return sum(
        tensor.num_bytes
        for layer in stored_layers(config, mtp=False)
        for tensor in stored_tensors(config, stored, layer).values()
    )


def _native(scheme: Scheme, expert: int | None) -> Form:
    """The form that keeps the values of one linear, were it alone."""
    grouped = Form("packed", 4, scheme.group_size, scales="BF16")
    match scheme.weights:
        case "int4":
            return grouped
        case "int4-asym":
            if expert is None:
                return replace(grouped, zero_points=True)
            return replace(grouped, bits=8)
        case "int8":
            return Form("packed", 8)
        case "int8-asym":
            return Form("packed", 8, zero_points=True) if expert is None else BF16
        case "int8-block":
            return Form("packed", 8, TILE)
        case "fp8-block":
            return TILES
        case _:
            return BF16


def _tiles(config: ModelConfig, forms: Mapping[str, Form]) -> Stored:
    """FP8 tiles where every tile is whole; a model without any is plain BF16."""
    shapes = {
        spec.module: spec.shape
        for layer in range(config.num_hidden_layers)
        for spec in layer_tensors(config, layer)
        if spec.kind == "linear"
    }
    chosen = {
        module: BF16 if any(size % TILE for size in shapes[module]) else form
        for module, form in forms.items()
    }
    return Stored("fp8" if TILES in chosen.values() else "bf16", chosen)


def _unified(forms: Mapping[str, Form]) -> dict[str, Form]:
    """The same linears in one quantized form, because the loader decodes all of them by one scheme;
    what has no place in it is BF16, which needs none."""
    quantized = {form for form in forms.values() if form.kind != "bf16"}
    if len(quantized) <= 1:
        return dict(forms)
    words = [form for form in quantized if form.kind == "packed"]
    foldable = [form for form in words if not (form.zero_points and form.bits == 8)]
    groups = [form.group_size for form in foldable if form.group_size is not None]
    common = Form("packed", 8, min(groups) if groups else None)
    return {m: common if form in foldable else BF16 for m, form in forms.items()}


def _parts(spec: TensorSpec, stored: Stored) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(suffix, type, shape) of each tensor that a tensor of the model is stored as."""
    if spec.module not in stored.forms:
        yield spec.role, "F32" if spec.kind == "float32" else "BF16", spec.shape
        return
    outputs, inputs = spec.shape
    form = stored.forms[spec.module]
    if form.kind == "bf16":
        yield "weight", "BF16", (outputs, inputs)
        return
    if form.kind == "tiles":
        yield "weight", "F8_E4M3", (outputs, inputs)
        name = "weight_scale_inv" if stored.method == "fp8" else "weight_scale"
        yield name, "F32", (math.ceil(outputs / TILE), math.ceil(inputs / TILE))
        return
    groups = math.ceil(inputs / form.group_size) if form.group_size else 1
    yield "weight_packed", "I32", (outputs, math.ceil(inputs * form.bits / 32))
    yield "weight_scale", form.scales, (outputs, groups)
    yield "weight_shape", "I64", (2,)
    if form.zero_points:
        yield "weight_zero_point", "I32", (math.ceil(outputs * form.bits / 32), groups)

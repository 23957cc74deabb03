"""One tensor of a transformers directory, made from those of a checkpoint.

Integers keep their values exactly: codes less their zero point fit into eight bits, and a scale
that several groups share is repeated. BF16 is the dequantized value in FP32, rounded once.

N outputs · K inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.artifact.layout import StoredTensor
from deepseek.formats import (
    TILE,
    decompress,
    int8_codes,
    pack_int8,
    stored_shapes,
    unpack_int4,
    unpack_zero_point,
)
from deepseek.hf.layout import Form
from deepseek.recipe import Scheme
from quant_jobs.targets.layered import Read


def make_tensor(tensor: StoredTensor, scheme: Scheme, form: Form, read: Read) -> Tensor:
    """One tensor of the directory, from those of the checkpoint that hold the same linear.

    `scheme` is the checkpoint's, `form` the directory's.
    """
    module, shape = tensor.spec.module, tensor.spec.shape
    if form.kind == "bf16":
        if scheme.weights == "bf16":
            return read(f"{module}.weight").to(torch.bfloat16)
        stored = _all(tensor, scheme, read)
        return decompress(stored, scheme, (shape[0], shape[1])).to(torch.bfloat16)
    if form.kind == "tiles":
        return read(f"{module}.{'weight' if tensor.suffix == 'weight' else 'weight_scale'}")
    match tensor.suffix:
        case "weight_packed":
            if _same_words(scheme, form):
                return read(f"{module}.weight_packed")
            return pack_int8(_codes(tensor, scheme, read))
        case "weight_scale":
            return _scales(read(f"{module}.weight_scale"), scheme, form, shape)
        case "weight_shape":
            return torch.tensor(shape, dtype=torch.int64)
        case "weight_zero_point":
            return read(f"{module}.weight_zero_point")
    raise AssertionError(f"{module}: no way to {tensor.suffix} of {scheme.label}")


def _all(tensor: StoredTensor, scheme: Scheme, read: Read) -> dict[str, Tensor]:
    shape = tensor.spec.shape
    names = stored_shapes(scheme, shape[0], shape[1]).keys() - {"input_scale"}
    return {name: read(f"{tensor.spec.module}.{name}") for name in names}


def _same_words(scheme: Scheme, form: Form) -> bool:
    """Whether the artifact's packed words are those of the form."""
    packed = scheme.weights.startswith("int4") or (
        scheme.weights in ("int8", "int8-asym") and scheme.activations == "none"
    )
    return packed and scheme.bits == form.bits and form.zero_points != scheme.is_symmetric


def _codes(tensor: StoredTensor, scheme: Scheme, read: Read) -> Tensor:
    """The codes less their zero points, int8 [N, K]."""
    module, (outputs, inputs) = tensor.spec.module, tensor.spec.shape
    if scheme.weights == "int8-block":
        return read(f"{module}.weight")
    if scheme.weights == "int8":
        name = "weight" if scheme.activations == "int8" else "weight_packed"
        return int8_codes({name: read(f"{module}.{name}")}, (outputs, inputs))
    codes = unpack_int4(read(f"{module}.weight_packed"), inputs)
    if scheme.weights == "int4-asym":
        assert scheme.group_size is not None
        zeros = unpack_zero_point(read(f"{module}.weight_zero_point"), outputs)
        codes = codes - zeros.repeat_interleave(scheme.group_size, 1)[:, :inputs]
    return codes


def _scales(scale: Tensor, scheme: Scheme, form: Form, shape: tuple[int, ...]) -> Tensor:
    """The scales [N, 1] or [N, K/g] of the form, each with its value."""
    outputs, inputs = shape
    if scheme.weights == "int8-block":
        scale = scale.repeat_interleave(TILE, 0)[:outputs]
    if form.group_size is not None:
        own = TILE if scheme.weights == "int8-block" else scheme.group_size or inputs
        starts = torch.arange(0, inputs, form.group_size)
        scale = scale[:, starts // own]
    return scale.to(torch.float32 if form.scales == "F32" else torch.bfloat16).contiguous()

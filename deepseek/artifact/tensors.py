"""Which tensors each published file of an artifact holds: names, shapes and types.

The writer checks tensors against it before publishing and the reader before reading. A consumer
takes the linears out of a layer with `pop_linear`. No file is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError
from deepseek.formats import compress, stored_shapes
from deepseek.inventory import global_tensors, layer_tensors
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import SourceTensor

HIGH_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layer_file(layer: LayerKey) -> str:
    """Name of the file that holds one layer, or the tensors outside the layers."""
    return (
        "model-globals.safetensors"
        if layer == "globals"
        else f"model-layer-{layer:05d}.safetensors"
    )


def layer_keys(config: ModelConfig) -> list[LayerKey]:
    """The key of every published file of an artifact, in the order of the records."""
    return [*range(config.num_layers_with_mtp), "globals"]


def expected_tensors(
    config: ModelConfig, schemes: Mapping[str, Scheme], layer: LayerKey
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and admissible types of every tensor of one published file, by full name."""
    specs = global_tensors(config) if layer == "globals" else layer_tensors(config, layer)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    for spec in specs:
        if spec.module not in schemes:
            expected[spec.name] = (spec.shape, HIGH_DTYPES)
            continue
        stored = stored_shapes(schemes[spec.module], spec.shape[0], spec.shape[1])
        for suffix, (shape, dtype) in stored.items():
            expected[f"{spec.module}.{suffix}"] = (shape, (dtype,))
    return expected


def store_tensor(tensor: SourceTensor, scheme: Scheme | None) -> dict[str, Tensor]:
    """A source tensor as the artifact stores it, by full name, with no calibration.

    `scheme` is None for a tensor that is no linear and no quantized head; it keeps its values. FP8
    blocks that stay FP8 blocks keep their bits; all else is rounded to nearest in the scheme's
    format.

    Raises:
        CheckpointError: the format cannot hold the values; the sentence names the tensor.
    """
    spec = tensor.spec
    if scheme is None:
        assert spec.kind != "linear", spec.name
        return {spec.name: tensor.data}
    if scheme.weights == "fp8-block" and tensor.scale_inv is not None:
        stored = {"weight": tensor.data, "weight_scale": tensor.scale_inv}
    else:
        try:
            plain = tensor.data if tensor.scale_inv is None else tensor.dequantize()
            stored = compress(plain, scheme)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {spec.name} {error}") from error
    return {f"{spec.module}.{suffix}": value for suffix, value in stored.items()}


def pop_linear(tensors: dict[str, Tensor], module: str, scheme: Scheme) -> dict[str, Tensor]:
    """Remove the stored tensors of one linear from a layer and return them by suffix. A consumer
    that pops every linear can check that no tensor is left over."""
    return {suffix: tensors.pop(f"{module}.{suffix}") for suffix in stored_shapes(scheme, 128, 128)}


def mismatch(
    actual: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    expected: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
) -> str | None:
    """How the tensors of one published file differ from the expected ones: a phrase that names the
    first difference, or None where there is none."""
    for name in sorted(actual.keys() ^ expected.keys()):
        return f"tensor {name} is {'missing' if name in expected else 'unknown'}"
    for name, (shape, dtypes) in expected.items():
        actual_shape, actual_dtype = actual[name]
        if actual_shape != shape:
            return f"tensor {name} has the shape {list(actual_shape)}, not {list(shape)}"
        if actual_dtype not in dtypes:
            return f"tensor {name} is {actual_dtype}, not {' or '.join(map(str, dtypes))}"
    return None

"""One file of a TensorRT-LLM engine directory, made tensor by tensor from a checkpoint.

Every tensor of the checkpoint is read once, when the tensor that is made of it is written, and
verified as it is read. Nothing is rounded but what the loader itself would round:

    INT4 codes   compressed-tensors stores code + 8 in each nibble; the same nibbles in two's
                 complement differ in their highest bit: bytes XOR 0x88
    INT4 scales  the artifact's BF16, bit for bit
    INT8 codes   unpacked; scales F32 [N, 1] -> BF16 [N], the type that the loader casts them to
    FP8 tiles    bit for bit
    BF16         of an FP8 tile: code times scale in FP32, rounded once

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.packing import Source
from deepseek.formats import dequantize_fp8_block, unpack_int8
from deepseek.inventory import TensorSpec
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import scale_name
from deepseek.tensor_files import DTYPES, stream_tensors
from deepseek.trtllm.fields import LayerInputScales
from deepseek.trtllm.layout import StoredTensor, stored_tensors

#: Reads one tensor of the checkpoint by its name there.
Read = Callable[[str], Tensor]


def write_file(
    path: Path,
    source: Source,
    schemes: Mapping[str, Scheme],
    stored: Mapping[str, Scheme],
    layer: LayerKey,
    scales: LayerInputScales | None,
) -> tuple[str, int, int]:
    """Write the file of one layer, or of the tensors outside the layers, atomically. Returns its
    SHA-256, its size and the bytes that were read, of tensors.

    `schemes` are the checkpoint's, `stored` the directory's (`layout.stored_schemes`); `scales` are
    given where the layer has INT4 experts.

    Raises:
        ArtifactError, CheckpointError: the checkpoint is damaged; the sentence names the tensor.
        OutputError: the file cannot be written.
    """
    with _opened(source, layer) as (read, dtype_of):
        tensors = stored_tensors(source.config, stored, layer)
        layout = {
            name: (_dtype(tensor, dtype_of), tensor.shape) for name, tensor in tensors.items()
        }
        bytes_read = 0

        def counted(name: str) -> Tensor:
            nonlocal bytes_read
            tensor = read(name)
            bytes_read += tensor.nbytes
            return tensor

        def make(name: str) -> Iterator[Tensor]:
            tensor = tensors[name]
            spec = tensor.spec
            if spec.kind != "linear":
                yield counted(spec.name)
                return
            yield _made(spec, tensor.suffix, schemes[spec.module], stored, counted, scales)

        sha256, num_bytes = stream_tensors(path, layout, make, {"format": "pt"})
    return sha256, num_bytes, bytes_read


def _made(
    spec: TensorSpec,
    suffix: str,
    scheme: Scheme,
    stored: Mapping[str, Scheme],
    read: Read,
    scales: LayerInputScales | None,
) -> Tensor:
    """One tensor of the directory, from those of the checkpoint that hold the same linear."""
    module = spec.module
    match stored[module].weights, suffix:
        case "int4", "weight":
            packed = read(f"{module}.weight_packed")  # int32 [N, K/8]
            return packed.contiguous().view(torch.uint8).bitwise_xor(0x88).view(torch.int8)
        case "int4", "weight_scale_inv":
            return read(f"{module}.weight_scale")
        case "int4", "input_scale":
            assert scales is not None, module
            return torch.tensor([scales.down if spec.role == "down_proj" else scales.gate_up])
        case "int8", "weight":
            return unpack_int8(read(f"{module}.weight_packed"), spec.shape[1])
        case "int8", "weight_scale":
            return read(f"{module}.weight_scale").squeeze(1).to(torch.bfloat16)
        case "fp8-block", "weight":
            return read(f"{module}.weight")
        case "fp8-block", "weight_scale_inv":
            return read(f"{module}.weight_scale")
        case "bf16", "weight" if scheme.weights == "fp8-block":
            codes, tile_scales = read(f"{module}.weight"), read(f"{module}.weight_scale")
            return dequantize_fp8_block(codes, tile_scales).to(torch.bfloat16)
        case "bf16", "weight":
            return read(f"{module}.weight").to(torch.bfloat16)
    raise AssertionError(f"{module}: no way to {suffix} of {stored[module].label}")


@contextmanager
def _opened(source: Source, layer: LayerKey) -> Iterator[tuple[Read, Callable[[str], torch.dtype]]]:
    """How the tensors of one layer are read by their artifact's names, and the type of one that is
    no linear. A source has the names of the release; its reader checks the values."""
    if isinstance(source, ArtifactReader):
        with source.open_file(layer) as file:
            yield file.read, lambda name: file.header.tensors[name].dtype
        return

    def read(name: str) -> Tensor:
        if name.endswith(".weight_scale"):
            return source.load_tensor(scale_name(name.removesuffix("_scale")))
        return source.load_tensor(name)

    yield read, source.dtype_of


def _dtype(tensor: StoredTensor, dtype_of: Callable[[str], torch.dtype]) -> torch.dtype:
    if tensor.spec.kind == "linear":
        return DTYPES[tensor.dtype]
    return dtype_of(tensor.spec.name)

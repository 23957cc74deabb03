"""Converts a source checkpoint or a stored model (a quantized checkpoint, or a directory that was
built for another target) into the tensors of the embedded engine.

packed_layout.py says which tensors these are; quant_jobs/targets/embedded.py writes them to disk,
and `LLMEngine.from_checkpoint` and `from_stored` use them in memory. Memory holds one layer of the
input and all tensors of the engine that are made so far. Codes and scales of a stored model are not
requantized; only their order in memory changes. Every tensor of the input is read, also those of
the MTP layer and of the indexer, which are then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.stored_model import StoredModel
from deepseek.artifact.tensors import pop_linear
from deepseek.config import ModelConfig
from deepseek.engine.packed_layout import (
    PackedLinear,
    absorbed_prefix,
    absorbed_spec,
    head_linear,
    packed_tensors,
    plain_specs,
    projections,
    source_schemes,
)
from deepseek.errors import ArtifactError
from deepseek.formats import TILE, decompress, int8_codes, unpack_int4, unpack_zero_point
from deepseek.inventory import HEAD, TensorSpec, layer_tensors, linears
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader

#: What a directory is built from.
Source = ArtifactReader | CheckpointReader
#: What is packed.
Packable = StoredModel | CheckpointReader
#: Called with the number of layers done and the number of all layers.
Progress = Callable[[int, int], None]


def schemes_of(source: Packable) -> dict[str, Scheme]:
    """Scheme of every linear, keyed by module name."""
    if isinstance(source, CheckpointReader):
        return source_schemes(source.config)
    return dict(source.schemes)


def pack_tensors(source: Packable, progress: Progress | None = None) -> dict[str, Tensor]:
    """Read `source` and return all tensors of the engine, by name.

    Raises:
        ArtifactError, CheckpointError: the input is damaged or incomplete.
        DeployError: the engine has no kernel for a linear.
    """
    config, schemes = source.config, schemes_of(source)
    packed = _pack_globals(source, schemes)
    expected = packed_tensors(
        config, schemes, embedding_dtype=packed["model.embed_tokens.weight"].dtype
    )
    num_layers = config.num_layers_with_mtp
    for layer in range(num_layers):
        stored = _read_layer(source, layer)
        if layer < config.num_hidden_layers:
            stored.drop_indexer(config, layer)
            packed |= _pack_layer(config, layer, schemes, stored)
            assert not stored.linears, f"layer {layer}: {next(iter(stored.linears))} left over"
            assert not stored.plain, f"layer {layer}: {next(iter(stored.plain))} left over"
        if progress is not None:
            progress(layer + 1, num_layers)
    source.finish()
    actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    assert actual == {name: (spec.shape, spec.dtype) for name, spec in expected.items()}
    return packed


class _Stored:
    """One layer of the input: the tensors of each linear by module, all others by name.

    A tensor that is packed is removed here.
    """

    def __init__(self, linears: dict[str, dict[str, Tensor]], plain: dict[str, Tensor]) -> None:
        self.linears, self.plain = linears, plain

    def drop_indexer(self, config: ModelConfig, layer: int) -> None:
        """Remove the tensors of the layer's indexer, if it has one."""
        for spec in layer_tensors(config, layer):
            if spec.is_indexer and spec.kind == "linear":
                del self.linears[spec.module]
            elif spec.is_indexer:
                del self.plain[spec.name]

    def pop_dequantized(self, spec: TensorSpec, scheme: Scheme) -> Tensor:
        """Remove one linear and return its weight, f32 [N, K]."""
        tensors = self.linears.pop(spec.module)
        if "dequantized" in tensors:
            return tensors["dequantized"]
        try:
            return decompress(tensors, scheme, (spec.shape[0], spec.shape[1]))
        except ArtifactError as error:
            raise ArtifactError(f"{spec.module}.{error}") from error


def _read_layer(source: Packable, layer: int) -> _Stored:
    specs = linears(source.config, layer)
    if not isinstance(source, CheckpointReader):
        tensors = source.read_layer(layer)
        by_module = {
            spec.module: pop_linear(tensors, spec.module, source.schemes[spec.module])
            for spec in specs
        }
        return _Stored(by_module, tensors)
    read = source.read_layer(layer)
    dequantized = {spec.module: {"dequantized": read.pop(spec.name).dequantize()} for spec in specs}
    return _Stored(dequantized, {name: tensor.data for name, tensor in read.items()})


def _pack_globals(source: Packable, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    if isinstance(source, CheckpointReader):
        tensors = {name: tensor.data for name, tensor in source.read_globals().items()}
    else:
        tensors = source.read_globals()
    packed = {}
    for spec in plain_specs(source.config, None):
        tensor = tensors.pop(spec.name)
        packed[spec.name] = tensor if spec.module == "model.embed_tokens" else tensor.float()
    head = head_linear(source.config, schemes)
    if HEAD in schemes:
        stored = pop_linear(tensors, HEAD, head.scheme)
    else:
        stored = {"dequantized": tensors.pop(f"{HEAD}.weight").float()}
    packed |= _pack_linear(head, _Stored({HEAD: stored}, {}))
    assert not tensors, f"{next(iter(tensors))} left over"
    return packed


def _pack_layer(
    config: ModelConfig, layer: int, schemes: Mapping[str, Scheme], stored: _Stored
) -> dict[str, Tensor]:
    packed = {spec.name: stored.plain.pop(spec.name).float() for spec in plain_specs(config, layer)}
    for packed_linears in projections(config, layer, schemes).values():
        for linear in packed_linears:
            packed |= _pack_linear(linear, stored)
    spec = absorbed_spec(config, layer)
    packed |= _absorb(config, layer, stored.pop_dequantized(spec, schemes[spec.module]))
    return packed


def _pack_linear(linear: PackedLinear, stored: _Stored) -> dict[str, Tensor]:
    """Remove the members of one kernel's weight from `stored`, stack them along the outputs, and
    return them in the kernel's layout, by full name."""
    match linear.scheme.weights:
        case "int4" | "int4-asym" if linear.scheme.activations == "int8":
            popped = [(spec, stored.linears.pop(spec.module)) for spec in linear.members]
            by_group = [_kernel_int4_a8(m, (s.shape[0], s.shape[1]), linear) for s, m in popped]
            tensors = {
                suffix: torch.cat([member[suffix] for member in by_group], dim=1)
                for suffix in by_group[0]
            }
        case "int4" | "int4-asym":
            popped = [(spec, stored.linears.pop(spec.module)) for spec in linear.members]
            members = [
                _kernel_int4(member, (spec.shape[0], spec.shape[1])) for spec, member in popped
            ]
            codes = torch.cat([codes for codes, _ in members])
            tensors = {
                "packed": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
                "scale_zero": torch.cat([scale_zero for _, scale_zero in members], dim=1),
            }
            if linear.scheme.activations == "fp8":
                # The members share one input, so they share one scale: the largest, as in
                # TensorRT-LLM's loader.
                scales = torch.stack([member["input_scale"] for _, member in popped])
                tensors["input_scale"] = scales.amax(dim=0)
        case "int8" | "int8-asym":
            popped = [(spec, stored.linears.pop(spec.module)) for spec in linear.members]
            tensors = {
                "codes": torch.cat(
                    [int8_codes(member, (spec.shape[0], spec.shape[1])) for spec, member in popped]
                ),
                "scale": torch.cat([member["weight_scale"].flatten() for _, member in popped]),
            }
            if linear.scheme.weights == "int8-asym":
                zeros = [
                    unpack_zero_point(member["weight_zero_point"], spec.shape[0], 8)
                    for spec, member in popped
                ]
                tensors["zero_point"] = torch.cat(zeros).flatten()
        case "int8-block":
            members = [
                _kernel_int8_block(stored.linears.pop(spec.module)) for spec in linear.members
            ]
            tensors = {
                "codes": torch.cat([codes for codes, _ in members], dim=1),
                "scale": torch.cat([scale for _, scale in members], dim=1),
            }
        case _:
            values = [stored.pop_dequantized(spec, linear.scheme) for spec in linear.members]
            tensors = {"weight": torch.cat(values)}
    return {f"{linear.name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _kernel_int4(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Stored INT4 -> unsigned codes int32 [N, K] in 0..15, and scale with zero, BF16 [K/g, N, 2].

    The artifact computes (code - zero_point) * scale with codes in [-8, 7], the kernel
    (q - 8) * scale + zero with q in 0..15. So q = code + 8 and zero = -zero_point * scale, rounded
    to BF16; linear.py gives the error of that rounding.
    """
    codes = unpack_int4(tensors["weight_packed"], shape[1]).to(torch.int32) + 8
    scale = tensors["weight_scale"]
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in tensors:
        zero_point = unpack_zero_point(tensors["weight_zero_point"], shape[0])
        zero = (-zero_point.float() * scale.float()).to(scale.dtype)
    return codes, torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def _kernel_int4_a8(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], linear: PackedLinear
) -> dict[str, Tensor]:
    """Stored INT4 -> the tensors of `Int4DynamicLinear`: codes uint8 [K/g, N, g/2], two to a byte,
    column 2 i in the low bits, as code + 8; scale BF16 and zero point int8, [K/g, N]."""
    num_outputs, num_inputs = shape
    unsigned = (unpack_int4(tensors["weight_packed"], num_inputs) + 8).view(torch.uint8)
    pairs = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    scale = tensors["weight_scale"]
    by_group = {
        "codes": pairs.view(num_outputs, scale.shape[1], -1).transpose(0, 1).contiguous(),
        "scale": scale.T.contiguous(),
    }
    if not linear.scheme.is_symmetric:
        zero_point = unpack_zero_point(tensors["weight_zero_point"], num_outputs)
        by_group["zero_point"] = zero_point.T.contiguous()
    return by_group


def _kernel_int8_block(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Stored INT8 tiles -> codes int8 [K/128, N, 128], padded with zeros where 128 does not divide
    K, and the scale of each output's tile, f32 [K/128, N]."""
    codes, scale = tensors["weight"], tensors["weight_scale"]
    num_outputs, num_inputs = codes.shape
    whole = torch.nn.functional.pad(codes, (0, -num_inputs % TILE))
    by_tile = whole.view(num_outputs, -1, TILE).transpose(0, 1).contiguous()
    return by_tile, scale.repeat_interleave(TILE, dim=0)[:num_outputs].T.contiguous()


def _absorb(config: ModelConfig, layer: int, weight: Tensor) -> dict[str, Tensor]:
    """kv_b_proj f32 [H (n + v), R] -> w_uk [H, n, R] and w_uv [H, R, v]."""
    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    w_uk, w_uv = torch.split(weight.view(heads, key + value, -1), [key, value], dim=1)
    prefix = absorbed_prefix(layer)
    return {
        f"{prefix}.w_uk": w_uk.contiguous(),
        f"{prefix}.w_uv": w_uv.transpose(1, 2).contiguous(),
    }

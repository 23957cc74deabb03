"""Converts a source checkpoint or a stored model (a quantized checkpoint, or a directory that was
built for another target) into the tensors of the embedded engine.

packed_layout.py says which tensors these are; quant_jobs/targets/embedded.py writes them to disk,
and `LLMEngine.from_checkpoint` and `from_stored` use them in memory. Memory holds one layer of the
input and all tensors of the engine that are made so far. Codes and scales of a stored model are not
requantized; only their order in memory changes, and what is not quantized is rounded to BF16 in the
native layout. Every tensor of the input is read, also those of
the MTP layer and of the indexer, which are then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.stored_model import StoredModel
from deepseek.artifact.tensors import pop_linear
from deepseek.config import ModelConfig
from deepseek.engine.absorbed import absorbed_spec, absorbed_to_torch, pack_absorbed
from deepseek.engine.native_layout import from_native, to_native
from deepseek.engine.packed_layout import (
    Layout,
    PackedLinear,
    head_linear,
    packed_shapes,
    packed_tensors,
    plain_specs,
    projections,
    source_schemes,
)
from deepseek.engine.torch_layout import Plain, to_torch
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


def pack_tensors(
    source: Packable, progress: Progress | None = None, layout: Layout = "native"
) -> dict[str, Tensor]:
    """Read `source` and return all tensors of the engine in the layout, by name.

    Raises:
        ArtifactError, CheckpointError: the input is damaged or incomplete.
        DeployError: torch's kernel cannot take the shape of a linear.
    """
    config, schemes = source.config, schemes_of(source)
    packed = _pack_globals(source, schemes, layout)
    expected = packed_tensors(
        config,
        schemes,
        embedding_dtype=packed["model.embed_tokens.weight"].dtype,
        layout=layout,
    )
    num_layers = config.num_layers_with_mtp
    for layer in range(num_layers):
        stored = _read_layer(source, layer)
        if layer < config.num_hidden_layers:
            stored.drop_indexer(config, layer)
            packed |= _pack_layer(config, layer, schemes, stored, layout)
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


def _pack_globals(
    source: Packable, schemes: Mapping[str, Scheme], layout: Layout
) -> dict[str, Tensor]:
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
        stored = {"dequantized": tensors.pop(f"{HEAD}.weight")}
    packed |= _pack_linear(head, _Stored({HEAD: stored}, {}), layout)
    assert not tensors, f"{next(iter(tensors))} left over"
    return packed


def _pack_layer(
    config: ModelConfig,
    layer: int,
    schemes: Mapping[str, Scheme],
    stored: _Stored,
    layout: Layout,
) -> dict[str, Tensor]:
    packed = {spec.name: stored.plain.pop(spec.name).float() for spec in plain_specs(config, layer)}
    for packed_linears in projections(config, layer, schemes).values():
        for linear in packed_linears:
            packed |= _pack_linear(linear, stored, layout)
    spec = absorbed_spec(config, layer)
    scheme = schemes[spec.module]
    plain = _stack(PackedLinear(spec.module, (spec,), scheme), stored)
    return packed | pack_absorbed(config, layer, scheme, plain, layout)


def _pack_linear(
    linear: PackedLinear, stored: _Stored, layout: Layout = "native"
) -> dict[str, Tensor]:
    """Remove the members of one kernel's weight from `stored`, stack them along the outputs, and
    return them in the layout, by full name."""
    return _packed(linear, _stack(linear, stored), layout)


def _packed(linear: PackedLinear, plain: Plain, layout: Layout) -> dict[str, Tensor]:
    """A plain weight in the layout, by full name."""
    tensors = (to_native if layout == "native" else to_torch)(linear.scheme, plain)
    return {f"{linear.name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _stack(linear: PackedLinear, stored: _Stored) -> Plain:
    """Remove the members of one kernel's weight from `stored` and stack them along the outputs."""
    scheme = linear.scheme
    if scheme.weights in ("bf16", "fp8-block"):
        values = [stored.pop_dequantized(spec, scheme) for spec in linear.members]
        return {"weight": torch.cat(values)}
    popped = [(spec, stored.linears.pop(spec.module)) for spec in linear.members]
    shapes = [(spec.shape[0], spec.shape[1]) for spec, _ in popped]
    members = [_plain(scheme, member, s) for (_, member), s in zip(popped, shapes, strict=True)]
    plain = {suffix: torch.cat([member[suffix] for member in members]) for suffix in members[0]}
    if scheme.activations == "fp8":
        # The members share one input, so they share one scale: the largest, as in TensorRT-LLM's
        # loader.
        plain["input_scale"] = torch.stack([m["input_scale"] for _, m in popped]).amax(dim=0)
    return plain


def _plain(scheme: Scheme, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Plain:
    """One quantized linear [N, K] as the artifact stores it -> plain (torch_layout.py), without the
    scale of its input."""
    num_outputs, num_inputs = shape
    plain: Plain = {}
    match scheme.weights:
        case "int4" | "int4-asym":
            plain["codes"] = unpack_int4(stored["weight_packed"], num_inputs)
            plain["scale"] = stored["weight_scale"]
            if scheme.weights == "int4-asym":
                zero_point = unpack_zero_point(stored["weight_zero_point"], num_outputs)
                plain["zero_point"] = zero_point
        case "int8-block":
            plain["codes"] = stored["weight"]
            by_output = stored["weight_scale"].repeat_interleave(TILE, dim=0)
            plain["scale"] = by_output[:num_outputs]
        case _:
            plain["codes"] = int8_codes(stored, shape)
            plain["scale"] = stored["weight_scale"].flatten()
            if scheme.weights == "int8-asym":
                zero_point = unpack_zero_point(stored["weight_zero_point"], num_outputs, 8)
                plain["zero_point"] = zero_point.flatten()
    return plain


def to_torch_layout(
    config: ModelConfig, schemes: Mapping[str, Scheme], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an engine from the native layout to torch's, at the speed of memory. Takes
    what it converts out of `tensors`, so that memory holds no weight twice; what it does not know
    stays for the model to refuse.

    Raises:
        ArtifactError: a tensor is missing.
        DeployError: torch's kernel cannot take the shape of a linear.
    """
    converted: dict[str, Tensor] = {}
    linears = [head_linear(config, schemes)]
    for layer in range(config.num_hidden_layers):
        for packed_linears in projections(config, layer, schemes).values():
            linears += packed_linears
    for linear in linears:
        linear.tensors("torch")  # refuses shapes
        suffixes = packed_shapes(linear.scheme, *linear.shape)
        native = {suffix: _pop(tensors, f"{linear.name}.{suffix}") for suffix in suffixes}
        plain = from_native(linear.scheme, native, linear.shape)
        converted |= _packed(linear, plain, "torch")
    for layer in range(config.num_hidden_layers):
        scheme = schemes[absorbed_spec(config, layer).module]
        converted |= absorbed_to_torch(config, layer, scheme, partial(_pop, tensors))
    return tensors | converted


def _pop(tensors: dict[str, Tensor], name: str) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ArtifactError(f"tensor {name} is missing from the engine; build it again")
    return tensor

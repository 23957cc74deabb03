"""Which tensors an embedded engine holds: names, shapes and types, from config and schemes alone.

packing.py makes exactly these tensors, the models (native.py, model.py) take exactly these, and the
planner adds up their bytes (`planned_bytes`), so planned and allocated bytes are equal. No tensor
is made here. There are two layouts. "native" is that of the extension's kernels, the same for every
CPU, and that of an engine directory; native_layout.py says how its bytes lie. "torch" is that of
PyTorch's operators on this CPU (torch_layout.py), for the slow reference and for the emulation of
targets. They differ from the artifact's layout, and from each other, in these ways:

- Weights in BF16 and in FP8 tiles are BF16 in the native layout (a weight in FP8 tiles is rounded
  once more: 1.7e-3 relative, where the tiles' own error is 2.6e-2). In torch's they are FP32, exact
  for BF16 and FP8: what tests compare with transformers.
- The head is BF16, unless the recipe gives it a scheme: then it is a linear like any other.
- Norms, router and its bias are FP32.
- In torch's layout INT8 tiles lie by inputs: the codes of 128 inputs of all outputs, and their
  scales once per output, because a tile of one weight may end in the middle of 128 rows of fused
  ones; INT4 codes that meet INT8 activations lie by groups.
- Linears that share their input and their scheme are fused: `qkv_a_proj` (q_a and kv_a), and
  `gate_up_proj`. Where the schemes differ, they stay two.
- kv_b_proj becomes the absorbed `w_uk` and `w_uv` (absorbed.py).
- The MTP layer is left out, because the engine does not speculate, and so is DeepSeek-V3.2's
  indexer: within `ModelConfig.dense_context`, all that the engine serves, it chooses every token.

N outputs · K inputs
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.config import ModelConfig
from deepseek.engine.absorbed import absorbed_shapes, absorbed_spec
from deepseek.engine.arithmetic import EMBEDDED
from deepseek.engine.kv_cache import cache_bytes
from deepseek.engine.native_layout import native_shapes
from deepseek.errors import DeployError
from deepseek.formats import TILE
from deepseek.inventory import (
    HEAD,
    LATENT_READER,
    Group,
    TensorSpec,
    global_tensors,
    head_spec,
    layer_inputs,
    layer_tensors,
    linears,
)
from deepseek.kv_layout import kv_layout
from deepseek.recipe import Scheme, source_scheme

#: How the tensors of an engine lie in memory; see above.
Layout = Literal["native", "torch"]
#: Suffix -> shape and dtype.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

_BF16 = Scheme(weights="bf16")
#: torch's INT4 operator works on tiles of this many outputs.
_INT4_ROWS = 16


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Shape, type and inventory group of one tensor of the engine's tensor file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: Group

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weight of one kernel: `members` stacked along the outputs, with one name and scheme."""

    name: str
    members: tuple[TensorSpec, ...]
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(spec.shape[0] for spec in self.members), self.members[0].shape[1]

    def tensors(self, layout: Layout = "native") -> dict[str, PackedTensor]:
        """The tensors of the kernel, by full name.

        Raises:
            DeployError: torch's kernel cannot take the shape; the native ones take any.
        """
        is_tiled = self.scheme.group_size is not None and self.scheme.activations != "int8"
        if layout == "torch" and is_tiled and self.shape[0] % _INT4_ROWS:
            raise DeployError(
                f"{self.name} has {self.shape[0]} outputs; PyTorch's INT4 kernel needs a multiple "
                f"of {_INT4_ROWS}: run with native kernels, or give it int8 in the recipe"
            )
        shapes = packed_shapes(self.scheme, *self.shape, layout=layout)
        return {
            f"{self.name}.{suffix}": PackedTensor(shape, dtype, self.members[0].group)
            for suffix, (shape, dtype) in shapes.items()
        }


def packed_shapes(
    scheme: Scheme, num_outputs: int, num_inputs: int, *, layout: Layout = "native"
) -> Shapes:
    """The tensors of the kernel of an [N, K] weight, by suffix."""
    if layout == "native":
        return native_shapes(scheme, num_outputs, num_inputs)
    match scheme.weights:
        case "int4" | "int4-asym" if scheme.activations == "int8":
            assert scheme.group_size is not None
            groups = num_inputs // scheme.group_size
            by_group: Shapes = {
                "codes": ((groups, num_outputs, scheme.group_size // 2), torch.uint8),
                "scale": ((groups, num_outputs), torch.bfloat16),
            }
            if not scheme.is_symmetric:
                by_group["zero_point"] = ((groups, num_outputs), torch.int8)
            return by_group
        case "int4" | "int4-asym":
            assert scheme.group_size is not None
            groups = num_inputs // scheme.group_size
            shapes: Shapes = {
                "packed": ((num_outputs, num_inputs // 2), torch.uint8),
                "scale_zero": ((groups, num_outputs, 2), torch.bfloat16),
            }
            if scheme.activations == "fp8":
                shapes["input_scale"] = ((1,), torch.float32)
            return shapes
        case "int8" | "int8-asym":
            shapes = {
                "codes": ((num_outputs, num_inputs), torch.int8),
                "scale": ((num_outputs,), torch.float32),
            }
            if scheme.weights == "int8-asym":
                shapes["zero_point"] = ((num_outputs,), torch.int8)
            return shapes
        case "int8-block":
            tiles = math.ceil(num_inputs / TILE)
            return {
                "codes": ((tiles, num_outputs, TILE), torch.int8),
                "scale": ((tiles, num_outputs), torch.float32),
            }
        case _:
            return {"weight": ((num_outputs, num_inputs), torch.float32)}


def source_schemes(config: ModelConfig) -> dict[str, Scheme]:
    """The schemes of an unquantized model, by module: each linear as the source stores it."""
    scheme = source_scheme(config)
    layers = range(config.num_layers_with_mtp)
    return {spec.module: scheme for layer in layers for spec in linears(config, layer)}


def projections(
    config: ModelConfig, layer: int, schemes: Mapping[str, Scheme]
) -> dict[str, tuple[PackedLinear, ...]]:
    """The linears of one main layer as the engine computes them, by projection name.

    A projection has one linear, or several where the linears to be fused differ in scheme. The
    absorbed kv_b_proj is not among them.
    """
    by_name: dict[str, tuple[PackedLinear, ...]] = {}
    for linear_input in layer_inputs(config, layer):
        readers = linear_input.readers
        if readers[0].role == LATENT_READER:
            continue
        packed = tuple(PackedLinear(r.module, (r,), schemes[r.module]) for r in readers)
        kernel_keys = {_kernel_key(linear.scheme) for linear in packed}
        name = linear_input.fused
        if name is not None and len(kernel_keys) == 1:
            packed = (PackedLinear(name, readers, packed[0].scheme),)
        by_name[name or readers[0].module] = packed
    return by_name


def head_linear(config: ModelConfig, schemes: Mapping[str, Scheme]) -> PackedLinear:
    """The language model's head."""
    return PackedLinear(HEAD, (head_spec(config),), schemes.get(HEAD, _BF16))


def plain_specs(config: ModelConfig, layer: int | None) -> list[TensorSpec]:
    """The tensors that are not linears: norms and router; the embedding and the last norm for
    `layer` None. The indexer's are left out."""
    specs = global_tensors(config) if layer is None else layer_tensors(config, layer)
    return [
        spec
        for spec in specs
        if spec.kind != "linear" and not spec.is_indexer and spec.module != HEAD
    ]


def packed_tensors(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    *,
    embedding_dtype: torch.dtype = torch.bfloat16,
    layout: Layout = "native",
) -> dict[str, PackedTensor]:
    """Every tensor of the engine, by name.

    The embedding table is only looked up, never multiplied, so it keeps the source's dtype.

    Raises:
        DeployError: torch's kernel cannot take the shape of a linear.
    """
    packed: dict[str, PackedTensor] = {}
    for spec in _plain(config):
        is_table = spec.module == "model.embed_tokens"
        dtype = embedding_dtype if is_table else torch.float32
        packed[spec.name] = PackedTensor(spec.shape, dtype, spec.group)
    packed |= head_linear(config, schemes).tensors(layout)
    for layer in range(config.num_hidden_layers):
        for packed_linears in projections(config, layer, schemes).values():
            for linear in packed_linears:
                packed |= linear.tensors(layout)
        scheme = schemes[absorbed_spec(config, layer).module]
        for name, shape, dtype in absorbed_shapes(config, layer, scheme, layout):
            packed[name] = PackedTensor(shape, dtype, "attention")
    return packed


def planned_bytes(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    *,
    kv_cache: CacheFormat,
    num_pages: int,
    page_tokens: int,
    embedding_dtype: torch.dtype = torch.bfloat16,
    arithmetic: str = EMBEDDED.name,
    layout: Layout = "native",
) -> dict[str, int]:
    """Bytes that an engine allocates, by inventory group and "kv_cache"; pure arithmetic.

    Equal to `LLMEngine.allocated_bytes()` of the same engine. `num_pages` does not count the zero
    page. `arithmetic` names the target whose layout of the KV format is used; `layout` is "torch"
    for an engine that computes with PyTorch's kernels.

    Raises:
        DeployError: torch's kernel cannot take the shape of a linear; the target has no such KV
            format.
    """
    total: dict[str, int] = {}
    packed = packed_tensors(config, schemes, embedding_dtype=embedding_dtype, layout=layout)
    for tensor in packed.values():
        total[tensor.group] = total.get(tensor.group, 0) + tensor.num_bytes
    pages = kv_layout(arithmetic, kv_cache, sparse=config.has_indexer)
    total["kv_cache"] = cache_bytes(config, pages, num_pages, page_tokens)
    return total


def _plain(config: ModelConfig) -> Iterator[TensorSpec]:
    yield from plain_specs(config, None)
    for layer in range(config.num_hidden_layers):
        yield from plain_specs(config, layer)


def _kernel_key(scheme: Scheme) -> tuple[object, ...]:
    """The fields of a scheme that decide the kernel."""
    return scheme.weights, scheme.group_size, scheme.activations

"""The parameters of a rank decoded into the tensors that they were made from, and compared.

Undoes what the loader does (cut, fuse, reorder, interleave), so that each value can be compared
with the artifact's bit for bit. Written backward from the runtime layout, not from the other
`loader_*` files: how many ranks share a parameter is read from its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.formats import dequantize_fp8_block
from deepseek.trtllm.loader import LoaderModel

_TILE = _GROUP = 128
_HIGH = (torch.bfloat16, torch.float16, torch.float32)
#: Views of other parameters.
_VIEWS = ("k_b_proj_trans", "k_b_proj_trans_scale", "v_b_proj", "v_b_proj_scale")

#: The tensors of one layer by the artifact's names.
Reference = Callable[[LayerKey], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of the tensor `name`, from (row, column) on, as a rank holds it. A vector is one
    column.

    Names are the artifact's: INT4 and INT8 codes as `weight_packed`, FP8 tiles as `weight` and
    `weight_scale`.
    """

    name: str
    row: int
    column: int
    values: Tensor


def decode(
    module: str, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
) -> Iterator[Piece]:
    """The pieces of one module of one rank, as `LoaderModel.load` gives it.

    Static input scales are left out; they are no part of an artifact's weights.
    """
    parent, _, role = module.rpartition(".")
    match role:
        case "experts":
            yield from _experts(module, parameters, config, rank)
        case "kv_a_proj_with_mqa":
            yield from _fused_a(parent, parameters, config)
        case "kv_b_proj":
            yield from _kv_b(module, parameters, config, rank)
        case "gate_up_proj":
            width = _mlp_width(parent, config)
            local = parameters["weight"].shape[0] // 2
            index = rank % (width // local)
            for suffix, values in parameters.items():
                half = values.shape[0] // 2
                yield Piece(f"{parent}.gate_proj.{suffix}", index * half, 0, values[:half])
                yield Piece(f"{parent}.up_proj.{suffix}", index * half, 0, values[half:])
        case "o_proj" | "down_proj" | "eh_proj":
            inputs = {
                "o_proj": config.num_attention_heads * config.v_head_dim,
                "eh_proj": 2 * config.hidden_size,
            }.get(role, _mlp_width(parent, config))
            index = rank % (inputs // parameters["weight"].shape[1])
            for suffix, values in parameters.items():
                yield Piece(f"{module}.{suffix}", 0, index * values.shape[1], values)
        case "q_b_proj" | "q_proj":
            for suffix, values in parameters.items():
                yield Piece(f"{module}.{suffix}", rank * values.shape[0], 0, values)
        case "lm_head":
            rows = parameters["weight"].shape[0]
            own = parameters["weight"][: max(0, config.vocab_size - rank * rows)]
            yield Piece(f"{module}.weight", rank * rows, 0, own)
        case _:
            for suffix, values in parameters.items():
                yield Piece(f"{module}.{suffix}", 0, 0, values)


def compare(model: LoaderModel, reference: Reference) -> int:
    """Load every rank layer by layer and compare each decoded value with the reference; the number
    of tensors that were found complete and equal.

    Where an artifact holds FP8 tiles and the rank BF16, the tiles' dequantized values in BF16 are
    meant; higher precision is rounded as the loader rounds it. Memory: one layer.

    Raises:
        LoaderRefusal: the loader would stop.
        ArtifactError: a value differs, or no rank holds a part of a tensor; the sentence names the
            tensor, and the rank.
    """
    count = 0
    for layer in model.layers:
        tensors = reference(layer)
        expected = _Expected(model, tensors)
        for rank in range(model.ranks.tp):
            for module, parameters in model.load(rank, layer):
                _check_copies(model, module, parameters, rank)
                for piece in decode(module, parameters, model.config, rank):
                    expected.check(piece, rank)
        expected.check_complete(name for name in tensors if _held_by_ranks(name, model.config))
        count += len(expected.areas)
        model.checkpoint.close()
    return count


class _Expected:
    """What the pieces of a layer are compared with, and the rectangles that were found."""

    def __init__(self, model: LoaderModel, tensors: Mapping[str, Tensor]) -> None:
        self._model = model
        self._tensors = tensors
        self._plain: dict[str, Tensor] = {}
        #: Tensor -> (row, column) of a piece -> values in it.
        self.areas: dict[str, dict[tuple[int, int], int]] = {}

    def check(self, piece: Piece, rank: int) -> None:
        whole = self._whole(piece)
        rows, columns = piece.values.shape[0], math.prod(piece.values.shape[1:])
        part = whole[piece.row : piece.row + rows, piece.column : piece.column + columns]
        values = piece.values.reshape(rows, columns)
        if part.shape != values.shape or not _same_bits(part, values):
            raise ArtifactError(
                f"{self._model.directory}: rank {rank} does not hold the values of {piece.name} "
                f"from row {piece.row}, column {piece.column} on; build again"
            )
        self.areas.setdefault(piece.name, {})[piece.row, piece.column] = values.numel()

    def check_complete(self, names: Iterable[str]) -> None:
        for name in names:
            held = sum(self.areas.get(name, {}).values())
            if held != self._tensors[name].numel():
                raise ArtifactError(
                    f"{self._model.directory}: the ranks hold {held} of the "
                    f"{self._tensors[name].numel()} values of {name}; build again"
                )

    def _whole(self, piece: Piece) -> Tensor:
        """The reference of a piece in two dimensions, in the type that the rank holds it in."""
        name, dtype = piece.name, piece.values.dtype
        if name not in self._tensors:
            raise ArtifactError(
                f"{self._model.directory}: the ranks hold {name}, which the checkpoint has not; "
                "build again"
            )
        whole = self._tensors[name]
        if whole.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16:
            if name not in self._plain:
                scale = self._tensors[f"{name.removesuffix('.weight')}.weight_scale"]
                self._plain[name] = dequantize_fp8_block(whole, scale).to(dtype)
            # the scales are in the values: they are held with them
            scale_name = f"{name.removesuffix('.weight')}.weight_scale"
            self.areas[scale_name] = {(0, 0): self._tensors[scale_name].numel()}
            whole = self._plain[name]
        if whole.dtype in _HIGH and dtype in _HIGH:
            whole = whole.to(dtype)
        return whole.reshape(whole.shape[0], -1)


def _held_by_ranks(name: str, config: ModelConfig) -> bool:
    """Whether the ranks must hold the tensor of this name in the artifact: not the shapes, which
    are for other loaders, nor input scales, nor the copies of embedding and head in MTP layers."""
    parts = name.split(".")
    if parts[-1] in ("weight_shape", "input_scale"):
        return False
    is_mtp = parts[:2] == ["model", "layers"] and int(parts[2]) >= config.num_hidden_layers
    return not (is_mtp and parts[-2] in ("embed_tokens", "head"))


def _check_copies(
    model: LoaderModel, module: str, parameters: Mapping[str, Tensor], rank: int
) -> None:
    """Check what absorbed attention reads of kv_b_proj against kv_b_proj itself."""
    if not module.endswith(".kv_b_proj"):
        return
    config = model.config
    heads = parameters["k_b_proj_trans"].shape[0]
    for own, suffix, tile in (("weight", "", 1), ("weight_scale", "_scale", _TILE)):
        if own not in parameters:
            continue
        whole = parameters[own]
        keys = whole[: heads * config.qk_nope_head_dim // tile]
        values = whole[heads * config.qk_nope_head_dim // tile :]
        transposed = parameters[f"k_b_proj_trans{suffix}"].transpose(1, 2)
        of_values = parameters[f"v_b_proj{suffix}"]
        for name, a, b in (("k_b_proj_trans", transposed, keys), ("v_b_proj", of_values, values)):
            if not _same_bits(a.reshape(b.shape), b):
                raise ArtifactError(
                    f"{model.directory}: rank {rank} holds another {name}{suffix} than {module}"
                )


def _fused_a(parent: str, parameters: Mapping[str, Tensor], config: ModelConfig) -> Iterator[Piece]:
    queries = config.q_lora_rank or 0
    for suffix, values in parameters.items():
        rows = queries // _TILE if suffix == "weight_scale" else queries
        if rows:
            yield Piece(f"{parent}.q_a_proj.{suffix}", 0, 0, values[:rows])
        yield Piece(f"{parent}.kv_a_proj_with_mqa.{suffix}", 0, 0, values[rows:])


def _kv_b(
    module: str, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
) -> Iterator[Piece]:
    heads = parameters["k_b_proj_trans"].shape[0]
    for suffix, values in parameters.items():
        if suffix in _VIEWS:
            continue
        tile = _TILE if suffix == "weight_scale" else 1
        nope, value = config.qk_nope_head_dim // tile, config.v_head_dim // tile
        keys, rest = values[: heads * nope], values[heads * nope :]
        by_head = torch.cat(
            [keys.reshape(heads, nope, -1), rest.reshape(heads, value, -1)], dim=1
        ).flatten(0, 1)
        yield Piece(f"{module}.{suffix}", rank * by_head.shape[0], 0, by_head)


def _mlp_width(parent: str, config: ModelConfig) -> int:
    if parent.endswith(".shared_experts"):
        return config.moe_intermediate_size * config.n_shared_experts
    return config.intermediate_size


def _experts(
    module: str, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
) -> Iterator[Piece]:
    first, second = parameters["w3_w1_weight"], parameters["w2_weight"]
    is_int4, is_int8 = "fc31_alpha" in parameters, "fc31_weight_scale" in parameters
    if is_int8 and not is_int4:  # inputs first
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    local, inner = first.shape[0], first.shape[1] // 2
    groups = config.n_routed_experts // local
    row = rank // groups * inner  # the first inner row of this rank's part of an expert
    scales: tuple[Tensor, Tensor] | None = None
    if is_int4:
        scales = (
            _rows_of_groups(parameters["fc31_weight_scale"], 2 * inner),
            _rows_of_groups(parameters["fc2_weight_scale"], config.hidden_size),
        )
    elif is_int8:
        scales = parameters["fc31_weight_scale"].unsqueeze(2), parameters["fc2_weight_scale"]
        scales = scales[0], scales[1].unsqueeze(2)
    elif "w2_weight_scaling_factor" in parameters:
        scales = parameters["w3_w1_weight_scaling_factor"], parameters["w2_weight_scaling_factor"]
    for index in range(local):
        name = f"{module}.{rank % groups * local + index}"
        up, gate = first[index][:inner], first[index][inner:]
        for role, codes in (("up_proj", up), ("gate_proj", gate), ("down_proj", second[index])):
            weight = _packed(codes, 0x88 if is_int4 else 0x80) if is_int8 else codes
            suffix = "weight_packed" if is_int8 else "weight"
            place = (0, row * weight.shape[1] // inner) if role == "down_proj" else (row, 0)
            yield Piece(f"{name}.{role}.{suffix}", *place, weight)
            if scales is None:
                continue
            if role == "down_proj":
                scale = scales[1][index]
                # INT8 has one scale per output, which every rank holds whole
                column = row * scale.shape[1] // inner if is_int4 or not is_int8 else 0
                yield Piece(f"{name}.{role}.weight_scale", 0, column, scale)
            else:
                halves = scales[0][index].chunk(2)
                scale = halves[0] if role == "up_proj" else halves[1]
                yield Piece(f"{name}.{role}.weight_scale", row * scale.shape[0] // inner, 0, scale)


def _rows_of_groups(scales: Tensor, rows: int) -> Tensor:
    """[experts, groups / f, rows * f] -> [experts, rows, groups]."""
    count, blocks, width = scales.shape
    factor = width // rows
    return scales.view(count, blocks, rows, factor).transpose(1, 2).reshape(count, rows, -1)


def _packed(codes: Tensor, offset: int) -> Tensor:
    """Two's complement codes as bytes -> the artifact's offset-binary int32 words."""
    return (codes.contiguous().view(torch.uint8) ^ offset).view(torch.int32)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

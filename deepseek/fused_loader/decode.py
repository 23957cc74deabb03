"""The parameters of a rank decoded into the tensors that they were made from, and compared.

Undoes what the loader does (cut, fuse, stack), so that each value can be compared with the
artifact's bit for bit. Written backward from the parameters: where a rank's part begins follows
from its shape, not from `fill.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.fused_loader.loader import LoaderModel
from deepseek.fused_loader.modules import TILE, Experts, Linear, Method, Module, Plain

#: The tensors of one layer by the artifact's names.
Reference = Callable[[LayerKey], Mapping[str, Tensor]]
_HIGH = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of the tensor `name`, from (row, column) on, as a rank holds it. A vector is one
    column."""

    name: str
    row: int
    column: int
    values: Tensor


class Decoder(ABC):
    """Decodes the modules of one engine, which says what is its own."""

    #: The role of the linear that q_a_proj and kv_a_proj_with_mqa are fused into.
    fused_queries: ClassVar[str]

    @abstractmethod
    def place(self, module: Experts, experts: int, local: int, rank: int) -> tuple[int, int]:
        """The first expert of a rank that holds `local` of all `experts`, and which part of each it
        holds."""

    def plain(self, suffix: str, values: Tensor, method: Method) -> tuple[str, Tensor]:
        """A parameter by the name and in the form that the reference has it in: as it is."""
        return suffix, values

    def decode(
        self, module: Module, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
    ) -> Iterator[Piece]:
        """The pieces of one module of one rank, as `LoaderModel.load` gives it. Shapes of packed
        weights are left out: nothing computes with them."""
        if isinstance(module, Plain):
            values = parameters[module.suffix]
            if module.whole is not None:
                begin = rank * values.shape[0]
                values = values[: max(0, module.whole - begin)]
                yield Piece(f"{module.name}.{module.suffix}", min(begin, module.whole), 0, values)
            else:
                yield Piece(f"{module.name}.{module.suffix}", 0, 0, values)
        elif isinstance(module, Experts):
            yield from self._experts(module, parameters, config, rank)
        else:
            yield from self._linear(module, parameters, config, rank)

    def _linear(
        self, module: Linear, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
    ) -> Iterator[Piece]:
        parent, _, role = module.name.rpartition(".")
        for stored, held in parameters.items():
            if stored == "weight_shape":
                continue
            suffix, values = self.plain(stored, held, module.method)
            if role == self.fused_queries:
                queries = math.ceil((config.q_lora_rank or 0) * _per_row(stored, module))
                yield Piece(f"{parent}.q_a_proj.{suffix}", 0, 0, values[:queries])
                yield Piece(f"{parent}.kv_a_proj_with_mqa.{suffix}", 0, 0, values[queries:])
            elif role == "gate_up_proj":
                half = values.shape[0] // 2
                for part, own in (("gate_proj", values[:half]), ("up_proj", values[half:])):
                    yield Piece(f"{parent}.{part}.{suffix}", rank * half, 0, own)
            elif role in ("o_proj", "down_proj"):
                column = 0 if _held_whole(suffix, module.method) else rank * values.shape[1]
                yield Piece(f"{module.name}.{suffix}", 0, column, values)
            elif role == "kv_a_proj_with_mqa":
                yield Piece(f"{module.name}.{suffix}", 0, 0, values)
            else:
                yield Piece(f"{module.name}.{suffix}", rank * values.shape[0], 0, values)

    def _experts(
        self, module: Experts, parameters: Mapping[str, Tensor], config: ModelConfig, rank: int
    ) -> Iterator[Piece]:
        weight = next(name for name in parameters if name.startswith("w2_weight"))
        local = parameters[weight].shape[0]
        first, index = self.place(module, config.n_routed_experts, local, rank)
        for name, held in parameters.items():
            which, _, stored = name.partition("_")
            if stored != "weight_shape":
                suffix, values = self.plain(stored, held, module.method)
                yield from self.expert_pieces(module, which, suffix, values, first, index)

    def expert_pieces(
        self, module: Experts, which: str, suffix: str, values: Tensor, first: int, index: int
    ) -> Iterator[Piece]:
        """The pieces of one parameter of all experts of a rank, `which` w13 or w2."""
        for n in range(values.shape[0]):
            expert, own = f"{module.name}.{first + n}", values[n]
            if which == "w2":
                column = 0 if _held_whole(suffix, module.method) else index * own.shape[1]
                yield Piece(f"{expert}.down_proj.{suffix}", 0, column, own)
            else:
                half = own.shape[0] // 2
                yield Piece(f"{expert}.gate_proj.{suffix}", index * half, 0, own[:half])
                yield Piece(f"{expert}.up_proj.{suffix}", index * half, 0, own[half:])


def compare(model: LoaderModel, reference: Reference, decoder: Decoder) -> int:
    """Load every rank layer by layer and compare each decoded value with the reference; the number
    of tensors that were found complete and equal.

    Scales and other values of higher precision are rounded as the engine rounds them. Memory: one
    layer.

    Raises:
        LoaderRefusal: the loader would stop.
        ArtifactError: a value differs, or no rank holds a part of a tensor; the sentence names the
            tensor, and the rank.
    """
    count = 0
    for layer in model.layers:
        tensors = reference(layer)
        areas: dict[str, dict[tuple[int, int], int]] = {}
        for rank in range(model.ranks.tp):
            for module, parameters in model.load(rank, layer):
                for piece in decoder.decode(module, parameters, model.config, rank):
                    _check(model, tensors, piece, rank)
                    areas.setdefault(piece.name, {})[piece.row, piece.column] = piece.values.numel()
        for name in tensors:
            held = sum(areas.get(name, {}).values())
            if held != tensors[name].numel() and not name.endswith(".weight_shape"):
                raise ArtifactError(
                    f"{model.directory}: the ranks hold {held} of the {tensors[name].numel()} "
                    f"values of {name}; build again"
                )
        count += len(areas)
        model.checkpoint.close()
    return count


def _check(model: LoaderModel, tensors: Mapping[str, Tensor], piece: Piece, rank: int) -> None:
    if piece.name not in tensors:
        raise ArtifactError(
            f"{model.directory}: the ranks hold {piece.name}, which the checkpoint has not; build "
            "again"
        )
    whole = tensors[piece.name]
    if whole.dtype in _HIGH and piece.values.dtype in _HIGH:
        whole = whole.to(piece.values.dtype)
    whole = whole.reshape(whole.shape[0], -1)
    rows, columns = piece.values.shape[0], math.prod(piece.values.shape[1:])
    values = piece.values.reshape(rows, columns)
    part = whole[piece.row : piece.row + rows, piece.column : piece.column + columns]
    if not _same_bits(part, values):
        raise ArtifactError(
            f"{model.directory}: rank {rank} does not hold the values of {piece.name} from row "
            f"{piece.row}, column {piece.column} on; build again"
        )


def _held_whole(suffix: str, method: Method) -> bool:
    """Whether every rank holds all of a row-parallel linear's scales: one per output."""
    by_channel = method.kind == "w8a8" or (method.kind == "wna16" and not method.group)
    return by_channel and suffix in ("weight_scale", "weight_zero_point")


def _per_row(suffix: str, module: Linear) -> float:
    """Rows of a parameter for each output of a linear."""
    if suffix == "weight_zero_point":
        return module.method.bits / 32
    is_tiled = module.method.tiles is not None and suffix == module.method.scale
    return 1 / TILE if is_tiled else 1


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

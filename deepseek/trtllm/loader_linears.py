"""How TensorRT-LLM's loader fills linears, norms, embeddings and the head of one rank.

Copying into a parameter converts types and stretches dimensions of 1 without a word. What would be
wrong then is noted in `Rank.silent`; what the loader notices is a `LoaderRefusal`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.trtllm.loader_config import Method, QuantConfig
from deepseek.trtllm.loader_files import Checkpoint, LoaderRefusal
from deepseek.trtllm.loader_ranks import WHOLE, Cut, Place, RankPlace

TILE = 128
BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
#: Types that keep a value when they are converted to BF16, but for rounding.
_HIGH = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Parameters = dict[str, Tensor]


@dataclass
class Rank:
    """All that filling a module of one rank needs. `silent` maps a key to what the loader does to
    it without a word although it is wrong."""

    checkpoint: Checkpoint
    config: ModelConfig
    quant: QuantConfig
    place: RankPlace
    silent: dict[str, str] = field(default_factory=dict)

    def fill(self, key: str, source: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A parameter of this type and shape after `source`, read as `key`, was copied into it.

        Raises:
            LoaderRefusal: the shapes do not fit, not even by stretching.
        """
        if tuple(source.shape) != shape:
            if not _stretches(tuple(source.shape), shape):
                raise LoaderRefusal(
                    f"{self.checkpoint.directory}: tensor {key} gives a rank the shape "
                    f"{list(source.shape)}, where TensorRT-LLM needs {list(shape)}"
                )
            self.silent[key] = f"is stretched from {list(source.shape)} to {list(shape)}"
            source = source.expand(shape)
        if source.dtype != dtype and not (source.dtype in _HIGH and dtype in _HIGH):
            why = "does not list its module" if source.dtype == FP8 else "says so"
            self.silent[key] = (
                f"is {_short(source.dtype)} and is converted to {_short(dtype)} value by value, "
                f"because {self.quant.source or 'config.json'} {why}"
            )
        return source.to(dtype)

    def joined(self, keys: list[str], parts: list[Tensor]) -> Tensor:
        """Rows of several tensors, one below the other.

        Raises:
            LoaderRefusal: they are not as wide, or of several types.
        """
        first = parts[0]
        for key, part in zip(keys, parts, strict=True):
            if part.dim() != 2 or part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise LoaderRefusal(
                    f"{self.checkpoint.directory}: tensor {key} is {_short(part.dtype)} "
                    f"{list(part.shape)}, which TensorRT-LLM cannot put below "
                    f"{_short(first.dtype)} {list(first.shape)} of {keys[0]}"
                )
        return torch.cat(parts, dim=0)

    def put(self, key: str, source: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The same for a parameter that takes the bytes as they are, whatever their type.

        Raises:
            LoaderRefusal: the shapes do not fit.
        """
        if source.dtype.itemsize != dtype.itemsize:
            raise LoaderRefusal(
                f"{self.checkpoint.directory}: tensor {key} is {_short(source.dtype)}, whose bytes "
                f"TensorRT-LLM takes for {_short(dtype)}; the sizes differ"
            )
        if source.dtype != dtype and {source.dtype, dtype} != {torch.int8, torch.uint8}:
            self.silent[key] = (
                f"is {_short(source.dtype)}, and its bytes are taken for {_short(dtype)}"
            )
        return self.fill(key, source.contiguous().view(dtype), dtype, shape)


def norm(rank: Rank, name: str, width: int) -> Parameters:
    """An RMSNorm: the whole vector, in BF16."""
    key = f"{name}.weight"
    return {"weight": rank.fill(key, rank.checkpoint.take(key), BF16, (width,))}


def router(rank: Rank, name: str) -> Parameters:
    """The router of a MoE layer, whole on every rank: BF16 weight, FP32 correction bias."""
    experts, hidden = rank.config.n_routed_experts, rank.config.hidden_size
    weight, bias = f"{name}.weight", f"{name}.e_score_correction_bias"
    return {
        "weight": rank.fill(weight, rank.checkpoint.take(weight), BF16, (experts, hidden)),
        "e_score_correction_bias": rank.fill(bias, rank.checkpoint.take(bias), F32, (experts,)),
    }


def embedding(rank: Rank, name: str) -> Parameters:
    """The embedding, which this loader keeps whole on every rank."""
    key = f"{name}.weight"
    shape = rank.config.vocab_size, rank.config.hidden_size
    return {"weight": rank.fill(key, rank.checkpoint.take(key), BF16, shape)}


def head(rank: Rank, name: str) -> Parameters:
    """The head: rows of the vocabulary, equal parts; the last rank fills up with zeros."""
    key, place = f"{name}.weight", rank.place.attention
    vocab, hidden = rank.config.vocab_size, rank.config.hidden_size
    rows = math.ceil(vocab / place.size)
    last = place.rank == place.size - 1
    own = rows - (rows * place.size - vocab if last else 0)
    _whole_shape(rank, key, (vocab, hidden))
    weight = rank.checkpoint.take(key, 0, place.part(vocab))
    filled = rank.fill(key, weight, BF16, (own, hidden))
    if own == rows:
        return {"weight": filled}
    return {"weight": torch.nn.functional.pad(filled, (0, 0, 0, rows - own))}


def linear(
    rank: Rank,
    name: str,
    outputs: int,
    inputs: int,
    cut: Cut,
    place: Place | None = None,
    *,
    always_bf16: bool = False,
) -> Parameters:
    """A linear of its own: BF16 or FP8 blocks. `always_bf16` is for one that no quantization
    reaches.

    Raises:
        LoaderRefusal: a tensor is missing or of another shape, or tp does not divide the linear.
    """
    place = place or (WHOLE if cut == "whole" else rank.place.attention)
    dim = 1 if cut == "row" else 0
    local = [outputs, inputs]
    if cut != "whole":
        local[dim] = divided(rank, name, local[dim], place)
    method = "bf16" if always_bf16 else _dense_method(rank, name, rank.quant.linear(name))
    key = f"{name}.weight"
    weight = rank.checkpoint.take(key, dim, _part(rank, key, dim, place))
    shape = local[0], local[1]
    if method == "bf16":
        return {"weight": rank.fill(key, weight, BF16, shape)}
    check_tiles(rank, name, local[dim], place)
    scale_key = scale_of(rank, name)
    scale = rank.checkpoint.take(scale_key, dim, _part(rank, scale_key, dim, place))
    return {
        "weight": rank.fill(key, weight, FP8, shape),
        "weight_scale": rank.fill(scale_key, scale, F32, tiles(shape)),
    }


def gate_up(rank: Rank, name: str, width: int, place: Place) -> Parameters:
    """A fused gate and up of a dense MLP or of the shared experts: rows of gate, then of up.

    Raises:
        LoaderRefusal: as `linear`.
    """
    hidden = rank.config.hidden_size
    method = _dense_method(rank, name, rank.quant.gate_up(name))
    local = divided(rank, name, width, place)
    modules = [name.replace("gate_up_proj", role) for role in ("gate_proj", "up_proj")]
    keys = [f"{module}.weight" for module in modules]
    weight = rank.joined(
        keys, [rank.checkpoint.take(key, 0, _part(rank, key, 0, place)) for key in keys]
    )
    shape = 2 * local, hidden
    if method == "bf16":
        return {"weight": rank.fill(keys[0], weight, BF16, shape)}
    check_tiles(rank, name, local, place)
    # The name of the first one's scale decides for both.
    suffix = scale_of(rank, modules[0]).rpartition(".")[2]
    scale_keys = [f"{module}.{suffix}" for module in modules]
    scale = rank.joined(
        scale_keys,
        [rank.checkpoint.take(key, 0, _part(rank, key, 0, place)) for key in scale_keys],
    )
    return {
        "weight": rank.fill(keys[0], weight, FP8, shape),
        "weight_scale": rank.fill(scale_keys[0], scale, F32, tiles(shape)),
    }


def tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """Tiles of a weight in each direction, partial ones counted."""
    return math.ceil(shape[0] / TILE), math.ceil(shape[1] / TILE)


def scale_of(rank: Rank, name: str) -> str:
    """The key of a linear's tile scales: `weight_scale_inv`, or ModelOpt's `weight_scale`."""
    key = f"{name}.weight_scale_inv"
    other = f"{name}.weight_scale"
    return other if key not in rank.checkpoint and other in rank.checkpoint else key


def divided(rank: Rank, name: str, width: int, place: Place) -> int:
    """This rank's share of a width.

    Raises:
        LoaderRefusal: the ranks do not divide it.
    """
    if width % place.size:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: {place.size} ranks do not divide the {width} rows or "
            f"columns of {name}; choose another tp"
        )
    return width // place.size


def check_tiles(rank: Rank, name: str, local: int, place: Place) -> None:
    """Check that ranks cut an FP8 linear between tiles, `local` rows or columns each. Elsewhere the
    loader stops at the shape of the scales, or, where the numbers of tiles happen to agree,
    multiplies weights by the scales of others.

    Raises:
        LoaderRefusal: they do not.
    """
    if place.size > 1 and local % TILE:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: each of {place.size} ranks would hold {local} rows or "
            f"columns of {name}, no multiple of {TILE}, which cuts through its FP8 tiles; choose "
            "another tp, or store it in BF16 (dialect single)"
        )


def _part(rank: Rank, key: str, dim: int, place: Place) -> slice | None:
    """This rank's part of a tensor, by the size that the file gives it."""
    if key not in rank.checkpoint or place.size == 1:
        return None
    shape = rank.checkpoint.entry(key).shape
    if len(shape) <= dim:  # a vector is not cut along its second dimension
        return None
    return place.part(shape[dim])


def _dense_method(rank: Rank, name: str, method: Method) -> Method:
    if method in ("bf16", "fp8-block"):
        return method
    raise LoaderRefusal(
        f"{rank.quant.source} quantizes {name} like the routed experts; exclude it, or list it "
        "as FP8_BLOCK_SCALES"
    )


def _whole_shape(rank: Rank, key: str, shape: tuple[int, ...]) -> None:
    if key in rank.checkpoint and rank.checkpoint.entry(key).shape != shape:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: tensor {key} has the shape "
            f"{list(rank.checkpoint.entry(key).shape)}, where TensorRT-LLM needs {list(shape)}"
        )


def _stretches(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    padded = (1,) * (len(target) - len(source)) + source
    return len(padded) == len(target) and all(
        a in (1, b) for a, b in zip(padded, target, strict=True)
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

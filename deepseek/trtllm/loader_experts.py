"""How TensorRT-LLM's loader fills the routed experts of one rank (CUTLASS backend, SM90).

`w1` is gate_proj, `w3` is up_proj, `w2` is down_proj. Rows of w3 come before those of w1. A rank
holds the experts of its group, and of each of them its part of the inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.trtllm.loader_files import LoaderRefusal
from deepseek.trtllm.loader_linears import (
    BF16,
    F32,
    FP8,
    TILE,
    Parameters,
    Rank,
    divided,
)

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GROUP = 128
#: Inputs that the kernel's order of INT8 weights takes together.
_INT8_ROWS = 64


def experts(rank: Rank, name: str) -> Parameters:
    """The routed experts of a layer, `name` being `model.layers.N.mlp.experts`.

    Raises:
        LoaderRefusal: a tensor is missing or of another shape, or ep or tp does not divide them.
    """
    match rank.quant.experts(name):
        case "int4-fp8":
            return _int4(rank, name)
        case "int8":
            return _int8(rank, name)
        case "fp8-block":
            return _fp8_block(rank, name)
        case "bf16":
            return _weights(rank, name, BF16)


def interleave_factor(width: int) -> int | None:
    """How many neighboring scales of a row TensorRT-LLM puts side by side: 4, 2 or 1 by the width
    of the inputs; None where it refuses the width."""
    return next((f for f in (4, 2, 1) if width % (GROUP * f) == 0), None)


def interleaved(scales: Tensor, factor: int) -> Tensor:
    """[experts, N, groups] -> [experts, groups / factor, N * factor]: `factor` groups of a row stay
    neighbors, rows follow each other."""
    count, rows, groups = scales.shape
    blocks = scales.reshape(count, rows, groups // factor, factor).permute(0, 2, 1, 3)
    return blocks.reshape(count, groups // factor, rows * factor)


def local_experts(rank: Rank, name: str) -> range:
    """The experts of this rank's group.

    Raises:
        LoaderRefusal: ep does not divide the experts.
    """
    place = rank.place.experts
    number, rest = divmod(rank.config.n_routed_experts, place.size)
    if rest:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: ep {place.size} does not divide the "
            f"{rank.config.n_routed_experts} experts of {name}; choose another ep"
        )
    return range(place.rank * number, (place.rank + 1) * number)


def _take(rank: Rank, key: str, dim: int | None) -> Tensor:
    """A tensor of an expert, cut along `dim` among the ranks that share the expert."""
    place = rank.place.within_expert
    part = None
    if dim is not None and place.size > 1 and key in rank.checkpoint:
        shape = rank.checkpoint.entry(key).shape
        part = place.part(shape[dim]) if len(shape) > dim else None
    return rank.checkpoint.take(key, dim or 0, part)


def _inner(rank: Rank, name: str) -> int:
    """Inner width of an expert on this rank."""
    return divided(rank, name, rank.config.moe_intermediate_size, rank.place.within_expert)


def _weights(rank: Rank, name: str, dtype: torch.dtype, packed: int = 1) -> Parameters:
    """The weights [experts, N, K / packed] of all local experts; bytes as they are."""
    hidden, inner = rank.config.hidden_size, _inner(rank, name)
    first: list[Tensor] = []
    second: list[Tensor] = []
    for expert in local_experts(rank, name):
        halves = []
        for role in (UP, GATE):
            key = f"{name}.{expert}.{role}.weight"
            shape = inner, hidden // packed
            halves.append(rank.put(key, _take(rank, key, 0), dtype, shape))
        first.append(torch.cat(halves, dim=0))
        key = f"{name}.{expert}.{DOWN}.weight"
        second.append(rank.put(key, _take(rank, key, 1), dtype, (hidden, inner // packed)))
    return {"w3_w1_weight": torch.stack(first), "w2_weight": torch.stack(second)}


def _int4(rank: Rank, name: str) -> Parameters:
    hidden, inner = rank.config.hidden_size, _inner(rank, name)
    factors = []
    for width in (hidden, inner):
        factor = interleave_factor(width)
        if factor is None:
            raise LoaderRefusal(
                f"{rank.checkpoint.directory}: each rank would multiply {width} inputs of {name}, "
                f"no multiple of {GROUP}; choose another tp or ep"
            )
        factors.append(factor)
    filled = _weights(rank, name, torch.int8, packed=2)
    local = local_experts(rank, name)

    # gate and up: one input scale for all experts of the layer, the same on every rank
    everyone = range(rank.config.n_routed_experts)
    scales = [_input_scales(rank, name, UP, everyone), _input_scales(rank, name, GATE, everyone)]
    largest = torch.maximum(*scales).max()
    filled["fc31_act_scale"] = (1 / largest).to(BF16).expand(len(local), hidden)
    filled["fc31_alpha"] = largest.float().expand(len(local), 1)
    rows = [_scales(rank, name, role, local, 0, (inner, hidden // GROUP)) for role in (UP, GATE)]
    filled["fc31_weight_scale"] = interleaved(torch.cat(rows, dim=1), factors[0])

    # down: one for the experts of this rank, rounded to BF16 before anything is done with it
    largest = _input_scales(rank, name, DOWN, local).to(BF16).max()
    filled["fc2_act_scale"] = (1 / largest).to(BF16).expand(len(local), inner, 1)
    filled["fc2_alpha"] = largest.float().expand(len(local), 1)
    down = _scales(rank, name, DOWN, local, 1, (hidden, inner // GROUP))
    filled["fc2_weight_scale"] = interleaved(down, factors[1])
    return filled


def _input_scales(rank: Rank, name: str, role: str, numbers: range) -> Tensor:
    """`input_scale` of these experts, stacked."""
    keys = [f"{name}.{number}.{role}.input_scale" for number in numbers]
    scales = [_take(rank, key, None) for key in keys]
    for key, scale in zip(keys, scales, strict=True):
        if scale.shape != scales[0].shape or scale.numel() != 1:
            raise LoaderRefusal(
                f"{rank.checkpoint.directory}: tensor {key} has the shape {list(scale.shape)}; "
                "every expert needs one value, in the same shape"
            )
    return torch.stack(scales)


def _scales(
    rank: Rank, name: str, role: str, local: range, dim: int, shape: tuple[int, int]
) -> Tensor:
    """Group scales of these experts in BF16, [experts, rows, groups]."""
    parts = []
    for expert in local:
        key = f"{name}.{expert}.{role}.weight_scale_inv"
        parts.append(rank.fill(key, _take(rank, key, dim), BF16, shape))
    return torch.stack(parts)


def _int8(rank: Rank, name: str) -> Parameters:
    """INT8 weights are stored inputs first. The kernel's own order of the bytes, which the loader
    then makes in C++, is left out: here it is the identity."""
    hidden, inner = rank.config.hidden_size, _inner(rank, name)
    for width in (hidden, inner):
        if width % _INT8_ROWS:
            raise LoaderRefusal(
                f"{rank.checkpoint.directory}: each rank would multiply {width} inputs of {name}, "
                f"no multiple of {_INT8_ROWS}; choose another tp or ep"
            )
    weights = _weights(rank, name, torch.int8)
    local = local_experts(rank, name)

    def scales(role: str, width: int) -> Tensor:
        parts = []
        for expert in local:
            key = f"{name}.{expert}.{role}.weight_scale"
            scale = _take(rank, key, None if role == DOWN else 0)
            if scale.dim() != 1:
                raise LoaderRefusal(
                    f"{rank.checkpoint.directory}: tensor {key} has the shape "
                    f"{list(rank.checkpoint.entry(key).shape)}; W8A16 needs one scale per output "
                    "in a single dimension"
                )
            parts.append(rank.fill(key, scale, BF16, (width,)))
        return torch.stack(parts)

    return {
        "w3_w1_weight": weights["w3_w1_weight"].transpose(1, 2).contiguous(),
        "w2_weight": weights["w2_weight"].transpose(1, 2).contiguous(),
        "fc31_weight_scale": torch.cat([scales(UP, inner), scales(GATE, inner)], dim=1),
        "fc2_weight_scale": scales(DOWN, hidden),
    }


def _fp8_block(rank: Rank, name: str) -> Parameters:
    hidden, inner = rank.config.hidden_size, _inner(rank, name)
    if inner % TILE:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: each rank would hold {inner} inner rows of {name}, no "
            f"multiple of {TILE}; choose another tp or ep"
        )
    filled = _weights(rank, name, FP8)
    first: list[Tensor] = []
    second: list[Tensor] = []
    columns = -(-hidden // TILE)
    for expert in local_experts(rank, name):
        halves = []
        for role in (UP, GATE):
            key = f"{name}.{expert}.{role}.weight_scale_inv"
            scale = _scale_if_there(rank, key, 0)
            halves.append(rank.fill(key, scale, F32, (inner // TILE, columns)))
        first.append(torch.cat(halves, dim=0))
        key = f"{name}.{expert}.{DOWN}.weight_scale_inv"
        scale = _scale_if_there(rank, key, 1)
        second.append(rank.fill(key, scale, F32, (columns, inner // TILE)))
    filled["w3_w1_weight_scaling_factor"] = torch.stack(first)
    filled["w2_weight_scaling_factor"] = torch.stack(second)
    return filled


def _scale_if_there(rank: Rank, key: str, dim: int) -> Tensor:
    """Tile scales of an expert. The loader leaves the parameter undefined where there are none,
    and says nothing; so that this is not missed, their absence is a refusal here."""
    if key not in rank.checkpoint:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory} lacks the tensor {key}; TensorRT-LLM would leave the "
            "scales of this expert undefined without a word"
        )
    return _take(rank, key, dim)

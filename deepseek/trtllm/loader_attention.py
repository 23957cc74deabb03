"""How TensorRT-LLM's loader fills the attention of one rank.

`kv_a_proj_with_mqa` holds the rows of `q_a_proj`, then its own, on every rank. `kv_b_proj` is cut
by heads and reordered: keys of all local heads, then values of all local heads; absorbed attention
reads a transposed copy of the keys' part (`k_b_proj_trans`) and the values' part (`v_b_proj`).
"""

from __future__ import annotations

from collections.abc import Iterator

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
    linear,
    norm,
    tiles,
)


def attention(rank: Rank, name: str) -> Iterator[tuple[str, Parameters]]:
    """The modules of one attention, `name` being `model.layers.N.self_attn`.

    Raises:
        LoaderRefusal: a tensor is missing or of another shape, or tp does not divide the heads.
    """
    config = rank.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    if heads % rank.place.layout.tp:
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: tp {rank.place.layout.tp} does not divide the {heads} "
            "attention heads; choose another tp"
        )
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = f"{name}.q_proj"
        yield query, linear(rank, query, queries, hidden, "column")
    else:
        query = f"{name}.q_b_proj"
        yield (
            f"{name}.q_a_layernorm",
            norm(rank, f"{name}.q_a_layernorm", config.q_lora_rank),
        )
        yield query, linear(rank, query, queries, config.q_lora_rank, "column")
    yield f"{name}.kv_a_proj_with_mqa", _fused_a(rank, name)
    yield f"{name}.kv_a_layernorm", norm(rank, f"{name}.kv_a_layernorm", config.kv_lora_rank)
    yield f"{name}.kv_b_proj", _kv_b(rank, f"{name}.kv_b_proj")
    output = f"{name}.o_proj"
    yield output, linear(rank, output, hidden, heads * config.v_head_dim, "row")


def _fused_a(rank: Rank, name: str) -> Parameters:
    config, checkpoint = rank.config, rank.checkpoint
    module = f"{name}.kv_a_proj_with_mqa"
    parts = [module] if config.q_lora_rank is None else [f"{name}.q_a_proj", module]
    rows = config.latent_dim + (config.q_lora_rank or 0)
    shape = rows, config.hidden_size
    method = rank.quant.linear(module)
    if method not in ("bf16", "fp8-block"):
        raise LoaderRefusal(
            f"{rank.quant.source} gives {module} another format than BF16 or FP8 blocks; "
            "TensorRT-LLM fuses it with q_a_proj and reads no other"
        )
    is_fp8 = method == "fp8-block"
    key = f"{module}.weight"
    keys = [f"{part}.weight" for part in parts]
    weight = rank.joined(keys, [checkpoint.take(part) for part in keys])
    filled: Parameters = {}
    scale_key = f"{module}.weight_scale_inv"
    if scale_key in checkpoint:
        if not is_fp8:
            raise LoaderRefusal(
                f"{checkpoint.directory} holds {scale_key}, but {rank.quant.source} does not give "
                f"{module} FP8_BLOCK_SCALES, so that TensorRT-LLM has no weight_scale to put it "
                "into; list exactly this name"
            )
        if config.q_lora_rank is not None and config.q_lora_rank % TILE:
            raise LoaderRefusal(
                f"{checkpoint.directory}: q_lora_rank is {config.q_lora_rank}, no multiple of "
                f"{TILE}, so the FP8 tiles of {module} would not follow those of q_a_proj; store "
                "both in BF16 (dialect single)"
            )
        scale_keys = [f"{part}.weight_scale_inv" for part in parts]
        scale = rank.joined(scale_keys, [checkpoint.take(part) for part in scale_keys])
        filled["weight_scale"] = rank.fill(scale_key, scale, F32, tiles(shape))
    elif is_fp8:
        rank.silent[key] = "is FP8, but has no weight_scale_inv, so its scales stay undefined"
    return {"weight": rank.fill(key, weight, FP8 if is_fp8 else BF16, shape)} | filled


def _kv_b(rank: Rank, module: str) -> Parameters:
    """The loader's own order of kv_b_proj, and what absorbed attention reads of it."""
    config, checkpoint = rank.config, rank.checkpoint
    key, scale_key = f"{module}.weight", f"{module}.weight_scale_inv"
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    heads = config.num_attention_heads // rank.place.layout.tp
    method = rank.quant.linear(module)
    if method not in ("bf16", "fp8-block"):
        raise LoaderRefusal(
            f"{rank.quant.source} gives {module} another format than BF16 or FP8 blocks, which "
            "TensorRT-LLM cannot cut by heads"
        )
    dequantized = rank.quant.dequantizes_kv_b
    is_fp8 = method == "fp8-block" and not dequantized
    if dequantized:
        weight = _dequantized(rank, key, scale_key)
    else:
        weight = checkpoint.take(key, 0, _heads(rank, key, nope + value))
    keys, values = _by_head(rank, key, weight, heads, nope, value, latent)
    dtype = FP8 if is_fp8 else BF16
    order = torch.cat([keys.reshape(-1, latent), values.reshape(-1, latent)], dim=0)
    filled = {
        "weight": rank.fill(key, order, dtype, (heads * (nope + value), latent)),
        "k_b_proj_trans": rank.fill(
            key, keys.transpose(2, 1).contiguous(), dtype, (heads, latent, nope)
        ),
    }
    filled["v_b_proj"] = filled["weight"][heads * nope :].view(heads, value, latent)
    if not is_fp8:
        return filled
    for what, width in (("qk_nope_head_dim", nope), ("v_head_dim", value)):
        if width % TILE:
            raise LoaderRefusal(
                f"{checkpoint.directory}: {what} is {width}, no multiple of {TILE}, so "
                f"TensorRT-LLM cannot cut {scale_key} by heads; keep {module} in BF16"
            )
    keys, values = _by_head(
        rank,
        scale_key,
        checkpoint.take(scale_key, 0, _heads(rank, scale_key, (nope + value) // TILE)),
        heads,
        nope // TILE,
        value // TILE,
        latent // TILE,
    )
    columns = latent // TILE
    order = torch.cat([keys.reshape(-1, columns), values.reshape(-1, columns)], dim=0)
    scale_shape = heads * (nope + value) // TILE, columns
    filled["weight_scale"] = rank.fill(scale_key, order, F32, scale_shape)
    filled["k_b_proj_trans_scale"] = rank.fill(
        scale_key, keys.transpose(2, 1).contiguous(), F32, (heads, columns, nope // TILE)
    )
    own_values = filled["weight_scale"][heads * nope // TILE :]
    filled["v_b_proj_scale"] = own_values.view(heads, value // TILE, columns)
    return filled


def _heads(rank: Rank, key: str, rows_of_head: int) -> slice | None:
    """Rows of this rank's heads in a tensor of kv_b_proj."""
    heads = rank.config.num_attention_heads
    if key not in rank.checkpoint or rank.checkpoint.entry(key).shape[:1] != (
        heads * rows_of_head,
    ):
        return None  # `_by_head` refuses it
    local = heads // rank.place.layout.tp
    first = rank.place.rank * local * rows_of_head
    return slice(first, first + local * rows_of_head)


def _by_head(
    rank: Rank, key: str, part: Tensor, heads: int, nope: int, value: int, latent: int
) -> tuple[Tensor, Tensor]:
    """The rows of keys and of values, [heads, rows, latent] each."""
    if tuple(part.shape) != (heads * (nope + value), latent):
        whole = rank.config.num_attention_heads * (nope + value)
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: tensor {key} has the shape "
            f"{list(rank.checkpoint.entry(key).shape)}; by heads TensorRT-LLM needs "
            f"{[whole, latent]}"
        )
    by_head = part.view(heads, nope + value, latent)
    return by_head[:, :nope], by_head[:, nope:]


def _dequantized(rank: Rank, key: str, scale_key: str) -> Tensor:
    """This rank's heads of an FP8 kv_b_proj in FP32. All heads are read, as the loader does."""
    config = rank.config
    rows_of_head = config.qk_nope_head_dim + config.v_head_dim
    weight = rank.checkpoint.take(key)
    scale = rank.checkpoint.take(scale_key)
    if weight.dim() != 2 or tuple(scale.shape) != tiles((weight.shape[0], weight.shape[1])):
        raise LoaderRefusal(
            f"{rank.checkpoint.directory}: {scale_key} has the shape {list(scale.shape)}, which "
            f"is not that of the tiles of {key}, {list(weight.shape)}"
        )
    rows = _heads(rank, key, rows_of_head) or slice(None)
    of_rows = scale.float().repeat_interleave(TILE, dim=0)[: weight.shape[0]][rows]
    columns = of_rows.repeat_interleave(TILE, dim=1)[:, : weight.shape[1]]
    return weight[rows].float() * columns

"""Makes checkpoints of random weights in a release's format: the shapes of a built-in model, any
depth.

Time and memory of a job on layers of true shapes can be measured with them, without the 688 GB of
DeepSeek-V3; accuracy cannot. Names, shapes and types are the inventory's: linears are e4m3 in FP8
tiles with an FP32 `weight_scale_inv` (BF16 for Moonlight, as released), the bias of the router and
the norm of an indexer are FP32, all other tensors are BF16.
`synthetic_weights.py` makes the values. `quant_jobs synthesize` and the benchmarks call this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.config import FAMILY, ModelConfig
from deepseek.errors import CheckpointError, ConfigError
from deepseek.files import write_atomic, write_json
from deepseek.formats import FP8_BLOCK
from deepseek.inventory import TensorSpec, tensors
from deepseek.models import DEEPSEEK_V3, MODELS
from deepseek.outputs import check_directory, check_space, make_directory
from deepseek.source.checkpoint import scale_name
from deepseek.source.index import INDEX_FILE
from deepseek.source.synthetic_weights import WeightMaker
from deepseek.tensor_files import stream_tensors

Preset = Literal["deepseek-v3", "deepseek-v3.2", "kimi-k2", "moonlight", "small", "small-v3.2"]

#: Largest size of one shard in bytes, unless one tensor is larger; as in the release.
SHARD_BYTES = 4 << 30
#: BOS, EOS, and a token per byte.
MIN_VOCAB = 258

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

#: A model of a few megabytes for tests.
_SMALL = replace(
    DEEPSEEK_V3,
    vocab_size=MIN_VOCAB,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
_PRESETS: dict[str, ModelConfig] = {
    **MODELS,
    "small": _SMALL,
    "small-v3.2": replace(
        _SMALL, model_type="deepseek_v32", index_n_heads=2, index_head_dim=64, index_topk=512
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of a model that may differ from the preset's; None keeps the preset's value.

    The defaults of layers and experts are small, so that the model fits a disk.
    """

    layers: int = 4
    dense_layers: int = 1
    mtp_layers: int = 0
    experts: int = 16
    experts_per_token: int | None = None
    vocab: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    moe_intermediate: int | None = None
    heads: int | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """The checkpoint that `synthesize` wrote."""

    config: ModelConfig
    num_shards: int
    num_bytes: int


def synthetic_config(size: Size, preset: Preset = "deepseek-v3") -> ModelConfig:
    """The preset's config with other sizes. BOS and EOS are those of the tokenizer of bytes.

    Where the preset has several groups of experts, the routed experts form 8, 4 or 2 groups of at
    least two experts (the first of these numbers that divides them), else one group. A token
    reaches half of the groups, as in the release.

    Raises:
        ConfigError: the sizes contradict each other, or the vocabulary cannot hold all bytes.
    """
    base = _PRESETS[preset]
    numbers = (8, 4, 2) if base.n_group > 1 else ()
    groups = next((n for n in numbers if size.experts % n == 0 and size.experts >= 2 * n), 1)
    reachable = size.experts // groups * max(groups // 2, 1)
    requested: dict[str, int | None] = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "moe_intermediate_size": size.moe_intermediate,
        "num_attention_heads": size.heads,
        "num_experts_per_tok": size.experts_per_token,
    }
    overrides: dict[str, Any] = {k: v for k, v in requested.items() if v is not None}
    overrides.setdefault("num_experts_per_tok", min(base.num_experts_per_tok, reachable))
    if overrides.get("vocab_size", base.vocab_size) < MIN_VOCAB:
        raise ConfigError(
            f"a vocabulary of {overrides['vocab_size']} cannot hold BOS, EOS and all bytes; "
            f"--vocab must be at least {MIN_VOCAB}"
        )
    return replace(
        base,
        bos_token_id=0,
        eos_token_id=1,
        num_hidden_layers=size.layers,
        first_k_dense_replace=size.dense_layers,
        num_nextn_predict_layers=size.mtp_layers,
        n_routed_experts=size.experts,
        n_group=groups,
        topk_group=max(groups // 2, 1),
        **overrides,
    )


def synthesize(
    output: Path,
    config: ModelConfig,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Made:
    """Write a checkpoint into `output`.

    config.json is written last, so no reader accepts the directory of a killed run as a checkpoint.
    Memory: the weight maker's pool and some rows of one tensor. `advance` is called with the bytes
    of every piece that is written; their sum is `num_bytes(config)`.

    Raises:
        CheckpointError: `output` is not empty.
        OutputError: `output` cannot be a directory, or the disk is too small or refuses a file.
    """
    _check_place(output, num_bytes(config))
    make_directory(output)
    maker = WeightMaker(config, seed)
    shards = shard_layouts(config, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, layout in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def make(tensor: str) -> Iterator[Tensor]:
            for piece in maker.pieces(tensor):
                yield piece
                if advance is not None:
                    advance(piece.nbytes)

        stream_tensors(output / name, layout, make, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(layout, name)
    total = num_bytes(config)
    write_json(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, text in _tokenizer_files(config).items():
        write_atomic(output / file, text.encode())
    write_json(output / "config.json", config_json(config))
    return Made(config, len(shards), total)


def num_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors as stored."""
    return sum(
        math.prod(shape) * dtype.itemsize
        for shard in shard_layouts(config)
        for dtype, shape in shard.values()
    )


def shard_layouts(
    config: ModelConfig, shard_bytes: int = SHARD_BYTES
) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Type and shape of every tensor by name, in checkpoint order, cut into shards of at most
    `shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for spec in tensors(config):
        stored = _stored(config, spec)
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= stored
        filled += size
    return shards


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a synthetic model, with the release's keys."""
    other = {"yarn", "weight_block_size", "model_type", "more_eos_token_ids"}
    other |= set() if config.has_indexer else {"index_n_heads", "index_head_dim", "index_topk"}
    raw: dict[str, Any] = {
        key: getattr(config, key) for key in config.__slots__ if key not in other
    }
    raw |= {
        "architectures": [*FAMILY[config.model_type]],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
    }
    if config.weight_block_size is not None:
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    if config.yarn is not None:
        scaling = {key: getattr(config.yarn, key) for key in config.yarn.__slots__}
        raw["rope_scaling"] = {"type": "yarn", **scaling}
    return raw


# --- files ---


def _check_place(output: Path, needed_bytes: int) -> None:
    check_directory(output)
    if output.is_dir() and any(output.iterdir()):
        finished = (output / "config.json").exists()
        content = "a checkpoint" if finished else "files that are no checkpoint, or not a whole one"
        raise CheckpointError(
            f"{output} already holds {content}; remove it, or give another --output"
        )
    remedy = "lower --layers, --experts or --vocab, or give another --output"
    check_space(output, needed_bytes, remedy)


def _stored(
    config: ModelConfig, spec: TensorSpec
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if spec.kind == "float32":
        return {spec.name: (torch.float32, spec.shape)}
    if spec.kind == "high" or config.weight_block_size is None:
        return {spec.name: (torch.bfloat16, spec.shape)}
    num_tiles = tuple(-(-size // FP8_BLOCK) for size in spec.shape)
    return {
        spec.name: (torch.float8_e4m3fn, spec.shape),
        scale_name(spec.name): (torch.float32, num_tiles),
    }


def _tokenizer_files(config: ModelConfig) -> dict[str, str]:
    """The files of a tokenizer of bytes, by name: ids 0 and 1 are BOS and EOS, then one id per
    byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {_BOS: 0, _EOS: 1} | {letter: 2 + index for index, letter in enumerate(alphabet)}
    assert len(vocab) == MIN_VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_BOS, special=True), AddedToken(_EOS, special=True)])
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": str(tokenizer.to_str(pretty=True)) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n",
    }

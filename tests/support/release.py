"""The released DeepSeek-V3, whole, as files that take no space: real names, shapes, types, shards.

What is known and how:

    counts            read from the release's own headers (revision e815299b)
    names, shapes     the 43 kinds of tensors that the headers of DeepSeek-R1 hold; `TABLE`
    config.json       V3's and R1's as published; the others as R1's with the stated difference
    shards            reconstructed. Published are the number of files, the size of each to 0.1 GiB,
                      and the shards of the embedding (1), the head (160) and the MTP layer's own
                      tensors (163). One rule gives all of that: in each of eight runs of layers a
                      shard is closed once its tensors, at two bytes an element, reach 8 GiB.
                      Where single experts lie at the edges was not seen.

R1, R1-0528, V3-0324 and V3.1 are taken to have V3's shapes and shards; their indexes were not seen.
The shards are sparse files: a true header, and a size without data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

NUM_SHARDS = 163
NUM_TENSORS = 91_991
NUM_ELEMENTS = 684_531_386_000
TENSOR_BYTES = 688_574_839_360
ELEMENTS_OF = {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
#: What the index says: twice the elements, the bytes of neither the tensors nor the files.
INDEX_TOTAL_SIZE = 1_369_062_772_000
#: Bytes of all files in the release; ours differ in the headers, whose order of names is not known.
FILE_BYTES = 688_586_727_753
INDEX_FILE = "model.safetensors.index.json"

#: Sizes of the published files in GiB, rounded up to 0.1; all others have 4.1.
SHARD_GIB = {1: 4.9, 12: 1.3, 141: 3.0, 160: 4.9, 163: 6.2} | dict.fromkeys(
    (34, 56, 78, 100, 122), 1.7
)

_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

#: DeepSeek-R1's config.json.
R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

#: DeepSeek-V3's config.json: R1's with four keys of an older transformers.
V3: dict[str, Any] = R1 | {
    "aux_loss_alpha": 0.001,
    "pretraining_tp": 1,
    "seq_aux": True,
    "transformers_version": "4.33.1",
}

#: The V3 family's config.json by model. Those of R1-0528 and V3-0324 are taken to be R1's; V3.1
#: adds how activations are scaled.
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": V3,
    "DeepSeek-R1": R1,
    "DeepSeek-R1-0528": R1,
    "DeepSeek-V3-0324": R1,
    "DeepSeek-V3.1": R1
    | {"quantization_config": R1["quantization_config"] | {"scale_fmt": "ue8m0"}},
}

#: First layers of the runs in which shards are filled; the last run holds the head and layer 61.
_RUNS = (0, 7, 15, 23, 31, 39, 47, 54, 62)
_SHARD_BYTES_AT_BF16 = 8 << 30

_ATTENTION = (
    ("self_attn.q_a_proj.weight", (1536, 7168), "F8_E4M3"),
    ("self_attn.q_a_layernorm.weight", (1536,), "BF16"),
    ("self_attn.q_b_proj.weight", (24576, 1536), "F8_E4M3"),
    ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168), "F8_E4M3"),
    ("self_attn.kv_a_layernorm.weight", (512,), "BF16"),
    ("self_attn.kv_b_proj.weight", (32768, 512), "F8_E4M3"),
    ("self_attn.o_proj.weight", (7168, 16384), "F8_E4M3"),
)
_DENSE = (
    ("mlp.gate_proj.weight", (18432, 7168), "F8_E4M3"),
    ("mlp.up_proj.weight", (18432, 7168), "F8_E4M3"),
    ("mlp.down_proj.weight", (7168, 18432), "F8_E4M3"),
)
_EXPERT = (
    ("gate_proj.weight", (2048, 7168), "F8_E4M3"),
    ("up_proj.weight", (2048, 7168), "F8_E4M3"),
    ("down_proj.weight", (7168, 2048), "F8_E4M3"),
)
_NORMS = (
    ("input_layernorm.weight", (7168,), "BF16"),
    ("post_attention_layernorm.weight", (7168,), "BF16"),
)
_ROUTER = (
    ("mlp.gate.weight", (256, 7168), "BF16"),
    ("mlp.gate.e_score_correction_bias", (256,), "F32"),
)
_MTP = (
    ("embed_tokens.weight", (129280, 7168), "BF16"),
    ("enorm.weight", (7168,), "BF16"),
    ("hnorm.weight", (7168,), "BF16"),
    ("eh_proj.weight", (7168, 14336), "BF16"),
    ("shared_head.norm.weight", (7168,), "BF16"),
    ("shared_head.head.weight", (129280, 7168), "BF16"),
)
_ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the release: its name, safetensors' name of its type, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.elements * _ITEM_BYTES[self.dtype]


def shards(*, bf16: bool = False, mtp: bool = True) -> Iterator[tuple[str, list[Stored]]]:
    """The shards in order: file name and tensors. `bf16` without FP8 tiles and scales, as the
    release's cast script writes them; `mtp` False without layer 61."""
    number = 0
    for first, end in pairwise(_RUNS):
        shard: list[Stored] = []
        filled = 0
        for tensors in _run(first, end):
            if tensors[0].name.startswith("model.layers.61.") and not mtp:
                continue
            shard += tensors[:1] if bf16 else tensors
            filled += 2 * tensors[0].elements
            if filled >= _SHARD_BYTES_AT_BF16:
                number += 1
                yield _shard_name(number), _as_bf16(shard) if bf16 else shard
                shard, filled = [], 0
        if shard:
            number += 1
            yield _shard_name(number), _as_bf16(shard) if bf16 else shard


def write_release(
    directory: Path, config: dict[str, Any] = V3, *, bf16: bool = False, mtp: bool = True
) -> None:
    """Write config.json, the index and the shards of the whole model: about 20 MB of files that
    claim to have 689 GB."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weight_map: dict[str, str] = {}
    for name, tensors in shards(bf16=bf16, mtp=mtp):
        write_hollow(directory / name, tensors)
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
    index = {"metadata": {"total_size": INDEX_TOTAL_SIZE}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def write_hollow(path: Path, tensors: list[Stored]) -> None:
    """A safetensors file with a true header and no data: reading its tensors gives zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)


def _shard_name(number: int) -> str:
    return f"model-{number:05d}-of-{NUM_SHARDS:06d}.safetensors"


def _as_bf16(tensors: list[Stored]) -> list[Stored]:
    return [Stored(t.name, "F32" if t.dtype == "F32" else "BF16", t.shape) for t in tensors]


def _run(first: int, end: int) -> Iterator[list[Stored]]:
    """Tensors of a run of layers, each with its scale where it has one, in the order of shards."""
    if first == 0:
        yield _with_scale("model.embed_tokens.weight", (129280, 7168), "BF16")
    for layer in range(first, end):
        if layer == 61:  # the main model ends before the MTP layer
            yield _with_scale("model.norm.weight", (7168,), "BF16")
            yield _with_scale("lm_head.weight", (129280, 7168), "BF16")
        for suffix, shape, dtype in _layer(layer):
            yield _with_scale(f"model.layers.{layer}.{suffix}", shape, dtype)


def _layer(layer: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield from _ATTENTION
    if layer < 3:
        yield from _DENSE
    else:
        yield from _ROUTER
        for expert in [*(f"experts.{number}" for number in range(256)), "shared_experts"]:
            for suffix, shape, dtype in _EXPERT:
                yield f"mlp.{expert}.{suffix}", shape, dtype
    yield from _NORMS
    if layer == 61:
        yield from _MTP


def _with_scale(name: str, shape: tuple[int, ...], dtype: str) -> list[Stored]:
    tensors = [Stored(name, dtype, shape)]
    if dtype == "F8_E4M3":
        tiles = tuple(-(-size // 128) for size in shape)
        tensors.append(Stored(f"{name}_scale_inv", "F32", tiles))
    return tensors

"""The largest model that a config.json may describe, one row per number, with the reason.

Every list that IntServe makes from a config (layers, experts, tensors) has a length that follows
from these numbers. Bounded, a config with a nonsensical number costs one sentence, not an hour.
The bounds leave room for models many times as large as any of the family.
"""

from __future__ import annotations

#: Field -> (largest value, why). `rope_scaling.` fields have their bare names.
LARGEST: dict[str, tuple[float, str]] = {
    "vocab_size": (1 << 22, "the family has at most 163,840 tokens"),
    "hidden_size": (1 << 16, "the family has at most 7,168"),
    "intermediate_size": (1 << 18, "the family has at most 18,432"),
    "moe_intermediate_size": (1 << 16, "the family has at most 2,048"),
    "num_hidden_layers": (1024, "the family has at most 61 layers"),
    "num_nextn_predict_layers": (16, "the family has at most 1 MTP layer"),
    "num_attention_heads": (4096, "the family has at most 128 heads"),
    "n_shared_experts": (64, "the family has at most 2"),
    "n_routed_experts": (4096, "the family has at most 384 experts"),
    "num_experts_per_tok": (4096, "it is at most the number of experts"),
    "n_group": (4096, "it is at most the number of experts"),
    "topk_group": (4096, "it is at most the number of groups"),
    "first_k_dense_replace": (1024, "it is at most the number of layers"),
    "q_lora_rank": (1 << 16, "the family has at most 1,536"),
    "kv_lora_rank": (1 << 16, "the family has at most 512"),
    "qk_nope_head_dim": (1 << 12, "the family has at most 128"),
    "qk_rope_head_dim": (1 << 12, "the family has at most 64"),
    "v_head_dim": (1 << 12, "the family has at most 128"),
    "index_n_heads": (4096, "the family has at most 64"),
    "index_head_dim": (1 << 12, "the family has at most 128"),
    "index_topk": (1 << 24, "it is at most the number of positions"),
    "max_position_embeddings": (1 << 24, "positions are exact in float32 up to 2^24"),
    "original_max_position_embeddings": (1 << 24, "positions are exact in float32 up to 2^24"),
    "bos_token_id": (1 << 22, "a token is one of the vocabulary"),
    "eos_token_id": (1 << 22, "a token is one of the vocabulary"),
    "rms_norm_eps": (1.0, "an epsilon is much less than 1"),
    "routed_scaling_factor": (1e4, "the family has at most 3"),
    "rope_theta": (1e12, "the family has at most 50,000"),
    "factor": (1 << 16, "the family has at most 64"),
    "beta_fast": (1e6, "the family has at most 32"),
    "beta_slow": (1e6, "the family has 1"),
    "mscale": (1e3, "the family has at most 1"),
    "mscale_all_dim": (1e3, "the family has at most 1"),
}
#: Of a field without a row.
LARGEST_OTHER: tuple[float, str] = (1 << 24, "no number of the family is as large")

#: Tensors of one checkpoint, scales included. DeepSeek-V3 has 91,991, Kimi-K2 139,000.
MAX_TENSORS = 1 << 20


def excess(name: str, value: float) -> str | None:
    """`is more than LIMIT (reason)` where a field's value is above its bound, else None."""
    limit, reason = LARGEST.get(name, LARGEST_OTHER)
    return f"is more than {limit:,} ({reason})" if value > limit else None


def num_source_tensors(layers: int, routed_experts: int) -> int:
    """Tensors that a source of so many layers holds at most, scales included: six per expert, and
    fewer than 40 others in a layer."""
    return layers * (6 * routed_experts + 40) + 3

"""The models whose shapes are built in, by the names that `--model` takes in place of a directory.

Values are those of the released config.json files. Checkpoints of other revisions with other values
are planned from their own directory. Called by `cluster plan`, `quant_jobs estimate` and
`synthesize`; a quantize job needs a checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from deepseek.config import ModelConfig
from deepseek.config_values import YarnScaling

#: DeepSeek-V3 (671.0 B parameters without the MTP layer); R1, V3-0324 and V3.1 share its shapes.
DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    yarn=YarnScaling(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
    weight_block_size=(128, 128),
)

#: DeepSeek-V3.2 and V3.2-Exp: V3 with an indexer in every layer.
DEEPSEEK_V3_2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
)

#: Kimi-K2-Instruct-0905 (1,026 B parameters): one group of 384 experts, 64 heads, no MTP layer.
#: The first release differs in the context (131,072 tokens, YaRN factor 32); `rms_norm_eps` is
#: from its config.json (K2-Thinking, which is released in INT4, has 1e-5).
KIMI_K2 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k2",
    vocab_size=163840,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    first_k_dense_replace=1,
    max_position_embeddings=262144,
    rms_norm_eps=1e-6,
    rope_theta=50000.0,
    yarn=YarnScaling(
        factor=64.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    num_nextn_predict_layers=0,
    bos_token_id=163584,
    eos_token_id=163585,
)

#: Moonlight-16B-A3B, released in BF16: no query latent, no YaRN, no MTP layer. Its Instruct model
#: ends texts with token 163586.
MOONLIGHT = ModelConfig(
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_shared_experts=2,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.446,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=50000.0,
    yarn=None,
    bos_token_id=163584,
    eos_token_id=163585,
)

MODELS = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3.2": DEEPSEEK_V3_2,
    "kimi-k2": KIMI_K2,
    "moonlight": MOONLIGHT,
}

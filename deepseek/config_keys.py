"""The keys of a config.json that are no field of `ModelConfig`: what each may be.

`deepseek/config.py` reads them. A key that is in neither table is refused by name.
"""

from __future__ import annotations

from typing import Any

#: Keys with exactly these values implemented.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "indexer_rope_interleave": (False,),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    # transformers 4 writes the following into every config.json (`PretrainedConfig`'s own keys).
    # Each could change the forward pass or what is generated from it, so only the value that
    # changes nothing is accepted. Sampling is a matter of the request, never of the checkpoint.
    #
    # Encoders and decoders, and what shares weights with what.
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "decoder_start_token_id": (None,),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    # Other heads, and other ways to run the model.
    "finetuning_task": (None,),
    "prefix": (None,),
    "return_dict_in_generate": (False,),
    "sep_token_id": (None,),
    "task_specific_params": (None,),
    "tf_legacy_loss": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False, None),
    # Generation.
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "diversity_penalty": (0.0,),
    "do_sample": (False,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "length_penalty": (1.0,),
    "max_length": (20,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "output_scores": (False,),
    "remove_invalid_values": (False,),
    "repetition_penalty": (1.0,),
    "suppress_tokens": (None,),
    "temperature": (1.0,),
    "top_k": (50,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
}

#: Keys that no forward pass reads. auto_map names remote code, which is never loaded.
INERT = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "aux_loss_alpha",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "head_dim",
    "id2label",
    "initializer_range",
    "label2id",
    "num_local_experts",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "qk_head_dim",
    "return_dict",
    "seq_aux",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

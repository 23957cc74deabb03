"""config.json is read strictly: what changes the forward pass is implemented or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.release import CONFIGS, R1, V3
from support.synthetic import config_dict
from transformers import DeepseekV3Config, DeepseekV32Config

from deepseek.config import ModelConfig
from deepseek.config_values import YarnScaling
from deepseek.errors import ConfigError
from deepseek.models import DEEPSEEK_V3, DEEPSEEK_V3_2, MODELS

RELEASE = V3
YARN = V3["rope_scaling"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_release_of_the_v3_family_reads_as_the_built_in_deepseek_v3(name: str) -> None:
    assert ModelConfig.from_dict(CONFIGS[name]) == DEEPSEEK_V3


def test_what_transformers_5_saves_reads_the_same(tmp_path: Path) -> None:
    """It moves rope_theta and rope_scaling into rope_parameters and adds inert keys."""
    DeepseekV3Config(**copy.deepcopy(RELEASE)).save_pretrained(tmp_path)  # it edits its arguments
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert ModelConfig.from_directory(tmp_path) == DEEPSEEK_V3


def test_what_transformers_saves_of_its_defaults_reads_back(tmp_path: Path) -> None:
    """Its defaults are V3's shapes, with no YaRN, 4096 positions and BF16 weights."""
    DeepseekV3Config().save_pretrained(tmp_path)
    assert ModelConfig.from_directory(tmp_path) == dataclasses.replace(
        DEEPSEEK_V3, max_position_embeddings=4096, yarn=None, weight_block_size=None
    )


@pytest.mark.parametrize("use_diff", [True, False])
def test_every_key_that_transformers_can_save_is_known(tmp_path: Path, use_diff: bool) -> None:
    """Also those at their defaults, which tools write that save the whole object."""
    config = DeepseekV3Config(**copy.deepcopy(R1), pad_token_id=1)
    config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
    assert ModelConfig.from_directory(tmp_path) == DEEPSEEK_V3


NEUTRAL: list[dict[str, Any]] = [
    {"sliding_window": None, "use_sliding_window": False},
    {"mlp_bias": False, "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}},
    {"unsloth_fixed": True, "unsloth_version": "2025.3.1", "pad_token_id": 2, "torchscript": False},
    {"eos_token_id": [1]},
    {"rope_scaling": YARN | {"rope_type": "yarn", "truncate": True, "attention_factor": None}},
]


@pytest.mark.parametrize("change", NEUTRAL, ids=[str(change)[:40] for change in NEUTRAL])
def test_a_key_that_asks_for_nothing_is_no_error(change: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(RELEASE | change) == DEEPSEEK_V3


def test_null_mtp_layers_are_none() -> None:
    config = ModelConfig.from_dict(RELEASE | {"num_nextn_predict_layers": None})
    assert config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_parameters_alone_give_theta_and_yarn(kind: str) -> None:
    raw = {k: v for k, v in RELEASE.items() if k not in ("rope_scaling", "rope_theta")}
    yarn = {k: v for k, v in YARN.items() if k != "type"}
    raw["rope_parameters"] = {kind: "yarn", "rope_theta": 50000.0, **yarn}
    config = ModelConfig.from_dict(raw)
    assert config.rope_theta == 50000.0
    assert config.yarn == DEEPSEEK_V3.yarn


@pytest.mark.parametrize("value", [None, {}, {"rope_type": "default"}])
def test_no_rope_scaling_is_no_yarn(value: object) -> None:
    assert ModelConfig.from_dict(RELEASE | {"rope_scaling": value}).yarn is None


def test_derived_shapes_are_those_of_the_paper() -> None:
    assert DEEPSEEK_V3.qk_head_dim == 192
    assert DEEPSEEK_V3.latent_dim == 576
    assert DEEPSEEK_V3.num_layers_with_mtp == 62
    assert [DEEPSEEK_V3.is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False] * 2 + [True] * 3


#: DeepSeek-V3.2's config.json, key for key.
RELEASE_V3_2: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
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
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_release_of_v3_2_reads_as_the_built_in_deepseek_v3_2() -> None:
    config = ModelConfig.from_dict(RELEASE_V3_2)
    assert config == DEEPSEEK_V3_2
    assert config.dense_context == 2048
    assert "2048 tokens (index_topk)" in config.context_limit
    assert DEEPSEEK_V3.context_limit == "the model's 163840 positions"


def test_v3_2_as_transformers_5_saves_it_reads_the_same(tmp_path: Path) -> None:
    """It repeats first_k_dense_replace and the kind of attention as lists over the layers."""
    DeepseekV32Config(**copy.deepcopy(RELEASE_V3_2)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_types"] == ["indexed_attention"] * 61
    assert saved["mlp_layer_types"] == ["dense"] * 3 + ["sparse"] * 58
    assert (saved["mlp_bias"], saved["head_dim"]) == (False, 64)
    assert ModelConfig.from_directory(tmp_path) == DEEPSEEK_V3_2
    saved["indexer_rope_interleave"] = False
    assert ModelConfig.from_dict(saved) == DEEPSEEK_V3_2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 61}, "layer_types contradicts the 61 layers"),
        ({"layer_types": ["indexed_attention"] * 60}, "layer_types contradicts the 61 layers"),
        ({"mlp_layer_types": ["sparse"] * 61}, "and first_k_dense_replace 3; remove it"),
        ({"mlp_bias": True}, "mlp_bias = True is not implemented; only False"),
        ({"indexer_rope_interleave": True}, "indexer_rope_interleave = True is not implemented"),
        ({"index_topk": 0}, "index_topk = 0 must be a positive int"),
        ({"index_head_dim": 32}, "index_head_dim 32 is less than qk_rope_head_dim 64"),
        ({"index_topk": None}, "key 'index_topk' is missing"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "is not what model_type 'deepseek_v32' has"),
        ({"model_type": "deepseek_v3"}, "architectures = "),
        ({"num_hidden_layers": "61", "layer_types": ["indexed_attention"]}, "num_hidden_layers ="),
    ],
)
def test_other_values_of_v3_2s_keys_are_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(RELEASE_V3_2 | change)
    assert message in str(caught.value)


INDEXER = {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}


def test_members_of_the_family_are_read_from_their_own_keys() -> None:
    assert ModelConfig.from_dict(RELEASE | INDEXER) == MODELS["deepseek-v3.2"]
    assert MODELS["deepseek-v3.2"].dense_context == 2048
    without_latent = ModelConfig.from_dict(RELEASE | {"q_lora_rank": None})
    assert without_latent.q_lora_rank is None
    assert without_latent.dense_context == 163840


def published(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / "published_configs" / f"{name}.json"
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return raw


def test_the_published_config_of_kimi_k2_is_read_as_the_built_in_model() -> None:
    """The first release: the built-in 0905 has twice its context."""
    context = {
        "max_position_embeddings": 262144,
        "rope_scaling": published("kimi-k2-instruct")["rope_scaling"] | {"factor": 64.0},
    }
    assert ModelConfig.from_dict(published("kimi-k2-instruct") | context) == MODELS["kimi-k2"]
    assert ModelConfig.from_dict(published("kimi-k2-instruct")).dense_context == 131072


def test_the_published_config_of_moonlight_is_read_as_the_built_in_model() -> None:
    raw = published("moonlight-16b-a3b-instruct")
    assert ModelConfig.from_dict(raw | {"eos_token_id": 163585}) == MODELS["moonlight"]
    assert ModelConfig.from_dict(raw).eos_token_ids == (163586,)


def test_keys_that_transformers_4_writes_into_every_config_are_read_at_neutral_values() -> None:
    """A config.json of Kimi-K2 with them, as its draft models are published with."""
    raw = published("kimi-k2-all-keys")
    assert {"num_return_sequences", "output_scores", "prefix"} < raw.keys()
    config = ModelConfig.from_dict(raw)
    assert (config.rms_norm_eps, config.eos_token_ids) == (1e-5, (163586,))


def test_a_list_of_end_tokens_is_read_and_the_first_separates_documents() -> None:
    config = ModelConfig.from_dict(RELEASE | {"eos_token_id": [7, 1, 9]})
    assert (config.eos_token_id, config.eos_token_ids) == (7, (7, 1, 9))
    assert ModelConfig.from_dict(RELEASE | {"eos_token_id": [1]}) == DEEPSEEK_V3
    assert ModelConfig.from_dict(RELEASE | {"eos_token_id": None}).eos_token_ids == ()


def test_an_indexer_needs_the_query_latent() -> None:
    with pytest.raises(ConfigError, match="q_lora_rank must be a positive int for 'deepseek_v32'"):
        ModelConfig.from_dict(RELEASE | INDEXER | {"q_lora_rank": None})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v2"}, "model_type 'deepseek_v2' is another architecture"),
    ({"model_type": "glm_moe_dsa"}, "quantizes DeepSeek-V3, R1, V3.1, V3.2, Kimi-K2 and Moonlight"),
    ({"model_type": "kimi_k25"}, "model_type 'kimi_k25' is another architecture"),
    ({"model_type": None}, "key 'model_type' is missing"),
    ({"model_type": ["deepseek_v3"]}, "model_type ['deepseek_v3'] is another architecture"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not implemented; only None is"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures = "),
    ({"architectures": ["DeepseekV32ForCausalLM"]}, "is not what model_type 'deepseek_v3' has"),
    ({"index_topk": 2048}, "index_topk belongs to model_type 'deepseek_v32'"),
    (
        {"model_type": "deepseek_v32", "architectures": None},
        "key 'index_n_heads' is missing",
    ),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; only 'silu' is"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ({"rope_interleave": False}, "rope_interleave = False"),
    ({"num_key_value_heads": 1}, "num_key_value_heads 1 differs"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling type 'linear'"),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be a JSON object"),
    ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling has the unknown key 'truncate'"),
    ({"rope_scaling": YARN | {"rope_type": "linear"}}, "given as 'yarn' and as 'linear'"),
    ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling.factor = '40'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is incomplete"),
    ({"quantization_config": "fp8"}, "quantization_config = 'fp8' must be a JSON object"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method = 'awq'"),
    ({"quantization_config": {"quant_method": "fp8", "bits": 8}}, "unknown key 'bits'"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "weight_block_size = [64, 64]",
    ),
    ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size = None"),
    (
        {"quantization_config": RELEASE["quantization_config"] | {"fmt": "e5m2"}},
        "quantization_config.fmt = 'e5m2'",
    ),
    (
        {"quantization_config": RELEASE["quantization_config"] | {"activation_scheme": "static"}},
        "activation_scheme = 'static'",
    ),
    ({"n_group": 7}, "n_routed_experts 256 is not a multiple of n_group 7"),
    ({"topk_group": 9}, "topk_group 9 is more than n_group 8"),
    ({"num_experts_per_tok": 200}, "num_experts_per_tok 200 is more than the 128 experts"),
    ({"first_k_dense_replace": 62}, "first_k_dense_replace 62 lies outside"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd"),
    ({"hidden_size": "7168"}, "hidden_size = '7168' must be a positive int"),
    ({"hidden_size": 7168.0}, "hidden_size = 7168.0 must be a positive int"),
    ({"hidden_size": True}, "hidden_size = True must be a positive int"),
    ({"n_group": 0}, "n_group = 0 must be a positive int"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06 must be a positive float"),
    ({"rope_theta": float("inf")}, "rope_theta = inf must be a positive float"),
    ({"rope_parameters": {"rope_theta": 9}}, "rope_theta is given as 10000 and as 9"),
    ({"norm_topk_prob": 1}, "norm_topk_prob = 1 must be true or false"),
    ({"yarn": YARN}, "unknown key 'yarn'"),
    ({"weight_block_size": [128, 128]}, "unknown key 'weight_block_size'"),
    ({"eos_token_id": []}, "eos_token_id = [] must be a token id or a list of token ids"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id = [1, '2'] must be a token id or a list"),
    ({"eos_token_id": [1, 1]}, "eos_token_id = [1, 1] gives a token id twice"),
    ({"eos_token_id": [1, 129280]}, "eos_token_id 129280 is no token of vocab_size 129280"),
    ({"bos_token_id": 129280}, "bos_token_id 129280 is no token of vocab_size 129280"),
    ({"more_eos_token_ids": [2]}, "unknown key 'more_eos_token_ids'"),
    ({"yarn": None}, "unknown key 'yarn'"),
    ({"num_return_sequences": 2}, "num_return_sequences = 2 is not implemented; only 1 is"),
    ({"output_scores": True}, "output_scores = True is not implemented; only False is"),
    ({"prefix": "Hello"}, "prefix = 'Hello' is not implemented; only None is"),
    ({"temperature": 0.6}, "temperature = 0.6 is not implemented; only 1.0 is"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not implemented"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not implemented"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(c)[:40] for c, _ in REFUSED])
def test_a_value_that_is_not_implemented_is_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(RELEASE | change)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    sorted(
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.default is dataclasses.MISSING and field.name not in ("rope_theta", "yarn")
    ),
)
def test_a_missing_key_is_named(key: str) -> None:
    raw = {k: v for k, v in RELEASE.items() if k != key}
    if key == "num_attention_heads":
        raw.pop("num_key_value_heads")
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, not a list")],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_directory(tmp_path)


def test_a_missing_file_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model must name a directory"):
        ModelConfig.from_directory(tmp_path)


def test_reading_leaves_the_given_dictionary_alone() -> None:
    raw = json.loads(json.dumps(RELEASE))
    ModelConfig.from_dict(raw)
    assert raw == RELEASE


def test_invariants_hold_for_configs_made_in_code_too() -> None:
    with pytest.raises(ConfigError, match="n_group"):
        dataclasses.replace(DEEPSEEK_V3, n_group=7)
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor"):
        YarnScaling(factor=0, original_max_position_embeddings=4096)


def test_the_synthetic_models_of_the_tests_are_the_same_architecture() -> None:
    config = ModelConfig.from_dict(config_dict(layers=3, experts=8))
    assert config.num_layers_with_mtp == 4
    assert config.weight_block_size == (128, 128)
    assert ModelConfig.from_dict(config_dict(fp8=False)).weight_block_size is None

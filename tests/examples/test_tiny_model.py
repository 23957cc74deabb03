"""The example model is a trained model in DeepSeek-V3's released layout.

The files are read without code of the project or of the script that made them: the FP8 tiles are
dequantized here, by their definition, and the model is transformers' own.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

BLOCK = 128
WINDOW = 512

FP8_LINEAR = re.compile(
    r"(self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight$"
)


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> dict[str, Tensor]:
    index = json.loads((tiny_model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    loaded: dict[str, Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        with safe_open(tiny_model / file_name, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is not a dict
                assert index["weight_map"][name] == file_name
                loaded[name] = shard.get_tensor(name)
    assert loaded.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in loaded.values()) == index["metadata"]["total_size"]
    return loaded


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV3Config:
    return AutoConfig.from_pretrained(tiny_model)


def dequantized(tensors: dict[str, Tensor], name: str) -> Tensor:
    weight = tensors[name].float()
    scale = tensors.get(f"{name}_scale_inv")
    if scale is None:
        return weight
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            weight[block] *= scale[i, j]
    return weight


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor], config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    plain = DeepseekV3Config(
        **{k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "dtype")}
    )
    model = DeepseekV3ForCausalLM(plain)
    experts = range(config.n_routed_experts)
    state = {}
    for name in model.state_dict():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            halves = [
                [dequantized(tensors, f"{stem}.{e}.{half}_proj.weight") for half in ("gate", "up")]
                for e in experts
            ]
            state[name] = torch.stack([torch.cat(pair) for pair in halves])
        elif last == "down_proj":
            state[name] = torch.stack(
                [dequantized(tensors, f"{stem}.{e}.down_proj.weight") for e in experts]
            )
        else:
            state[name] = dequantized(tensors, name)
    model.load_state_dict(state)
    return model.eval()


def expected_names(config: DeepseekV3Config) -> set[str]:
    """Every tensor that a released checkpoint of this config holds, scales left out."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    last = config.num_hidden_layers
    for layer in range(last + 1):
        stem = f"model.layers.{layer}"
        names |= {f"{stem}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
        attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj"
        names |= {f"{stem}.self_attn.{n}.weight" for n in f"{attention} o_proj".split()}
        mlps = [f"{stem}.mlp"]
        if layer >= config.first_k_dense_replace:
            mlps = [f"{stem}.mlp.experts.{e}" for e in range(config.n_routed_experts)]
            mlps.append(f"{stem}.mlp.shared_experts")
            names |= {f"{stem}.mlp.gate.weight", f"{stem}.mlp.gate.e_score_correction_bias"}
        names |= {f"{mlp}.{n}_proj.weight" for mlp in mlps for n in ("gate", "up", "down")}
    extra = "embed_tokens enorm hnorm eh_proj shared_head.norm shared_head.head"
    return names | {f"model.layers.{last}.{n}.weight" for n in extra.split()}


def test_tensors_have_the_released_names_and_types(
    tensors: dict[str, Tensor], config: DeepseekV3Config
) -> None:
    assert {n for n in tensors if not n.endswith("_scale_inv")} == expected_names(config)
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            rows, columns = tensors[name.removesuffix("_scale_inv")].shape
            assert tensor.shape == (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)), name
            assert tensor.dtype == torch.float32, name
        elif FP8_LINEAR.search(name):
            assert tensor.dtype == torch.float8_e4m3fn, name
            assert f"{name}_scale_inv" in tensors, name
        else:
            is_bias = name.endswith("e_score_correction_bias")
            assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name
            assert f"{name}_scale_inv" not in tensors, name


def test_linear_inputs_are_whole_blocks_and_one_output_is_not(tensors: dict[str, Tensor]) -> None:
    linears = {n: t for n, t in tensors.items() if FP8_LINEAR.search(n)}
    assert all(tensor.shape[1] % BLOCK == 0 for tensor in linears.values())
    ragged = {n.rsplit(".", 2)[1] for n, t in linears.items() if t.shape[0] % BLOCK}
    assert ragged == {"kv_a_proj_with_mqa"}


def test_every_fp8_block_uses_its_whole_range(tensors: dict[str, Tensor]) -> None:
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")].float()
            for rows, of_row in zip(torch.split(weight, BLOCK), scale, strict=True):
                for block, s in zip(torch.split(rows, BLOCK, dim=1), of_row, strict=True):
                    assert block.abs().max() == 448.0, name
                    assert s > 0, name


def test_there_are_ten_million_parameters(tensors: dict[str, Tensor]) -> None:
    total = sum(t.numel() for n, t in tensors.items() if not n.endswith("_scale_inv"))
    assert 5e6 < total < 12e6


def test_shards_are_small_and_the_mtp_shares_embedding_and_head(
    tiny_model: Path, tensors: dict[str, Tensor], config: DeepseekV3Config
) -> None:
    for shard in tiny_model.glob("*.safetensors"):
        assert shard.stat().st_size < 4_000_000, shard.name
    mtp = f"model.layers.{config.num_hidden_layers}"
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert torch.equal(tensors[f"{mtp}.embed_tokens.weight"], embedding)
    assert torch.equal(tensors[f"{mtp}.shared_head.head.weight"], head)


def test_the_balancing_bias_was_trained(tensors: dict[str, Tensor]) -> None:
    biases = [t for n, t in tensors.items() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 4
    assert all(bias.abs().min() > 0 and bias.std() > 0 for bias in biases)


def test_yarn_reaches_the_attention_scale(
    tiny_model: Path, model: DeepseekV3ForCausalLM, config: DeepseekV3Config
) -> None:
    """The file keeps the released spelling, which transformers 5 translates; mscale is squared
    into the softmax scale, and the rotary tables themselves stay unscaled."""
    written = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    assert written["rope_scaling"]["type"] == "yarn"
    assert "rope_parameters" not in written
    assert "auto_map" not in written
    mscale = 0.1 * written["rope_scaling"]["mscale_all_dim"] * math.log(4) + 1.0
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    for layer in model.model.layers:
        assert layer.self_attn.scaling == pytest.approx(width**-0.5 * mscale**2)
    rotary = model.model.rotary_emb
    assert (rotary.rope_type, rotary.attention_scaling) == ("yarn", 1.0)
    assert rotary.inv_freq[0] == 1.0  # fast: untouched
    slowest = config.rope_parameters["rope_theta"] ** -(30 / 32)
    assert rotary.inv_freq[-1].item() == pytest.approx(slowest / 4)  # slow: stretched fourfold


@pytest.mark.heavy
def test_held_out_text_is_five_times_less_surprising_than_to_a_unigram(
    tiny_model: Path, model: DeepseekV3ForCausalLM
) -> None:
    """Against the held-out text's own token frequencies, which no unigram model can beat."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    frequency = torch.bincount(ids, minlength=len(tokenizer)).double() / len(ids)
    unigram = math.exp(-frequency[ids].log().mean().item())

    whole = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    some = whole[:: len(whole) // 8][:8]
    rows = torch.cat([torch.full((len(some), 1), tokenizer.bos_token_id), some], dim=1)
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert 5 * math.exp(loss.item()) < unigram


def test_every_expert_is_used(model: DeepseekV3ForCausalLM, tiny_model: Path) -> None:
    report = json.loads((tiny_model / "training.json").read_text(encoding="utf-8"))
    assert [layer["layer"] for layer in report["expert_load"]] == [1, 2, 3, 4]
    assert all(layer["min"] > 0.05 for layer in report["expert_load"]), report["expert_load"]


def test_the_tokenizer_loads_without_remote_code_and_keeps_the_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "def f(x):\n    return x  # 12345 ünï\n\n\nclass A:\n\tpass\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 1
    assert len(tokenizer) == 2048


def test_the_chat_template_writes_deepseeks_turns(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is json?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>What is json?<｜Assistant｜>"
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [ids.count(special) for special in range(5)] == [1, 1, 0, 2, 2]

"""The forward pass with PyTorch's kernels, which hold unquantized weights in FP32, against
transformers' DeepseekV3ForCausalLM, whose weights are the same. test_native.py holds the native
kernels against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engine_reference import reference_greedy, reference_logits, reference_model
from support.synthetic import V3_2, write_checkpoint
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek.config import ModelConfig
from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.linear import Kernels, RowRule
from deepseek.engine.moe import Router
from deepseek.engine.request import Request, SamplingParams
from deepseek.engine.rope import Rope, rotate
from deepseek.source.checkpoint import CheckpointReader

#: Relative error of all logits (Frobenius), then median and mean KL in nats per token, of each KV
#: format against transformers in FP32. The mean is made by the few tokens whose experts change.
#: Measured: fp32 2e-7, 3e-13, 4e-13; bf16 3e-3, 3e-6, 1e-4; int8 9e-3, 9e-6, 8e-4.
MAX_LOGIT_ERROR = {"fp32": 1e-5, "bf16": 0.012, "int8": 0.03}
MAX_MEDIAN_KL = {"fp32": 1e-10, "bf16": 1e-5, "int8": 4e-5}
MAX_MEAN_KL = {"fp32": 1e-9, "bf16": 1e-3, "int8": 4e-3}


@pytest.fixture(scope="module")
def text_ids(tiny_model: Path) -> torch.Tensor:
    """1300 tokens of held-out text: 276 of them beyond the original context of 1024."""
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")[:20000]
    ids = load_tokenizer(tiny_model).encode(text).ids
    return torch.tensor(ids[:1300])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def token_kl(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.heavy
@pytest.mark.parametrize("kv_cache", MAX_LOGIT_ERROR)
def test_logits_match_transformers_also_beyond_the_original_context(
    kv_cache: str, tiny_model: Path, text_ids: torch.Tensor
) -> None:
    engine = LLMEngine.from_checkpoint(
        tiny_model, EngineOptions(kv_cache=kv_cache, kernels="torch")
    )
    got, want = engine.score(text_ids), reference_logits(tiny_model, text_ids)
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    for part in (slice(0, 1024), slice(1024, None)):
        error, kl = relative_error(got[part], want[part]), token_kl(got[part], want[part])
        figures = f"{kv_cache=} {part=} {error=:.2e} {kl.median()=:.2e} {kl.mean()=:.2e}"
        assert error < MAX_LOGIT_ERROR[kv_cache], figures
        assert kl.median() < MAX_MEDIAN_KL[kv_cache], figures
        assert kl.mean() < MAX_MEAN_KL[kv_cache], figures


@pytest.mark.heavy
def test_greedy_tokens_are_those_of_transformers_generate(
    tiny_model: Path, text_ids: torch.Tensor
) -> None:
    ids = text_ids.tolist()
    prompts = [ids[:1], ids[5:17], ids[100:163], ids[200:500], ids[:1015]]  # the last crosses 1024
    engine = LLMEngine.from_checkpoint(tiny_model, EngineOptions(kv_cache="fp32", kernels="torch"))
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    got: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        engine.add_request(
            Request(request_id=str(number), prompt_ids=tuple(prompt), sampling=sampling)
        )
    while engine.has_work:
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    for number, prompt in enumerate(prompts):
        assert got[str(number)] == reference_greedy(tiny_model, prompt, 20), f"prompt {number}"


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 32},
        {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "kv_lora_rank": 64},
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 8,
                "original_max_position_embeddings": 32,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
                "beta_fast": 16,
                "beta_slow": 2,
            }
        },
    ],
    ids=["three-heads", "two-shared-unnormalized", "four-groups-no-dense", "yarn-with-two-mscales"],
)
def test_other_shapes_and_constants_match_transformers(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    experts = 8 if overrides.get("n_group") == 4 else 4
    write_checkpoint(tmp_path, fp8=False, experts=experts, **overrides)
    (tmp_path / "tokenizer.json").unlink()
    ids = torch.randint(0, 96, (120,), generator=torch.Generator().manual_seed(1))
    engine = LLMEngine.from_checkpoint(
        tmp_path,
        EngineOptions(kv_cache="fp32", kernels="torch", max_batched_tokens=50, page_tokens=8),
    )
    got, want = engine.score(ids), reference_logits(tmp_path, ids)
    assert relative_error(got, want) < 1e-5, f"{overrides}"


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_within_index_topk_the_engine_is_transformers_deepseek_v3_2(
    yarn: bool, tmp_path: Path
) -> None:
    """Its indexer chooses every token there, so an engine without one computes the same."""
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
    changes = V3_2 | (
        {"rope_scaling": scaling | {"mscale": 0.7, "mscale_all_dim": 1.0}} if yarn else {}
    )
    write_checkpoint(tmp_path, fp8=False, **changes)
    (tmp_path / "tokenizer.json").unlink()
    ids = torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(1))
    engine = LLMEngine.from_checkpoint(
        tmp_path,
        EngineOptions(kv_cache="fp32", kernels="torch", max_batched_tokens=50, page_tokens=8),
    )
    assert engine.max_model_len == 64
    assert relative_error(engine.score(ids), reference_logits(tmp_path, ids)) < 1e-5
    assert any("indexer" in name for name, _ in reference_model(tmp_path).named_parameters())


def test_beyond_index_topk_deepseek_v3_2_is_another_function(tmp_path: Path) -> None:
    """So the limit of the context is no formality: with a larger index_topk, transformers' own
    answers change from the first token on whose context exceeds it."""
    ids = torch.randint(0, 96, (96,), generator=torch.Generator().manual_seed(1))
    logits = []
    for index_topk in (64, 96):
        directory = tmp_path / str(index_topk)
        write_checkpoint(directory, fp8=False, **V3_2 | {"index_topk": index_topk})
        logits.append(reference_logits(directory, ids))
    sparse, dense = logits
    assert relative_error(sparse[:64], dense[:64]) < 1e-5
    assert relative_error(sparse[64:], dense[64:]) > 0.01


def test_rotary_angles_match_transformers_at_every_position(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    theirs = reference_model(tiny_model).model.rotary_emb
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    ours = Rope(config).angles(positions)
    half = config.qk_rope_head_dim // 2
    torch.testing.assert_close(ours[0], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], sin[0, :, :half], rtol=0, atol=1e-6)


def test_the_softmax_scale_carries_mscale_squared(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    theirs = reference_model(tiny_model).model.layers[0].self_attn.scaling
    assert Rope(config).softmax_scale == pytest.approx(theirs, rel=1e-12)
    assert theirs != pytest.approx(config.qk_head_dim**-0.5, rel=1e-3)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, (position * frequencies).cos(), (position * frequencies).sin())

    assert at(query, 7).norm().item() == pytest.approx(query.norm().item(), rel=1e-6)
    near, far = at(query, 9) @ at(key, 4), at(query, 105) @ at(key, 100)
    assert near.item() == pytest.approx(far.item(), rel=1e-4)


def test_the_bias_picks_experts_and_does_not_weigh_them(tiny_model: Path) -> None:
    config = CheckpointReader(tiny_model).config
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(config.n_routed_experts, config.hidden_size, generator=generator) * 0.1
    bias = torch.randn(config.n_routed_experts, generator=generator)  # strong enough to reroute
    x = torch.randn(200, config.hidden_size, generator=generator)
    theirs = DeepseekV3TopkRouter(reference_model(tiny_model).config)
    theirs.load_state_dict({"weight": weight, "e_score_correction_bias": bias})
    with torch.no_grad():
        _, want_weights, want_experts = theirs(x)
    kernels = Kernels(RowRule(4), has_vnni=False, is_batch_invariant=True)
    experts, weights = Router(config, weight, bias, kernels).forward(x)
    unbiased, _ = Router(config, weight, torch.zeros_like(bias), kernels).forward(x)

    def by_expert(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), config.n_routed_experts).scatter(1, experts, weights)

    torch.testing.assert_close(by_expert(experts, weights), by_expert(want_experts, want_weights))
    assert (experts.sort().values != unbiased.sort().values).any(dim=1).float().mean() > 0.5

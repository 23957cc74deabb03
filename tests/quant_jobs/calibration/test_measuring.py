"""Input statistics of a layer's linears, measured without quantizing, equal brute force."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.synthetic import config_dict, random_tensors
from torch import Tensor
from torch.nn import functional as F

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError
from deepseek.inventory import layer_tensors, linears
from deepseek.recipe import ExpertCoverage
from quant_jobs.calibration.forward import Rotary, Routed, Trunk, tokens_of
from quant_jobs.calibration.measuring import LayerInputs, observe_attention
from quant_jobs.calibration.statistics import InputStatistics

MOE, NUM_BLOCKS, BLOCK_TOKENS = 1, 3, 40
PREFIX = f"model.layers.{MOE}"
INPUTS = [f"{PREFIX}.self_attn.{role}" for role in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")]


class Search:
    """A caller that only measures: a layer's weights and calibration blocks, and no quantizer."""

    def __init__(self, **coverage: object) -> None:
        self.config = ModelConfig.from_dict(config_dict(experts=8, fp8=False))
        stored = random_tensors(self.config)
        self.weights = {
            spec.name: stored[spec.name].float() for spec in layer_tensors(self.config, MOE)
        }
        modules = {spec.module for spec in linears(self.config, MOE)}
        high = {n: t for n, t in self.weights.items() if n.removesuffix(".weight") not in modules}
        self.trunk = Trunk(self.config, MOE, high, self.weight)
        generator = torch.Generator().manual_seed(5)
        width = self.config.hidden_size
        self.x = [torch.randn(BLOCK_TOKENS, width, generator=generator) for _ in range(NUM_BLOCKS)]
        self.inputs = LayerInputs(
            MOE,
            ExpertCoverage.model_validate(coverage),
            NUM_BLOCKS,
            weight=self.weight,
            wants_gram=lambda module: True,
        )
        self.blocks: list[tuple[int, Routed]] = []
        for block, x_TD in enumerate(self.x):
            routed, shares = observe_attention(
                self.trunk,
                Rotary(self.config),
                x_TD,
                block=block,
                num_blocks=NUM_BLOCKS,
                inputs=INPUTS,
                wants_rows=lambda name: True,
            )
            self.blocks.append((block, routed))
            for name, share in shares.items():
                self.inputs.add_attention(name, block, share)
        self.inputs.set_mlp_blocks(self.blocks)

    def weight(self, module: str) -> Tensor:
        return self.weights[f"{module}.weight"]


def assert_statistics(statistics: InputStatistics | None, x_TK: Tensor) -> None:
    """Compare with the plain formulas over all rows at once."""
    assert statistics is not None
    assert statistics.tokens == len(x_TK)
    assert torch.equal(statistics.amax, x_TK.abs().amax(dim=0))
    torch.testing.assert_close(statistics.mean_abs, x_TK.abs().mean(dim=0), rtol=1e-5, atol=0)
    assert statistics.gram is not None
    gram = (x_TK.double().T @ x_TK.double()).float()
    torch.testing.assert_close(statistics.gram, gram, rtol=1e-4, atol=1e-3)
    rows = {tuple(row.tolist()) for row in x_TK}
    assert all(tuple(row.tolist()) in rows for row in statistics.sample)


def test_the_inputs_of_the_attention_are_measured_on_every_token() -> None:
    search = Search()
    norm = search.weights[f"{PREFIX}.input_layernorm.weight"]
    x = torch.cat(search.x)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + search.config.rms_norm_eps) * norm
    statistics = search.inputs.take_attention(INPUTS[0])
    torch.testing.assert_close(statistics.amax, normed.abs().amax(dim=0), rtol=1e-5, atol=1e-6)
    assert statistics.tokens == NUM_BLOCKS * BLOCK_TOKENS
    for name in INPUTS[1:]:
        assert search.inputs.take_attention(name).tokens == NUM_BLOCKS * BLOCK_TOKENS
    with pytest.raises(KeyError):
        search.inputs.take_attention(INPUTS[0])


@pytest.mark.parametrize("policy", ["topk", "all", "shrink"])
@pytest.mark.parametrize("expert", [0, 6, None])
def test_an_mlp_is_measured_on_the_tokens_of_the_policy(policy: str, expert: int | None) -> None:
    shrink_tokens = 2 * NUM_BLOCKS
    search = Search(policy=policy, floor_tokens=1, shrink_tokens=shrink_tokens)
    name = f"{PREFIX}.mlp." + ("shared_experts" if expert is None else f"experts.{expert}")
    rows, sent = [], 0
    for _, routed in search.blocks:
        own = routed.z if expert is None else routed.z[tokens_of(routed, expert)[0]]
        sent += len(own)
        rows.append(routed.z if policy == "all" else own)
        if policy == "shrink" and expert is not None:
            rows.append(routed.z[torch.arange(2) * BLOCK_TOKENS // 2])
    x = torch.cat(rows)
    mlp = search.inputs.mlp(name, expert)
    assert mlp.routed_tokens == sent
    assert not mlp.is_starved
    assert_statistics(mlp.statistics, x)
    gate, up = (search.weight(f"{name}.{role}") for role in ("gate_proj", "up_proj"))
    # Block by block, as in the code: a product of other rows rounds the last bit differently.
    counts = iter([len(piece) for piece in rows])
    pieces = x.split(list(counts))
    if policy == "shrink" and expert is not None:
        pieces = tuple(torch.cat(pair) for pair in zip(pieces[::2], pieces[1::2], strict=True))
    hidden = torch.cat([F.silu(piece @ gate.T) * (piece @ up.T) for piece in pieces if len(piece)])
    assert_statistics(search.inputs.down(mlp), hidden)
    sample = search.inputs.sample(expert)
    assert sample is not None
    assert mlp.statistics is not None
    assert torch.equal(sample, mlp.statistics.sample)


def test_an_expert_below_the_floor_is_starved_and_one_without_tokens_has_no_statistics() -> None:
    search = Search(policy="topk", floor_tokens=10**6)
    assert search.inputs.mlp(f"{PREFIX}.mlp.experts.0", 0).is_starved
    assert not search.inputs.mlp(f"{PREFIX}.mlp.shared_experts", None).is_starved
    unrouted = [
        (block, Routed(routed.z, torch.ones_like(routed.experts), routed.weights))  # type: ignore[arg-type]
        for block, routed in search.blocks
    ]
    search.inputs.set_mlp_blocks(unrouted)
    mlp = search.inputs.mlp(f"{PREFIX}.mlp.experts.0", 0)
    assert (mlp.routed_tokens, mlp.statistics, mlp.is_starved) == (0, None, True)
    assert search.inputs.down(mlp) is None
    assert search.inputs.sample(0) is None


def test_released_inputs_hold_nothing() -> None:
    search = Search()
    gram = weakref.ref(search.inputs.all_tokens(gram=True).gram)
    assert gram() is not None
    search.inputs.release()
    assert gram() is None
    assert search.inputs.mlp(f"{PREFIX}.mlp.experts.0", 0).statistics is None
    with pytest.raises(KeyError):
        search.inputs.take_attention(INPUTS[0])


def test_an_input_that_is_not_finite_is_named_with_its_block() -> None:
    search = Search()
    z = search.blocks[2][1].z.clone()
    z[3, 3] = float("nan")
    damaged = Routed(z, search.blocks[2][1].experts, search.blocks[2][1].weights)
    search.inputs.set_mlp_blocks([*search.blocks[:2], (2, damaged)])
    with pytest.raises(CheckpointError, match="not finite on calibration block 2"):
        search.inputs.all_tokens(gram=False)

"""The unit solver: tokens by the recipe's policy, folding, packing, and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from support.allocations import peak_bytes
from support.synthetic import config_dict, random_tensors
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError
from deepseek.formats import compress, decompress
from deepseek.inventory import MLP_ROLES, input_key, layer_tensors, linears
from deepseek.recipe import Recipe, Scheme, load_recipe
from deepseek.source.checkpoint import SourceTensor, scale_name
from quant_jobs.algorithms.awq import scale_losses
from quant_jobs.algorithms.folding import (
    FoldingGroup,
    ScaleMethod,
    Smoothing,
    foldable,
    scaled_groups,
)
from quant_jobs.algorithms.gptq import Factor, gptq, inverse_factor
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.smoothquant import smoothing_scale
from quant_jobs.calibration.forward import (
    ExpertOutputs,
    Rotary,
    Routed,
    Trunk,
    hidden,
    run_expert,
    tokens_of,
)
from quant_jobs.calibration.statistics import (
    Accumulator,
    InputStatistics,
    observe,
    rows_per_block,
)
from quant_jobs.calibration.units import Unit, share_out, units
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.messages import AttentionShare, SolveSummary, Tensors
from quant_jobs.workers.original import OriginalLayer
from quant_jobs.workers.unit_solver import UnitSolver

pytestmark = pytest.mark.heavy

NUM_BLOCKS, BLOCK_TOKENS = 4, 48
DENSE, MOE = 0, 1
#: Its correction bias is -9: no token goes there.
UNSEEN = 5

GPTQ: dict[str, Any] = {"weights": "int4", "group_size": 32, "algorithm": "gptq"}
AWQ: dict[str, Any] = {"weights": "int4", "group_size": 32, "algorithm": "awq"}
PLAIN: dict[str, Any] = {"weights": "int4", "group_size": 32}
TILES: dict[str, Any] = {"weights": "int8-block", "activations": "int8"}
SMOOTH: dict[str, Any] = {"weights": "int8", "activations": "int8", "algorithm": "smoothquant"}


@dataclass(frozen=True)
class Layer:
    """A random layer with its calibration blocks: `inputs` of the layer f32 [T, D], `blocks` the
    MLP inputs, `attention` and `shares` the statistics of the attention's inputs."""

    config: ModelConfig
    layer: int
    source: dict[str, SourceTensor]
    inputs: list[Tensor]
    attention: dict[str, InputStatistics | None]
    shares: AttentionShare
    blocks: list[tuple[int, Routed]]

    def weight(self, module: str) -> Tensor:
        return self.source[f"{module}.weight"].dequantize()

    def expert(self, expert: int) -> dict[str, Tensor]:
        return {role: self.weight(f"{self.mlp(expert)}.{role}") for role in MLP_ROLES}

    def mlp(self, expert: int) -> str:
        return f"model.layers.{self.layer}.mlp.experts.{expert}"

    def routed_tokens(self, expert: int) -> int:
        return sum(len(tokens_of(routed, expert)[0]) for _, routed in self.blocks)


@lru_cache(maxsize=2)
def a_layer(layer: int) -> Layer:
    """8 experts, K = 256, blocks with outlier channels; statistics as a worker measures them."""
    config = ModelConfig.from_dict(config_dict(experts=8, fp8=False))
    stored = random_tensors(config)
    if layer == MOE:
        stored[f"model.layers.{MOE}.mlp.gate.e_score_correction_bias"][UNSEEN] = -9.0
    source = {
        spec.name: SourceTensor(spec, stored[spec.name], stored.get(scale_name(spec.name)))
        for spec in layer_tensors(config, layer)
    }
    generator = torch.Generator().manual_seed(11)
    inputs = [torch.randn(BLOCK_TOKENS, 256, generator=generator) for _ in range(NUM_BLOCKS)]
    for x in inputs:
        x[:, ::43] *= 12
    trunk = trunk_of(config, layer, {n: t.dequantize() for n, t in source.items()}, source)
    names = [f"model.layers.{layer}.self_attn.{r}_proj" for r in ("q_a", "q_b", "kv_b", "o")]
    accumulators = {name: Accumulator(name, gram=True) for name in names}
    shares: AttentionShare = {name: {} for name in names}
    rows, blocks = rows_per_block(256, NUM_BLOCKS), []
    for index, x in enumerate(inputs):
        for name in names:

            def add_share(x: Tensor, name: str = name, index: int = index) -> None:
                shares[name][index] = observe(x.flatten(0, -2), rows, keep_rows=True)
                accumulators[name].add(index, shares[name][index])

            trunk.watch(name, add_share)
        blocks.append((index, trunk.attend(Rotary(config), x)[1]))
    attention = {name: accumulator.finish() for name, accumulator in accumulators.items()}
    return Layer(config, layer, source, inputs, attention, shares, blocks)


def trunk_of(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], high: dict[str, Any]
) -> Trunk:
    """`weights` by full name; the keys of `high` include all tensors that are not linears."""
    linear = {spec.name for spec in linears(config, layer)}
    trunk = {name: weights[name] for name in high if name not in linear}
    return Trunk(config, layer, trunk, lambda module: weights[f"{module}.weight"])


def a_recipe(*rules: dict[str, Any], **coverage: Any) -> Recipe:
    content = load_recipe("int8").model_dump(mode="json")
    content["rules"] = [{"match": "*", **rules[0]}, *rules[1:]]
    content["expert_coverage"] = coverage
    content["calibration"] = {"num_blocks": NUM_BLOCKS, "block_tokens": BLOCK_TOKENS}
    return Recipe.model_validate(content)


def a_solver(toy_layer: Layer, recipe: Recipe) -> UnitSolver:
    """The solver of a worker that owns all units, with statistics passed as the driver does."""
    config, cpu = toy_layer.config, torch.device("cpu")
    schemes = recipe.resolve(config)
    context = LayerContext(config, recipe, schemes, NUM_BLOCKS, cpu, Rotary(config))
    original = OriginalLayer(
        context, toy_layer.layer, units(config, toy_layer.layer), toy_layer.source, {}
    )
    original.observe([toy_layer.shares])
    original.receive([dict(toy_layer.blocks)])
    return original.solver()


def shared_scale(toy_layer: Layer, recipe: Recipe) -> Smoothing:
    """The scale that all workers share: the formula's for SmoothQuant, an arbitrary one for AWQ."""
    shared = Smoothing()
    for group, method in scaled_groups(
        toy_layer.config, recipe.resolve(toy_layer.config), toy_layer.layer
    ):
        if group.router is not None:
            shared.add(group, _vector(toy_layer, group, method))
    return shared


def _vector(toy_layer: Layer, group: FoldingGroup, method: ScaleMethod) -> Tensor:
    z = torch.cat([routed.z for _, routed in toy_layer.blocks])
    amax_w = torch.stack([toy_layer.weight(name).abs().amax(dim=0) for name in group.consumers])
    if method.strength is None:
        return foldable(z.abs().mean(dim=0).sqrt(), None, has_router=True)
    args = (method.strength, group.measured, toy_layer.layer, Ledger())
    return smoothing_scale(z.abs().amax(dim=0), amax_w.amax(dim=0), *args)


def solve(
    toy_layer: Layer, recipe: Recipe, which: Sequence[Unit] | None = None
) -> tuple[Tensors, SolveSummary, Smoothing]:
    """Solve all units (or some) with one solver: packed tensors, summary, the layer's scales."""
    solver, shared = a_solver(toy_layer, recipe), shared_scale(toy_layer, recipe)
    packed: Tensors = {}
    for unit in units(toy_layer.config, toy_layer.layer) if which is None else which:
        packed |= solver.solve(unit, shared)
    summary = solver.summary()
    whole = Smoothing(dict(shared.columns), shared.rows | summary.smoothing.rows)
    return packed, summary, whole


@lru_cache(maxsize=32)
def solved(layer: int, recipe: Recipe) -> tuple[Tensors, SolveSummary, Smoothing]:
    """`solve` of a whole layer, cached; do not modify it."""
    return solve(a_layer(layer), recipe)


def restore(toy_layer: Layer, packed: Tensors, module: str, scheme: Scheme) -> Tensor:
    stored = {
        name.rpartition(".")[2]: tensor
        for name, tensor in packed.items()
        if name.rpartition(".")[0] == module
    }
    rows, columns = toy_layer.weight(module).shape
    return decompress(stored, scheme, (rows, columns))


def nearest(toy_layer: Layer, module: str, scheme: Scheme) -> Tensor:
    weight = toy_layer.weight(module)
    stored = compress(weight, scheme)
    return decompress(stored, scheme, (weight.shape[0], weight.shape[1]))


def noted(summary: SolveSummary, kind: str) -> dict[str, int]:
    return {entry.module: entry.count for entry in summary.fallbacks if entry.kind == kind}


def brute_force(toy_layer: Layer, expert: int, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """GPTQ of one expert measured on these tokens of each block; restored weights by role."""
    weights, restored = toy_layer.expert(expert), {}
    scheme = Scheme(**GPTQ)
    chosen = [routed.z[mine] for (_, routed), mine in zip(toy_layer.blocks, tokens, strict=True)]
    for role in MLP_ROLES:
        gram = torch.zeros(weights[role].shape[1], weights[role].shape[1])
        for x in chosen:
            if role == "down_proj":
                x = hidden(x, weights["gate_proj"], weights["up_proj"])
            gram += x.T @ x
        factor = inverse_factor(gram, scheme.damping)
        restored[role] = gptq(weights[role][None].clone(), [factor], scheme)[0].weight
    return restored


def assert_solved_on(
    toy_layer: Layer, packed: Tensors, expert: int, tokens: Sequence[Tensor]
) -> None:
    """Equal up to 1 % of the weights, which products of another shape round differently."""
    scheme = Scheme(**GPTQ)
    for role, expected in brute_force(toy_layer, expert, tokens).items():
        actual = restore(toy_layer, packed, f"{toy_layer.mlp(expert)}.{role}", scheme)
        differ = float((actual != expected).float().mean())
        assert differ < 0.01, f"expert {expert}, {role}: {differ:.3f} of the weights"


# --- which tokens an expert is solved on ---


@pytest.mark.heavy
def test_topk_solves_on_what_the_router_sends_and_rounds_the_starved_to_nearest() -> None:
    toy_layer = a_layer(MOE)
    counts = [toy_layer.routed_tokens(expert) for expert in range(8)]
    floor = sorted(counts)[3]
    starved = {expert for expert in range(8) if counts[expert] < floor}
    assert UNSEEN in starved
    assert counts[UNSEEN] == 0
    assert len(starved) > 1
    recipe = a_recipe(GPTQ, policy="topk", floor_tokens=floor)
    packed, summary, _ = solved(MOE, recipe)
    scheme = Scheme(**GPTQ)
    for expert in range(8):
        modules = [f"{toy_layer.mlp(expert)}.{role}" for role in MLP_ROLES]
        assert {summary.tokens[module] for module in modules} == {counts[expert]}
        if expert == counts.index(max(counts)) or counts[expert] == floor:
            mine = [tokens_of(routed, expert)[0] for _, routed in toy_layer.blocks]
            assert_solved_on(toy_layer, packed, expert, mine)
        for module in modules:
            is_nearest = torch.equal(
                restore(toy_layer, packed, module, scheme), nearest(toy_layer, module, scheme)
            )
            assert is_nearest == (expert in starved), module
    expected = {f"{toy_layer.mlp(expert)}.{role}": 1 for expert in starved for role in MLP_ROLES}
    assert noted(summary, "starved_expert") == expected
    assert {entry.kind for entry in summary.fallbacks} == {"starved_expert"}


@pytest.mark.parametrize("rule", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_without_a_floor_an_expert_that_saw_nothing_is_starved_all_the_same(
    rule: dict[str, Any],
) -> None:
    toy_layer = a_layer(MOE)
    packed, summary, whole = solved(MOE, a_recipe(rule, policy="topk", floor_tokens=0))
    starved = {f"{toy_layer.mlp(UNSEEN)}.{role}": 1 for role in MLP_ROLES}
    assert noted(summary, "starved_expert") == starved
    assert noted(summary, "unseen_expert") == {}
    for module in starved:
        assert summary.input_amax[module] == 0.0
        folded = whole.fold(f"{module}.weight", toy_layer.weight(module))
        scheme = Scheme(**PLAIN)
        expected = decompress(compress(folded, scheme), scheme, (len(folded), folded.shape[1]))
        assert torch.equal(restore(toy_layer, packed, module, scheme), expected)


def test_all_solves_on_every_token_whoever_is_routed() -> None:
    toy_layer = a_layer(MOE)
    packed, summary, _ = solved(MOE, a_recipe(GPTQ, policy="all", floor_tokens=1000))
    everything = [torch.arange(BLOCK_TOKENS)] * NUM_BLOCKS
    for expert in (2, UNSEEN):
        assert_solved_on(toy_layer, packed, expert, everything)
        module = f"{toy_layer.mlp(expert)}.gate_proj"
        routed_tokens = toy_layer.routed_tokens(expert)
        assert summary.tokens[module] == routed_tokens  # coverage is still measured
        z = torch.cat([routed.z for _, routed in toy_layer.blocks])
        assert summary.input_amax[module] == float(z.abs().max())
    assert summary.fallbacks == ()


@pytest.mark.heavy
def test_shrink_adds_the_layers_tokens_to_the_experts_own() -> None:
    toy_layer = a_layer(MOE)
    recipe = a_recipe(GPTQ, policy="shrink", shrink_tokens=16, floor_tokens=1000)
    packed, summary, _ = solved(MOE, recipe)
    everybodys = torch.tensor([0, 12, 24, 36])  # 16 over 4 blocks of 48
    for expert in (3, UNSEEN):
        mine = [torch.cat([tokens_of(r, expert)[0], everybodys]) for _, r in toy_layer.blocks]
        assert_solved_on(toy_layer, packed, expert, mine)
    assert summary.tokens[f"{toy_layer.mlp(UNSEEN)}.up_proj"] == 0
    assert summary.fallbacks == ()


@pytest.mark.heavy
def test_policies_do_not_touch_what_is_no_routed_expert() -> None:
    results = []
    for coverage in (
        {"policy": "topk"},
        {"policy": "all", "floor_tokens": 1000},
        {"policy": "shrink", "shrink_tokens": 16, "floor_tokens": 1000},
    ):
        packed, summary, _ = solved(MOE, a_recipe(GPTQ, **coverage))
        results.append({n: t for n, t in packed.items() if ".experts." not in n})
        shared = f"model.layers.{MOE}.mlp.shared_experts.down_proj"
        assert summary.tokens[shared] == NUM_BLOCKS * BLOCK_TOKENS
    assert len(results[0]) == 3 * 8
    for other in results[1:]:
        assert_same(other, results[0])


def test_smoothquant_leaves_the_down_proj_of_an_unseen_expert_alone_and_counts_it() -> None:
    toy_layer, recipe = a_layer(MOE), a_recipe(SMOOTH)
    packed, summary, whole = solved(MOE, recipe)
    mlp = toy_layer.mlp(UNSEEN)
    scheme = recipe.resolve(toy_layer.config)[f"{mlp}.down_proj"]
    assert noted(summary, "unseen_expert") == {f"{mlp}.down_proj": 1}
    assert noted(summary, "starved_expert") == {}
    assert torch.equal(
        restore(toy_layer, packed, f"{mlp}.down_proj", scheme),
        nearest(toy_layer, f"{mlp}.down_proj", scheme),
    )
    # Its gate and up read what all experts read.
    assert f"{mlp}.up_proj.weight" in whole.columns


# --- whole layers ---


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        pytest.param(DENSE, GPTQ | {"act_order": True}, id="dense-gptq-order"),
        pytest.param(DENSE, {"weights": "int8-asym", "algorithm": "gptq"}, id="dense-int8-gptq"),
        pytest.param(DENSE, TILES | {"algorithm": "gptq"}, id="dense-tiles-gptq"),
        pytest.param(DENSE, AWQ, id="dense-awq"),
        pytest.param(MOE, GPTQ, id="moe-gptq"),
        pytest.param(MOE, AWQ, id="moe-awq"),
        pytest.param(MOE, SMOOTH, id="moe-smoothquant"),
        pytest.param(MOE, TILES | {"algorithm": "smoothquant"}, id="moe-tiles-smoothquant"),
    ],
)
def test_a_unit_gives_the_same_bytes_whoever_solves_it_and_whenever(
    layer: int, rule: dict[str, Any]
) -> None:
    toy_layer, recipe = a_layer(layer), a_recipe(rule)
    packed, summary, _ = solved(layer, recipe)
    before = {name: source.data.clone() for name, source in toy_layer.source.items()}
    joined: Tensors = {}
    errors: dict[str, float] = {}
    for share in reversed(share_out(toy_layer.config, layer, 3)):
        tensors, share_summary, _ = solve(toy_layer, recipe, share[::-1])
        assert not joined.keys() & tensors.keys()
        joined |= tensors
        errors |= share_summary.errors
    assert_same(joined, packed)
    assert errors == summary.errors
    assert {name.rpartition(".")[0] for name in packed} == set(summary.errors)
    assert set(summary.errors) == {spec.module for spec in linears(toy_layer.config, layer)}
    assert set(summary.tokens) == set(summary.input_amax) == set(summary.errors)
    assert all(torch.equal(before[name], toy_layer.source[name].data) for name in before)


@pytest.mark.parametrize("rule", [GPTQ, AWQ], ids=["gptq", "awq"])
@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_gptq_and_awq_err_less_than_rounding_to_nearest(layer: int, rule: dict[str, Any]) -> None:
    _, summary, _ = solved(layer, a_recipe(rule))
    errors, plain = summary.errors, solved(layer, a_recipe(PLAIN))[1].errors
    starved = noted(summary, "starved_expert")
    ratios = {module: errors[module] / plain[module] for module in plain.keys() - starved.keys()}
    assert max(ratios.values()) < 1, max(ratios.items(), key=lambda item: item[1])
    assert sum(ratios.values()) / len(ratios) < 0.8


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_the_scale_that_awq_takes_never_loses_to_plain_rounding(layer: int) -> None:
    """On the loss that its search minimizes; the clip search has its own test."""
    toy_layer, recipe = a_layer(layer), a_recipe(AWQ)
    _, _, whole = solved(layer, recipe)
    schemes = recipe.resolve(toy_layer.config)
    compared = 0
    for group, _ in scaled_groups(toy_layer.config, schemes, layer):
        if group.router is not None or group.divided.endswith("up_proj.weight"):
            continue
        scale = whole.rows[group.divided]
        if group.measured.endswith("mlp.gate_proj"):
            x = torch.cat([routed.z for _, routed in toy_layer.blocks])
        else:
            statistics = toy_layer.attention[input_key(group.measured)]
            assert statistics is not None
            x = statistics.sample
        weights = [toy_layer.weight(name) for name in group.consumers]
        tried = torch.stack([torch.ones_like(scale), scale])
        before, after = scale_losses(weights, x, tried, schemes[group.measured]).tolist()
        assert after <= before
        compared += after < before
    assert compared >= 2


def test_the_scale_of_an_experts_down_proj_goes_into_its_up_proj() -> None:
    """The rows of up and the columns of down contain s, which cancels in their product."""
    toy_layer = a_layer(MOE)
    rules = (PLAIN, {"match": "*.experts.*.down_proj", **AWQ})
    packed, summary, _ = solved(MOE, a_recipe(*rules))
    scheme, scaled = Scheme(**PLAIN), 0
    for expert in set(range(8)) - {UNSEEN}:
        weights, mlp = toy_layer.expert(expert), toy_layer.mlp(expert)
        up, down = (restore(toy_layer, packed, f"{mlp}.{r}_proj", scheme) for r in ("up", "down"))
        size = up.norm(dim=1) / weights["up_proj"].norm(dim=1)
        assert torch.allclose(down.norm(dim=0) * size, weights["down_proj"].norm(dim=0), rtol=0.25)
        scaled += int(size.log2().abs().max() > 0.25)
        x = toy_layer.blocks[0][1].z
        gate = weights["gate_proj"]
        actual, expected = hidden(x, gate, up) @ down.T, hidden(x, gate, weights["up_proj"])
        expected = expected @ weights["down_proj"].T
        assert (actual - expected).norm() < 0.25 * expected.norm()
        # The recorded error of up is that of its output with s undone.
        assert summary.errors[f"{mlp}.up_proj"] < 0.15
    assert scaled > 3


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_the_smoothed_layer_computes_what_the_original_did(layer: int) -> None:
    """Up to 2 % from rounding the weights; with an unfolded norm or router the error is larger."""
    toy_layer = a_layer(layer)
    original = {name: source.dequantize() for name, source in toy_layer.source.items()}
    folded, changed = folded_layer(layer, a_recipe(SMOOTH))
    for x in toy_layer.inputs:
        expected, experts = run_layer(toy_layer, original, x)
        actual, folded_experts = run_layer(toy_layer, folded, x)
        assert (actual - expected).norm() < 0.02 * (expected - x).norm()
        if experts is not None and folded_experts is not None:
            assert (folded_experts == experts).float().mean() > 0.98
    x = toy_layer.inputs[0]
    expected, _ = run_layer(toy_layer, original, x)
    for name in changed:
        broken, _ = run_layer(toy_layer, folded | {name: original[name]}, x)
        assert (broken - expected).norm() > 0.03 * (expected - x).norm(), name


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_awqs_folded_layer_is_nearer_to_the_original_than_plain_rounding(layer: int) -> None:
    toy_layer = a_layer(layer)
    original = {name: source.dequantize() for name, source in toy_layer.source.items()}
    errors = []
    for rule in (AWQ, PLAIN):
        weights, changed = folded_layer(layer, a_recipe(rule))
        assert len(changed) == (0 if rule is PLAIN else 4 + toy_layer.config.is_moe(layer))
        actual = torch.cat([run_layer(toy_layer, weights, x)[0] for x in toy_layer.inputs])
        expected = torch.cat([run_layer(toy_layer, original, x)[0] for x in toy_layer.inputs])
        errors.append(float((actual - expected).norm()))
    assert errors[0] < 0.9 * errors[1]


def folded_layer(layer: int, recipe: Recipe) -> tuple[dict[str, Tensor], set[str]]:
    """The weights of the quantized layer, dequantized; and the names of folded norms and router."""
    toy_layer, schemes = a_layer(layer), recipe.resolve(a_layer(layer).config)
    packed, _, whole = solved(layer, recipe)
    folded = {
        name: restore(toy_layer, packed, source.spec.module, schemes[source.spec.module])
        if source.spec.kind == "linear"
        else whole.fold(name, source.data).float()
        for name, source in toy_layer.source.items()
    }
    changed = (whole.rows.keys() | whole.columns.keys()) & {
        name for name, source in toy_layer.source.items() if source.spec.kind != "linear"
    }
    return folded, changed


def run_layer(
    toy_layer: Layer, weights: dict[str, Tensor], x_TD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The layer's output f32 [T, D], and the experts that the router chose."""
    trunk = trunk_of(
        toy_layer.config, toy_layer.layer, weights, {n: 0 for n in weights if "experts." not in n}
    )
    h_TD, routed = trunk.attend(Rotary(toy_layer.config), x_TD)
    outputs = {}
    for expert in range(8 if trunk.is_moe else 0):
        expert_weights = {
            role: weights[f"{toy_layer.mlp(expert)}.{role}.weight"] for role in MLP_ROLES
        }
        if (rows := run_expert(routed, expert, expert_weights, {})) is not None:
            outputs[expert] = rows
    return trunk.combine(h_TD, routed, [ExpertOutputs(outputs)]), routed.experts


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_smoothed_weights_are_the_folded_ones_to_half_a_step(layer: int) -> None:
    toy_layer, recipe = a_layer(layer), a_recipe(SMOOTH)
    schemes = recipe.resolve(toy_layer.config)
    packed, summary, whole = solved(layer, recipe)
    for group, _ in scaled_groups(toy_layer.config, schemes, layer):
        if group.divided.endswith("up_proj.weight"):
            continue
        assert (torch.frexp(whole.rows[group.divided]).mantissa == 0.5).all()
        for module in group.consumers:
            if module.endswith("up_proj"):
                continue  # its rows are divided too
            name = f"{module}.weight"
            scale = whole.rows[group.divided]
            folded = toy_layer.weight(module) * scale
            restored = restore(toy_layer, packed, module, schemes[module])
            assert ((restored - folded).abs() <= 0.501 * packed[f"{name}_scale"]).all()
            # Norm and columns multiply to the original.
            norm = toy_layer.source[group.divided].data
            now = whole.fold(group.divided, norm).float() * folded
            assert torch.equal(now, norm.float() * toy_layer.weight(module))
    statistics = toy_layer.attention[f"model.layers.{layer}.self_attn.kv_b_proj"]
    assert statistics is not None
    divided = whole.rows[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"]
    assert summary.kv_latent_amax == float((statistics.amax / divided).max())


def all_experts(toy_layer: Layer) -> Unit:
    """All routed experts of the layer as one unit; the units of a small layer have one each."""
    expert_units = [unit for unit in units(toy_layer.config, toy_layer.layer) if unit.experts]
    assert len(expert_units) == toy_layer.config.n_routed_experts
    return Unit("mlp", tuple(linear_input for unit in expert_units for linear_input in unit.inputs))


@pytest.mark.parametrize(
    "rule", [GPTQ, GPTQ | {"act_order": True}, AWQ], ids=["gptq", "gptq-order", "awq"]
)
def test_experts_solved_together_are_those_solved_alone_to_the_bit(rule: dict[str, Any]) -> None:
    toy_layer, recipe = a_layer(MOE), a_recipe(rule)
    packed, summary, _ = solve(toy_layer, recipe, [all_experts(toy_layer)])
    alone, alone_summary, _ = solved(MOE, recipe)
    assert_same(packed, {name: t for name, t in alone.items() if ".experts." in name})
    assert summary.errors.items() <= alone_summary.errors.items()
    assert summary.tokens.items() <= alone_summary.tokens.items()


@pytest.mark.heavy
@pytest.mark.parametrize("rule", [GPTQ, AWQ, PLAIN], ids=["gptq", "awq", "max"])
def test_a_unit_of_many_experts_takes_the_memory_of_one(rule: dict[str, Any]) -> None:
    """On a CPU: statistics and weights of one expert at a time, plus all packed tensors."""
    toy_layer, recipe = a_layer(MOE), a_recipe(rule)
    together = all_experts(toy_layer)
    expert_units = [unit for unit in units(toy_layer.config, MOE) if unit.experts]
    peaks = [
        peak_bytes(
            lambda unit=unit: a_solver(toy_layer, recipe).solve(
                unit, shared_scale(toy_layer, recipe)
            )
        )
        for unit in (*expert_units, together)
    ]
    packed = sum(t.nbytes for t in solve(toy_layer, recipe, [together])[0].values())
    assert peaks[-1] <= max(peaks[:-1]) + packed


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_what_no_rule_quantizes_is_passed_on_and_never_whole_in_float32(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_layer, recipe = a_layer(layer), a_recipe({"weights": "source"})
    monkeypatch.setattr(OriginalLayer, "weight", None)
    packed, summary, _ = solve(toy_layer, recipe)
    for spec in linears(toy_layer.config, layer):
        assert packed[spec.name] is toy_layer.source[spec.name].data
    assert not summary.errors
    assert set(summary.tokens) == {spec.module for spec in linears(toy_layer.config, layer)}


def test_one_input_is_inverted_once_for_all_that_damp_it_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """q_a and kv_a have different shapes; under policy `all` all experts share the input."""
    toy_layer = a_layer(MOE)
    inverted: list[int] = []

    def counted(gram: Tensor, *args: Any, **kwargs: Any) -> Factor:
        inverted.append(len(gram))
        return inverse_factor(gram, *args, **kwargs)

    monkeypatch.setattr("quant_jobs.workers.unit_solver.inverse_factor", counted)
    solve(toy_layer, a_recipe(GPTQ), units(toy_layer.config, MOE)[:1])
    assert inverted == [256]
    inverted.clear()
    solve(
        toy_layer, a_recipe(GPTQ, policy="all"), [u for u in units(toy_layer.config, MOE) if u.mlps]
    )
    hidden_size, intermediate = toy_layer.config.hidden_size, toy_layer.config.moe_intermediate_size
    assert sorted(inverted) == sorted([*[intermediate] * 9, hidden_size])


def test_one_input_damped_in_two_ways_serves_both() -> None:
    """The first must not consume the Gram matrix that the second needs."""
    toy_layer = a_layer(DENSE)
    more = GPTQ | {"damping": 0.1}
    up = f"model.layers.{DENSE}.mlp.up_proj"
    mixed, _, _ = solve(toy_layer, a_recipe(GPTQ, {"match": up, **more}))
    expected, _, _ = solve(toy_layer, a_recipe(more))
    actual, scheme = restore(toy_layer, mixed, up, Scheme(**more)), Scheme(**more)
    # Alone it is a product of another shape than stacked with its gate.
    assert (actual != restore(toy_layer, expected, up, scheme)).float().mean() < 0.01


def test_schemes_may_differ_from_one_linear_to_the_next() -> None:
    """An expert whose gate or up is not solved by GPTQ cannot join a batch of pairs."""
    toy_layer = a_layer(MOE)
    rules = (
        GPTQ,
        {"match": "*.experts.1.up_proj", **PLAIN},
        {"match": "*.experts.2.gate_proj", "weights": "int8", "algorithm": "gptq"},
        {"match": "*.experts.3.*", "weights": "bf16"},
        {"match": "*kv_a_proj_with_mqa", "weights": "int8"},
    )
    recipe = a_recipe(*rules)
    schemes = recipe.resolve(toy_layer.config)
    packed, summary, _ = solve(toy_layer, recipe, [all_experts(toy_layer)])
    whole, _, _ = solved(MOE, a_recipe(GPTQ))
    for expert in (0, 1, 2, 4):
        for role in MLP_ROLES:
            module = f"{toy_layer.mlp(expert)}.{role}"
            if schemes[module] != Scheme(**GPTQ):
                continue
            actual = restore(toy_layer, packed, module, Scheme(**GPTQ))
            expected = restore(toy_layer, whole, module, Scheme(**GPTQ))
            assert (actual != expected).float().mean() < 0.01, module
    assert torch.equal(
        restore(toy_layer, packed, f"{toy_layer.mlp(1)}.up_proj", Scheme(**PLAIN)),
        nearest(toy_layer, f"{toy_layer.mlp(1)}.up_proj", Scheme(**PLAIN)),
    )
    carried = f"{toy_layer.mlp(3)}.up_proj"
    assert torch.equal(packed[f"{carried}.weight"], toy_layer.source[f"{carried}.weight"].data)
    assert carried not in summary.errors


@pytest.mark.parametrize("rule", [GPTQ, AWQ, PLAIN, SMOOTH], ids=["gptq", "awq", "max", "smooth"])
@pytest.mark.parametrize("role", ["mlp.experts.4.down_proj", "mlp.experts.2.up_proj"])
def test_a_damaged_weight_is_refused_by_its_own_name(role: str, rule: dict[str, Any]) -> None:
    intact, recipe = a_layer(MOE), a_recipe(rule)
    name = f"model.layers.{MOE}.{role}.weight"
    broken = intact.source[name].data.clone()
    broken[3, 3] = float("nan")
    damaged = SourceTensor(intact.source[name].spec, broken)
    damaged_layer = replace(intact, source=intact.source | {name: damaged})
    shared = shared_scale(intact, recipe)
    solver = a_solver(damaged_layer, recipe)
    (unit,) = [
        u for u in units(damaged_layer.config, MOE) if name.removesuffix(".weight") in u.modules
    ]
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        solver.solve(unit, shared)


def test_a_damaged_activation_is_refused_with_its_block() -> None:
    intact = a_layer(MOE)
    z = intact.blocks[2][1].z.clone()
    z[7, 7] = float("inf")
    blocks = [*intact.blocks[:2], (2, replace(intact.blocks[2][1], z=z)), intact.blocks[3]]
    damaged_layer = replace(intact, blocks=blocks)
    with pytest.raises(CheckpointError, match="not finite on calibration block 2"):
        solve(damaged_layer, a_recipe(PLAIN))


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name

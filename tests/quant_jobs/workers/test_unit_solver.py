"""Units solved: each from the tokens that the recipe's policy names, folded, packed, accounted."""

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
from deepseek.inventory import MLP_ROLES, input_of, layer_tensors, linears
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

NUM_BLOCKS, BLOCK_TOKENS = 4, 48
DENSE, MOE = 0, 1
#: Its correction bias is -9: no token goes there.
UNSEEN = 5

GPTQ: dict[str, Any] = {"weights": "int4", "group_size": 32, "algorithm": "gptq"}
AWQ: dict[str, Any] = {"weights": "int4", "group_size": 32, "algorithm": "awq"}
PLAIN: dict[str, Any] = {"weights": "int4", "group_size": 32}
SMOOTH: dict[str, Any] = {"weights": "int8", "activations": "int8", "algorithm": "smoothquant"}


@dataclass(frozen=True)
class Layer:
    """A random layer, and what its blocks are where they enter each half."""

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
        return {role: self.weight(f"{self.block(expert)}.{role}") for role in MLP_ROLES}

    def block(self, expert: int) -> str:
        return f"model.layers.{self.layer}.mlp.experts.{expert}"

    def routed_tokens(self, expert: int) -> int:
        return sum(len(tokens_of(routed, expert)[0]) for _, routed in self.blocks)


@lru_cache(maxsize=2)
def a_layer(layer: int) -> Layer:
    """8 experts, K = 256, blocks with outlier channels; statistics as a worker takes them."""
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

            def see(x: Tensor, name: str = name, index: int = index) -> None:
                shares[name][index] = observe(x.flatten(0, -2), rows, keep_rows=True)
                accumulators[name].add(index, shares[name][index])

            trunk.watch(name, see)
        blocks.append((index, trunk.attend(Rotary(config), x)[1]))
    attention = {name: one.finish() for name, one in accumulators.items()}
    return Layer(config, layer, source, inputs, attention, shares, blocks)


def trunk_of(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], high: dict[str, Any]
) -> Trunk:
    """`weights` by full name; `high` names, among others, what is not a linear."""
    linear = {spec.name for spec in linears(config, layer)}
    kept = {name: weights[name] for name in high if name not in linear}
    return Trunk(config, layer, kept, lambda module: weights[f"{module}.weight"])


def a_recipe(*rules: dict[str, Any], **coverage: Any) -> Recipe:
    content = load_recipe("int8").model_dump(mode="json")
    content["rules"] = [{"match": "*", **rules[0]}, *rules[1:]]
    content["expert_coverage"] = coverage
    content["calibration"] = {"num_blocks": NUM_BLOCKS, "block_tokens": BLOCK_TOKENS}
    return Recipe.model_validate(content)


def a_solver(one: Layer, recipe: Recipe) -> UnitSolver:
    """The solver of one worker that owns all units, fed as a worker is."""
    config, cpu = one.config, torch.device("cpu")
    schemes = recipe.resolve(config)
    context = LayerContext(config, recipe, schemes, NUM_BLOCKS, cpu, Rotary(config))
    original = OriginalLayer(context, one.layer, units(config, one.layer), one.source, {})
    original.observe([one.shares])
    original.receive([dict(one.blocks)])
    return original.solver()


def shared_scale(one: Layer, recipe: Recipe) -> Smoothing:
    """What the workers agree on: the formula's vector for SmoothQuant, some vector for AWQ."""
    shared = Smoothing()
    for each, how in scaled_groups(one.config, recipe.resolve(one.config), one.layer):
        if each.router is not None:
            shared.add(each, _vector(one, each, how))
    return shared


def _vector(one: Layer, each: FoldingGroup, how: ScaleMethod) -> Tensor:
    z = torch.cat([routed.z for _, routed in one.blocks])
    amax_w = torch.stack([one.weight(name).abs().amax(dim=0) for name in each.consumers])
    if how.strength is None:
        return foldable(z.abs().mean(dim=0).sqrt(), None, has_router=True)
    args = (how.strength, each.measured, one.layer, Ledger())
    return smoothing_scale(z.abs().amax(dim=0), amax_w.amax(dim=0), *args)


def solve(
    one: Layer, recipe: Recipe, which: Sequence[Unit] | None = None
) -> tuple[Tensors, SolveSummary, Smoothing]:
    """Every unit (or some) by one solver -> packed tensors, account, the whole layer's vectors."""
    solver, shared = a_solver(one, recipe), shared_scale(one, recipe)
    packed: Tensors = {}
    for unit in units(one.config, one.layer) if which is None else which:
        packed |= solver.solve(unit, shared)
    account = solver.summary()
    whole = Smoothing(dict(shared.columns), shared.rows | account.smoothing.rows)
    return packed, account, whole


@lru_cache(maxsize=32)
def solved(layer: int, recipe: Recipe) -> tuple[Tensors, SolveSummary, Smoothing]:
    """`solve` of a whole layer; not to be written to."""
    return solve(a_layer(layer), recipe)


def restore(one: Layer, packed: Tensors, module: str, scheme: Scheme) -> Tensor:
    stored = {
        name.rpartition(".")[2]: tensor
        for name, tensor in packed.items()
        if name.rpartition(".")[0] == module
    }
    rows, columns = one.weight(module).shape
    return decompress(stored, scheme, (rows, columns))


def nearest(one: Layer, module: str, scheme: Scheme) -> Tensor:
    weight = one.weight(module)
    stored = compress(weight, scheme)
    return decompress(stored, scheme, (weight.shape[0], weight.shape[1]))


def noted(account: SolveSummary, kind: str) -> dict[str, int]:
    return {entry.module: entry.count for entry in account.fallbacks if entry.kind == kind}


def brute_force(one: Layer, expert: int, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """GPTQ of one expert, its statistics taken of these tokens of each block: restored by role."""
    weights, restored = one.expert(expert), {}
    scheme = Scheme(**GPTQ)
    chosen = [routed.z[mine] for (_, routed), mine in zip(one.blocks, tokens, strict=True)]
    for role in MLP_ROLES:
        gram = torch.zeros(weights[role].shape[1], weights[role].shape[1])
        for x in chosen:
            if role == "down_proj":
                x = hidden(x, weights["gate_proj"], weights["up_proj"])
            gram += x.T @ x
        factor = inverse_factor(gram, scheme.damping)
        restored[role] = gptq(weights[role][None].clone(), [factor], scheme)[0].weight
    return restored


def assert_solved_on(one: Layer, packed: Tensors, expert: int, tokens: Sequence[Tensor]) -> None:
    """Equal but for what products in another shape round differently: 1 % of the weights."""
    scheme = Scheme(**GPTQ)
    for role, wanted in brute_force(one, expert, tokens).items():
        found = restore(one, packed, f"{one.block(expert)}.{role}", scheme)
        differ = float((found != wanted).float().mean())
        assert differ < 0.01, f"expert {expert}, {role}: {differ:.3f} of the weights"


# --- which tokens an expert is solved on ---


@pytest.mark.heavy
def test_topk_solves_on_what_the_router_sends_and_rounds_the_starved_to_nearest() -> None:
    one = a_layer(MOE)
    counts = [one.routed_tokens(expert) for expert in range(8)]
    floor = sorted(counts)[3]
    starved = {expert for expert in range(8) if counts[expert] < floor}
    assert UNSEEN in starved
    assert counts[UNSEEN] == 0
    assert len(starved) > 1
    recipe = a_recipe(GPTQ, policy="topk", floor_tokens=floor)
    packed, account, _ = solved(MOE, recipe)
    scheme = Scheme(**GPTQ)
    for expert in range(8):
        modules = [f"{one.block(expert)}.{role}" for role in MLP_ROLES]
        assert {account.tokens[module] for module in modules} == {counts[expert]}
        if expert == counts.index(max(counts)) or counts[expert] == floor:
            mine = [tokens_of(routed, expert)[0] for _, routed in one.blocks]
            assert_solved_on(one, packed, expert, mine)
        for module in modules:
            is_nearest = torch.equal(
                restore(one, packed, module, scheme), nearest(one, module, scheme)
            )
            assert is_nearest == (expert in starved), module
    wanted = {f"{one.block(expert)}.{role}": 1 for expert in starved for role in MLP_ROLES}
    assert noted(account, "starved_expert") == wanted
    assert {entry.kind for entry in account.fallbacks} == {"starved_expert"}


@pytest.mark.parametrize("rule", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_without_a_floor_an_expert_that_saw_nothing_is_starved_all_the_same(
    rule: dict[str, Any],
) -> None:
    one = a_layer(MOE)
    packed, account, whole = solved(MOE, a_recipe(rule, policy="topk", floor_tokens=0))
    wanted = {f"{one.block(UNSEEN)}.{role}": 1 for role in MLP_ROLES}
    assert noted(account, "starved_expert") == wanted
    assert noted(account, "unseen_expert") == {}
    for module in wanted:
        assert account.input_amax[module] == 0.0
        folded = whole.fold(f"{module}.weight", one.weight(module))
        scheme = Scheme(**PLAIN)
        expected = decompress(compress(folded, scheme), scheme, (len(folded), folded.shape[1]))
        assert torch.equal(restore(one, packed, module, scheme), expected)


def test_all_solves_on_every_token_whoever_is_routed() -> None:
    one = a_layer(MOE)
    packed, account, _ = solved(MOE, a_recipe(GPTQ, policy="all", floor_tokens=1000))
    everything = [torch.arange(BLOCK_TOKENS)] * NUM_BLOCKS
    for expert in (2, UNSEEN):
        assert_solved_on(one, packed, expert, everything)
        module = f"{one.block(expert)}.gate_proj"
        assert account.tokens[module] == one.routed_tokens(expert)  # coverage is still measured
        z = torch.cat([routed.z for _, routed in one.blocks])
        assert account.input_amax[module] == float(z.abs().max())
    assert account.fallbacks == ()


@pytest.mark.heavy
def test_shrink_adds_the_layers_tokens_to_the_experts_own() -> None:
    one = a_layer(MOE)
    recipe = a_recipe(GPTQ, policy="shrink", shrink_tokens=16, floor_tokens=1000)
    packed, account, _ = solved(MOE, recipe)
    everybodys = torch.tensor([0, 12, 24, 36])  # 16 over 4 blocks of 48
    for expert in (3, UNSEEN):
        mine = [torch.cat([tokens_of(r, expert)[0], everybodys]) for _, r in one.blocks]
        assert_solved_on(one, packed, expert, mine)
    assert account.tokens[f"{one.block(UNSEEN)}.up_proj"] == 0
    assert account.fallbacks == ()


@pytest.mark.heavy
def test_policies_do_not_touch_what_is_no_routed_expert() -> None:
    results = []
    for coverage in (
        {"policy": "topk"},
        {"policy": "all", "floor_tokens": 1000},
        {"policy": "shrink", "shrink_tokens": 16, "floor_tokens": 1000},
    ):
        packed, account, _ = solved(MOE, a_recipe(GPTQ, **coverage))
        results.append({n: t for n, t in packed.items() if ".experts." not in n})
        shared = f"model.layers.{MOE}.mlp.shared_experts.down_proj"
        assert account.tokens[shared] == NUM_BLOCKS * BLOCK_TOKENS
    assert len(results[0]) == 3 * 8
    for other in results[1:]:
        assert_same(other, results[0])


def test_smoothquant_leaves_the_down_proj_of_an_unseen_expert_alone_and_counts_it() -> None:
    one, recipe = a_layer(MOE), a_recipe(SMOOTH)
    packed, account, whole = solved(MOE, recipe)
    block, scheme = one.block(UNSEEN), recipe.resolve(one.config)[one.block(UNSEEN) + ".down_proj"]
    assert noted(account, "unseen_expert") == {f"{block}.down_proj": 1}
    assert noted(account, "starved_expert") == {}
    assert torch.equal(
        restore(one, packed, f"{block}.down_proj", scheme),
        nearest(one, f"{block}.down_proj", scheme),
    )
    # Its gate and up read what all experts read.
    assert f"{block}.up_proj.weight" in whole.columns


# --- all of it ---


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        pytest.param(DENSE, GPTQ | {"act_order": True}, id="dense-gptq-order"),
        pytest.param(DENSE, {"weights": "int8-asym", "algorithm": "gptq"}, id="dense-int8-gptq"),
        pytest.param(DENSE, AWQ, id="dense-awq"),
        pytest.param(MOE, GPTQ, id="moe-gptq"),
        pytest.param(MOE, AWQ, id="moe-awq"),
        pytest.param(MOE, SMOOTH, id="moe-smoothquant"),
    ],
)
def test_a_unit_gives_the_same_bytes_whoever_solves_it_and_whenever(
    layer: int, rule: dict[str, Any]
) -> None:
    one, recipe = a_layer(layer), a_recipe(rule)
    packed, account, _ = solved(layer, recipe)
    kept = {name: source.data.clone() for name, source in one.source.items()}
    joined: Tensors = {}
    errors: dict[str, float] = {}
    for share in reversed(share_out(one.config, layer, 3)):
        part, its_account, _ = solve(one, recipe, share[::-1])
        assert not joined.keys() & part.keys()
        joined |= part
        errors |= its_account.errors
    assert_same(joined, packed)
    assert errors == account.errors
    assert {name.rpartition(".")[0] for name in packed} == set(account.errors)
    assert set(account.errors) == {spec.module for spec in linears(one.config, layer)}
    assert set(account.tokens) == set(account.input_amax) == set(account.errors)
    assert all(torch.equal(kept[name], one.source[name].data) for name in kept)


@pytest.mark.parametrize("rule", [GPTQ, AWQ], ids=["gptq", "awq"])
@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_gptq_and_awq_err_less_than_rounding_to_nearest(layer: int, rule: dict[str, Any]) -> None:
    _, account, _ = solved(layer, a_recipe(rule))
    found, plain = account.errors, solved(layer, a_recipe(PLAIN))[1].errors
    starved = noted(account, "starved_expert")
    ratios = {module: found[module] / plain[module] for module in plain.keys() - starved.keys()}
    assert max(ratios.values()) < 1, max(ratios.items(), key=lambda item: item[1])
    assert sum(ratios.values()) / len(ratios) < 0.8


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_the_scale_that_awq_takes_never_loses_to_plain_rounding(layer: int) -> None:
    """On the loss that it searched; the clip search that follows has its own test."""
    one, recipe = a_layer(layer), a_recipe(AWQ)
    _, _, whole = solved(layer, recipe)
    schemes = recipe.resolve(one.config)
    compared = 0
    for each, _ in scaled_groups(one.config, schemes, layer):
        if each.router is not None or each.divided.endswith("up_proj.weight"):
            continue
        scale = whole.rows[each.divided]
        if each.measured.endswith("mlp.gate_proj"):
            x = torch.cat([routed.z for _, routed in one.blocks])
        else:
            seen = one.attention[input_of(each.measured)]
            assert seen is not None
            x = seen.sample
        weights = [one.weight(name) for name in each.consumers]
        tried = torch.stack([torch.ones_like(scale), scale])
        before, after = scale_losses(weights, x, tried, schemes[each.measured]).tolist()
        assert after <= before
        compared += after < before
    assert compared >= 2


def test_the_scale_of_an_experts_down_proj_goes_into_its_up_proj() -> None:
    """Seen from outside: up's rows and down's columns hold s, which cancels in their product."""
    one = a_layer(MOE)
    rules = (PLAIN, {"match": "*.experts.*.down_proj", **AWQ})
    packed, account, _ = solved(MOE, a_recipe(*rules))
    scheme, scaled = Scheme(**PLAIN), 0
    for expert in set(range(8)) - {UNSEEN}:
        weights, block = one.expert(expert), one.block(expert)
        up, down = (restore(one, packed, f"{block}.{r}_proj", scheme) for r in ("up", "down"))
        size = up.norm(dim=1) / weights["up_proj"].norm(dim=1)
        assert torch.allclose(down.norm(dim=0) * size, weights["down_proj"].norm(dim=0), rtol=0.25)
        scaled += int(size.log2().abs().max() > 0.25)
        x = one.blocks[0][1].z
        gate = weights["gate_proj"]
        found, wanted = hidden(x, gate, up) @ down.T, hidden(x, gate, weights["up_proj"])
        wanted = wanted @ weights["down_proj"].T
        assert (found - wanted).norm() < 0.25 * wanted.norm()
        # The error that is recorded for up is that of what comes out of it, s undone.
        assert account.errors[f"{block}.up_proj"] < 0.15
    assert scaled > 3


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_the_smoothed_layer_computes_what_the_original_did(layer: int) -> None:
    """Up to the rounding of the weights, 2 %; where a norm or the router keeps its size, it is off
    by more."""
    one = a_layer(layer)
    original = {name: source.dequantize() for name, source in one.source.items()}
    folded, changed = folded_layer(layer, a_recipe(SMOOTH))
    for x in one.inputs:
        wanted, chosen = run_layer(one, original, x)
        found, now_chosen = run_layer(one, folded, x)
        assert (found - wanted).norm() < 0.02 * (wanted - x).norm()
        if chosen is not None and now_chosen is not None:
            assert (now_chosen == chosen).float().mean() > 0.98
    x = one.inputs[0]
    wanted, _ = run_layer(one, original, x)
    for name in changed:
        broken, _ = run_layer(one, folded | {name: original[name]}, x)
        assert (broken - wanted).norm() > 0.03 * (wanted - x).norm(), name


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_awqs_folded_layer_is_nearer_to_the_original_than_plain_rounding(layer: int) -> None:
    one = a_layer(layer)
    original = {name: source.dequantize() for name, source in one.source.items()}
    errors = []
    for rule in (AWQ, PLAIN):
        weights, changed = folded_layer(layer, a_recipe(rule))
        assert len(changed) == (0 if rule is PLAIN else 4 + one.config.is_moe(layer))
        found = torch.cat([run_layer(one, weights, x)[0] for x in one.inputs])
        wanted = torch.cat([run_layer(one, original, x)[0] for x in one.inputs])
        errors.append(float((found - wanted).norm()))
    assert errors[0] < 0.9 * errors[1]


def folded_layer(layer: int, recipe: Recipe) -> tuple[dict[str, Tensor], set[str]]:
    """The quantized layer as it will be read back; and the norms and router that were folded."""
    one, schemes = a_layer(layer), recipe.resolve(a_layer(layer).config)
    packed, _, whole = solved(layer, recipe)
    folded = {
        name: restore(one, packed, source.spec.module, schemes[source.spec.module])
        if source.spec.kind == "linear"
        else whole.fold(name, source.data).float()
        for name, source in one.source.items()
    }
    changed = (whole.rows.keys() | whole.columns.keys()) & {
        name for name, source in one.source.items() if source.spec.kind != "linear"
    }
    return folded, changed


def run_layer(one: Layer, weights: dict[str, Tensor], x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's output f32 [T, D], and the experts that the router chose."""
    trunk = trunk_of(one.config, one.layer, weights, {n: 0 for n in weights if "experts." not in n})
    h_TD, routed = trunk.attend(Rotary(one.config), x_TD)
    parts = {}
    for expert in range(8 if trunk.is_moe else 0):
        mine = {role: weights[f"{one.block(expert)}.{role}.weight"] for role in MLP_ROLES}
        if (rows := run_expert(routed, expert, mine, {})) is not None:
            parts[expert] = rows
    return trunk.combine(h_TD, routed, [ExpertOutputs(parts)]), routed.experts


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_smoothed_weights_are_the_folded_ones_to_half_a_step(layer: int) -> None:
    one, recipe = a_layer(layer), a_recipe(SMOOTH)
    schemes = recipe.resolve(one.config)
    packed, account, whole = solved(layer, recipe)
    for each, _ in scaled_groups(one.config, schemes, layer):
        if each.divided.endswith("up_proj.weight"):
            continue
        assert (torch.frexp(whole.rows[each.divided]).mantissa == 0.5).all()
        for module in each.consumers:
            if module.endswith("up_proj"):
                continue  # its rows are divided too
            name = f"{module}.weight"
            scale = whole.rows[each.divided]
            folded = one.weight(module) * scale
            restored = restore(one, packed, module, schemes[module])
            assert ((restored - folded).abs() <= 0.501 * packed[f"{name}_scale"]).all()
            # Norm and columns together are what they were.
            norm = one.source[each.divided].data
            now = whole.fold(each.divided, norm).float() * folded
            assert torch.equal(now, norm.float() * one.weight(module))
    seen = one.attention[f"model.layers.{layer}.self_attn.kv_b_proj"]
    assert seen is not None
    divided = whole.rows[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"]
    assert account.kv_latent_amax == float((seen.amax / divided).max())


def all_experts(one: Layer) -> Unit:
    """The experts of the layer as one unit; a small layer's units have one expert each."""
    those = [unit for unit in units(one.config, one.layer) if unit.experts]
    assert len(those) == one.config.n_routed_experts
    return Unit("mlp", tuple(linear_input for unit in those for linear_input in unit.inputs))


@pytest.mark.parametrize(
    "rule", [GPTQ, GPTQ | {"act_order": True}, AWQ], ids=["gptq", "gptq-order", "awq"]
)
def test_experts_solved_together_are_those_solved_alone_to_the_bit(rule: dict[str, Any]) -> None:
    one, recipe = a_layer(MOE), a_recipe(rule)
    packed, account, _ = solve(one, recipe, [all_experts(one)])
    alone, every, _ = solved(MOE, recipe)
    assert_same(packed, {name: t for name, t in alone.items() if ".experts." in name})
    assert account.errors.items() <= every.errors.items()
    assert account.tokens.items() <= every.tokens.items()


@pytest.mark.heavy
@pytest.mark.parametrize("rule", [GPTQ, AWQ, PLAIN], ids=["gptq", "awq", "max"])
def test_a_unit_of_many_experts_takes_the_memory_of_one(rule: dict[str, Any]) -> None:
    """On a CPU: statistics and weights of one at a time. What is packed of the others remains."""
    one, recipe = a_layer(MOE), a_recipe(rule)
    together = all_experts(one)
    each = [unit for unit in units(one.config, MOE) if unit.experts]
    peaks = [
        peak_bytes(lambda unit=unit: a_solver(one, recipe).solve(unit, shared_scale(one, recipe)))
        for unit in (*each, together)
    ]
    packed = sum(t.nbytes for t in solve(one, recipe, [together])[0].values())
    assert peaks[-1] <= max(peaks[:-1]) + packed


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_what_no_rule_quantizes_is_passed_on_and_never_whole_in_float32(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, recipe = a_layer(layer), a_recipe({"weights": "source"})
    monkeypatch.setattr(OriginalLayer, "weight", None)
    packed, account, _ = solve(one, recipe)
    for spec in linears(one.config, layer):
        assert packed[spec.name] is one.source[spec.name].data
    assert not account.errors
    assert set(account.tokens) == {spec.module for spec in linears(one.config, layer)}


def test_one_input_is_inverted_once_for_all_that_damp_it_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """q_a and kv_a are of different shapes; under `all`, every expert has the layer's input."""
    one = a_layer(MOE)
    inverted: list[int] = []

    def counted(gram: Tensor, *args: Any, **kwargs: Any) -> Factor:
        inverted.append(len(gram))
        return inverse_factor(gram, *args, **kwargs)

    monkeypatch.setattr("quant_jobs.workers.unit_solver.inverse_factor", counted)
    solve(one, a_recipe(GPTQ), units(one.config, MOE)[:1])
    assert inverted == [256]
    inverted.clear()
    solve(one, a_recipe(GPTQ, policy="all"), [u for u in units(one.config, MOE) if u.mlps])
    hidden_size, intermediate = one.config.hidden_size, one.config.moe_intermediate_size
    assert sorted(inverted) == sorted([*[intermediate] * 9, hidden_size])


def test_one_input_damped_in_two_ways_serves_both() -> None:
    """The first must leave the second its matrix."""
    one = a_layer(DENSE)
    more = GPTQ | {"damping": 0.1}
    up = f"model.layers.{DENSE}.mlp.up_proj"
    mixed, _, _ = solve(one, a_recipe(GPTQ, {"match": up, **more}))
    wanted, _, _ = solve(one, a_recipe(more))
    found, scheme = restore(one, mixed, up, Scheme(**more)), Scheme(**more)
    # Alone it is a product of another shape than stacked with its gate.
    assert (found != restore(one, wanted, up, scheme)).float().mean() < 0.01


def test_schemes_may_differ_from_one_linear_to_the_next() -> None:
    """Experts whose gate or up is not GPTQ's fit in no batch of pairs."""
    one = a_layer(MOE)
    rules = (
        GPTQ,
        {"match": "*.experts.1.up_proj", **PLAIN},
        {"match": "*.experts.2.gate_proj", "weights": "int8", "algorithm": "gptq"},
        {"match": "*.experts.3.*", "weights": "bf16"},
        {"match": "*kv_a_proj_with_mqa", "weights": "int8"},
    )
    recipe = a_recipe(*rules)
    schemes = recipe.resolve(one.config)
    packed, account, _ = solve(one, recipe, [all_experts(one)])
    whole, _, _ = solved(MOE, a_recipe(GPTQ))
    for expert in (0, 1, 2, 4):
        for role in MLP_ROLES:
            module = f"{one.block(expert)}.{role}"
            if schemes[module] != Scheme(**GPTQ):
                continue
            found = restore(one, packed, module, Scheme(**GPTQ))
            wanted = restore(one, whole, module, Scheme(**GPTQ))
            assert (found != wanted).float().mean() < 0.01, module
    assert torch.equal(
        restore(one, packed, f"{one.block(1)}.up_proj", Scheme(**PLAIN)),
        nearest(one, f"{one.block(1)}.up_proj", Scheme(**PLAIN)),
    )
    carried = f"{one.block(3)}.up_proj"
    assert torch.equal(packed[f"{carried}.weight"], one.source[f"{carried}.weight"].data)
    assert carried not in account.errors


@pytest.mark.parametrize("rule", [GPTQ, AWQ, PLAIN, SMOOTH], ids=["gptq", "awq", "max", "smooth"])
@pytest.mark.parametrize("role", ["mlp.experts.4.down_proj", "mlp.experts.2.up_proj"])
def test_a_damaged_weight_is_refused_by_its_own_name(role: str, rule: dict[str, Any]) -> None:
    whole, recipe = a_layer(MOE), a_recipe(rule)
    name = f"model.layers.{MOE}.{role}.weight"
    broken = whole.source[name].data.clone()
    broken[3, 3] = float("nan")
    damaged = SourceTensor(whole.source[name].spec, broken)
    one = replace(whole, source=whole.source | {name: damaged})
    shared = shared_scale(whole, recipe)
    solver = a_solver(one, recipe)
    (unit,) = [u for u in units(one.config, MOE) if name.removesuffix(".weight") in u.modules]
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        solver.solve(unit, shared)


def test_a_damaged_activation_is_refused_with_its_block() -> None:
    whole = a_layer(MOE)
    z = whole.blocks[2][1].z.clone()
    z[7, 7] = float("inf")
    blocks = [*whole.blocks[:2], (2, replace(whole.blocks[2][1], z=z)), whole.blocks[3]]
    one = replace(whole, blocks=blocks)
    with pytest.raises(CheckpointError, match="not finite on calibration block 2"):
        solve(one, a_recipe(PLAIN))


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name

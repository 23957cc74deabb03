"""Folding: the same function with the scales inside norms, router and rows; and which sets there
are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family import family_model
from support.synthetic import V3_2, config_dict, write_checkpoint
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, RecipeError
from deepseek.inventory import ATTENTION_ROLES, layer_tensors
from deepseek.recipe import Scheme, load_recipe, parse_recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.folding import (
    FoldingGroup,
    ScaleMethod,
    Smoothing,
    foldable,
    folding_groups,
    scaled_groups,
)
from quant_jobs.calibration.forward import ExpertOutputs, Rotary, Trunk, run_expert

AWQ: dict[str, Any] = {"weights": "int4", "group_size": 32, "algorithm": "awq"}
SMOOTH: dict[str, Any] = {"weights": "int8", "activations": "int8", "algorithm": "smoothquant"}
PLAIN: dict[str, Any] = {"weights": "int4", "group_size": 32}
KEPT: dict[str, Any] = {"weights": "source"}
#: The linears that no smoothing scale reaches where layers have an indexer.
NOT_SMOOTHED = {"q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"}


def random_scale(num_channels: int, seed: int) -> Tensor:
    """f32 [K], log-uniform between 1/16 and 16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num_channels, generator=generator) * 8 - 4).exp2()


def stored_layer(reader: CheckpointReader, layer: int) -> dict[str, Tensor]:
    """What is folded, as it is folded: linears restored to float32, the rest as it is stored."""
    return {
        name: tensor.dequantize() if tensor.spec.kind == "linear" else tensor.data
        for name, tensor in reader.read_layer(layer).items()
    }


def fold_all(config: ModelConfig, layer: int, weights: dict[str, Tensor]) -> Smoothing:
    """Every set of the layer with an arbitrary vector, made foldable."""
    smoothing = Smoothing()
    for seed, one in enumerate(folding_groups(config, layer)):
        divided = weights[one.divided]
        scale = random_scale(len(divided), seed)
        norm = divided if divided.ndim == 1 else None
        smoothing.add(one, foldable(scale, norm, one.router is not None))
    return smoothing


def run_layer(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], x_TD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The layer's output f32 [T, D], and the experts that the router chose, int64 [T, k]."""
    specs = [spec for spec in layer_tensors(config, layer) if not spec.is_indexer]
    linears = {spec.module for spec in specs if spec.kind == "linear"}
    weights = {spec.name: weights[spec.name] for spec in specs}
    prefix = f"model.layers.{layer}.mlp.experts"
    high = {n: t for n, t in weights.items() if n.removesuffix(".weight") not in linears}
    trunk = Trunk(config, layer, high, lambda module: weights[f"{module}.weight"])
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    parts = {}
    for expert in range(config.n_routed_experts if trunk.is_moe else 0):
        roles = ("gate_proj", "up_proj", "down_proj")
        mine = {role: weights[f"{prefix}.{expert}.{role}.weight"] for role in roles}
        if (rows := run_expert(routed, expert, mine, {})) is not None:
            parts[expert] = rows
    return trunk.combine(h_TD, routed, [ExpertOutputs(parts)]), routed.experts


@pytest.mark.parametrize("layer", [0, 1])
def test_a_folded_layer_computes_the_same_function(tiny_model: Path, layer: int) -> None:
    assert_same_function(CheckpointReader(tiny_model), layer)


@pytest.mark.parametrize("layer", [0, 1])
def test_so_does_one_whose_queries_have_no_latent(
    layer: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The norm before the attention serves q_proj and kv_a."""
    reader = CheckpointReader(family_model("moonlight", tmp_path_factory.getbasetemp()).directory)
    first, *_ = folding_groups(reader.config, layer)
    prefix = f"model.layers.{layer}"
    attention = (f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn.kv_a_proj_with_mqa")
    assert (first.divided, first.consumers) == (f"{prefix}.input_layernorm.weight", attention)
    assert first.measured == attention[0]
    assert_same_function(reader, layer)


def assert_same_function(reader: CheckpointReader, layer: int) -> None:
    weights = stored_layer(reader, layer)
    x_TD = torch.randn(96, reader.config.hidden_size, generator=torch.Generator().manual_seed(4))
    smoothing = fold_all(reader.config, layer, weights)
    folded = {name: smoothing.fold(name, tensor) for name, tensor in weights.items()}
    changed = {n for n in weights if not torch.equal(folded[n], weights[n])}
    assert len(changed) > 8
    assert not any("o_proj" in name or "bias" in name for name in changed)
    assert all(folded[name].dtype == weights[name].dtype for name in weights)
    wanted, chosen = run_layer(reader.config, layer, weights, x_TD)
    found, now_chosen = run_layer(reader.config, layer, folded, x_TD)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    if chosen is not None and now_chosen is not None:
        assert torch.equal(now_chosen, chosen)


@pytest.mark.parametrize("layer", [0, 1])
def test_beside_an_indexer_folding_leaves_the_norms_that_it_reads_to_the_bit(
    tmp_path: Path, layer: int
) -> None:
    """They cannot take 1/s, because wq_b, wk and weights_proj read what they make."""
    write_checkpoint(tmp_path, **V3_2)
    reader = CheckpointReader(tmp_path)
    weights = stored_layer(reader, layer)
    smoothing = fold_all(reader.config, layer, weights)
    folded = {name: smoothing.fold(name, tensor) for name, tensor in weights.items()}
    prefix = f"model.layers.{layer}."
    same = {n.removeprefix(prefix) for n in weights if torch.equal(folded[n], weights[n])}
    assert same == {
        *("input_layernorm.weight", "self_attn.q_a_layernorm.weight"),
        *(f"self_attn.{role}.weight" for role in ATTENTION_ROLES if role in NOT_SMOOTHED),
        *(n.removeprefix(prefix) for n in weights if ".indexer." in n or "bias" in n),
    }
    x_TD = torch.randn(64, reader.config.hidden_size, generator=torch.Generator().manual_seed(4))
    wanted, _ = run_layer(reader.config, layer, weights, x_TD)
    found, _ = run_layer(reader.config, layer, folded, x_TD)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("rule", [AWQ, SMOOTH], ids=["awq", "smoothquant"])
def test_beside_an_indexer_its_fellow_readers_are_left_alone_as_o_proj_is(
    rule: dict[str, Any],
) -> None:
    config = ModelConfig.from_dict(config_dict(**V3_2))
    schemes = resolve(config, rule)
    for layer in (0, 1):
        scaled = {m for group, _ in scaled_groups(config, schemes, layer) for m in group.consumers}
        linears = {s.module for s in layer_tensors(config, layer) if s.kind == "linear"}
        alone = {m.rpartition(".")[2] for m in linears - scaled if ".indexer." not in m}
        assert alone == NOT_SMOOTHED
        assert not any(".indexer." in module for module in scaled)


def test_router_logits_are_the_same_to_the_bit(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    weights = stored_layer(reader, 1)
    smoothing = fold_all(reader.config, 1, weights)
    norm, gate = (f"model.layers.1.{n}.weight" for n in ("post_attention_layernorm", "mlp.gate"))
    folded = {name: smoothing.fold(name, weights[name]) for name in (norm, gate)}
    assert all(folded[name].dtype == torch.bfloat16 for name in folded)
    assert not torch.equal(folded[gate], weights[gate])
    x_TD = torch.randn(64, reader.config.hidden_size, generator=torch.Generator().manual_seed(5))
    before = (x_TD * weights[norm].float()) @ weights[gate].float().T
    after = (x_TD * folded[norm].float()) @ folded[gate].float().T
    assert torch.equal(after, before)


def test_a_norm_takes_any_scale_and_gives_back_the_one_it_could_hold() -> None:
    norm = torch.randn(512, generator=torch.Generator().manual_seed(6)).bfloat16()
    norm[7] = 0.0
    scale = random_scale(512, 7)
    effective = foldable(scale, norm, has_router=False)
    folded = Smoothing(rows={"n": effective}).fold("n", norm)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, (norm.float() / scale).bfloat16())
    torch.testing.assert_close(folded.double() * effective, norm.double(), rtol=2**-23, atol=0.0)
    alive = norm != 0
    assert ((effective / scale)[alive].log2().abs() <= 2.0**-8 * 1.5).all()
    assert (effective[alive].log2() % 1 != 0).any()  # finer than powers of two
    assert effective[7] == 1.0
    assert torch.equal(foldable(torch.ones(512), norm, has_router=False), torch.ones(512))


def test_many_candidates_fold_at_once_as_each_alone() -> None:
    norm = torch.rand(64, generator=torch.Generator().manual_seed(8)).bfloat16()
    scales = torch.stack([random_scale(64, seed) for seed in range(3)])
    for divided, has_router in ((norm, False), (norm, True), (None, False)):
        together = foldable(scales, divided, has_router)
        for scale, row in zip(scales, together, strict=True):
            assert torch.equal(row, foldable(scale, divided, has_router))


def test_with_a_router_scales_are_the_nearest_powers_of_two() -> None:
    scale = torch.tensor([1.0, 0.3, 3.0, 1000.0, 2.0**-10])
    found = foldable(scale, torch.ones(5).bfloat16(), has_router=True)
    assert found.tolist() == [1.0, 0.25, 4.0, 1024.0, 2.0**-10]


def test_rows_of_a_quantized_weight_take_the_scale_as_it_is() -> None:
    scale = random_scale(32, 9)
    assert torch.equal(foldable(scale, None, has_router=False), scale)


def test_a_norm_that_cannot_hold_the_scale_is_our_bug() -> None:
    smoothing = Smoothing(rows={"n": torch.full((8,), 3.0)})
    with pytest.raises(AssertionError, match="n: folding is not exact"):
        smoothing.fold("n", torch.ones(8, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [60000.0, -60000.0, 1.1e-5])
def test_a_value_that_smoothing_moves_out_of_float16_is_refused_by_name(value: float) -> None:
    norm = torch.full((8,), 0.5, dtype=torch.float16)
    scale = torch.ones(8)
    norm[3], scale[3] = value, 2.0**-10 if abs(value) > 1 else 2.0**10
    smoothing = Smoothing(rows={"a.norm": scale})
    with pytest.raises(CheckpointError, match="tensor a.norm has a value so large or small that"):
        smoothing.fold("a.norm", norm)
    assert smoothing.fold("a.norm", norm.bfloat16()).float()[3] == norm.bfloat16()[3] / scale[3]


def test_subnormal_values_of_bfloat16_are_folded_as_well_as_they_can_be() -> None:
    norm = torch.tensor([1.0, 1e-40, -0.0], dtype=torch.bfloat16)
    folded = Smoothing(rows={"n": torch.full((3,), 1024.0)}).fold("n", norm)
    assert folded[0] == 2.0**-10
    assert abs(float(folded[1])) < 1e-40
    assert folded[2] == 0


def test_a_scale_that_no_norm_can_take_stays_positive() -> None:
    norm = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    assert foldable(torch.tensor([2.0**-10, 2.0]), norm, has_router=False).tolist() == [2**-10, 2.0]


def test_what_is_in_no_set_is_returned_as_it_is() -> None:
    tensor = torch.ones(4)
    assert Smoothing().fold("o_proj", tensor) is tensor


@pytest.mark.parametrize("layer", [0, 1])
def test_the_sets_cover_every_linear_but_o_proj_once(tiny_model: Path, layer: int) -> None:
    config = ModelConfig.from_directory(tiny_model)
    sets = folding_groups(config, layer)
    consumers = [name for one in sets for name in one.consumers]
    specs = list(layer_tensors(config, layer))
    linears = {spec.module for spec in specs if spec.kind == "linear"}
    assert sorted(consumers) == sorted(linears - {f"model.layers.{layer}.self_attn.o_proj"})
    assert {one.divided for one in sets} <= {spec.name for spec in specs}
    assert len({one.divided for one in sets}) == len(sets)


def resolve(config: ModelConfig, *rules: dict[str, Any]) -> dict[str, Scheme]:
    content = load_recipe("int8").model_dump(mode="json")
    content["rules"] = [{"match": "*", **rules[0]}, *rules[1:]]
    return parse_recipe(content, where="test").resolve(config)


def wanted_of(config: ModelConfig, layer: int, *rules: dict[str, Any]) -> dict[str, ScaleMethod]:
    """Divided tensor, without the layer's prefix -> how."""
    found = scaled_groups(config, resolve(config, *rules), layer)
    return {one.divided.removeprefix(f"model.layers.{layer}."): how for one, how in found}


def test_a_whole_layer_is_awqs_or_smoothquants(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    every: list[FoldingGroup] = folding_groups(config, 1)
    for rule, how in ((AWQ, ScaleMethod("awq")), (SMOOTH, ScaleMethod("smoothquant", 0.5))):
        found = scaled_groups(config, resolve(config, rule), 1)
        assert found == [(one, how) for one in every]
    assert scaled_groups(config, resolve(config, PLAIN), 1) == []


def test_awq_leaves_out_what_it_cannot_scale_as_a_whole(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    # Experts only: the shared expert keeps its FP8 blocks and reads the same norm.
    experts = wanted_of(config, 1, KEPT, {"match": "*.mlp.experts.*", **AWQ})
    assert set(experts) == {f"mlp.experts.{expert}.up_proj.weight" for expert in range(16)}
    assert set(experts.values()) == {ScaleMethod("awq")}
    # Another algorithm for one consumer is no reason to refuse either.
    mixed = wanted_of(config, 1, AWQ, {"match": "*kv_a_proj_with_mqa", **PLAIN})
    assert "input_layernorm.weight" not in mixed
    assert "self_attn.q_a_layernorm.weight" in mixed
    # Nobody can divide the rows of an up_proj that is only carried through.
    down = wanted_of(config, 1, KEPT, {"match": "*.mlp.experts.*.down_proj", **AWQ})
    assert down == {}
    # One that is quantized in any way can.
    both = wanted_of(config, 0, PLAIN, {"match": "*.down_proj", **AWQ})
    assert both == {"mlp.up_proj.weight": ScaleMethod("awq")}


def test_awq_and_smoothquant_may_share_a_layer_but_not_a_set(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    found = wanted_of(config, 0, SMOOTH, {"match": "*.down_proj", **AWQ})
    assert found["mlp.up_proj.weight"] == ScaleMethod("awq")
    assert found["input_layernorm.weight"] == ScaleMethod("smoothquant", 0.5)
    with pytest.raises(RecipeError, match=r"up_proj share .* smoothing 0\.5 and AWQ; give both"):
        wanted_of(config, 0, SMOOTH, {"match": "*.up_proj", **AWQ})
    with pytest.raises(RecipeError, match=r"q_a_proj and .* AWQ and smoothing 0\.5; give both"):
        wanted_of(config, 0, AWQ, {"match": "*.kv_a_proj_with_mqa", **SMOOTH})


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (
            [{"match": "*q_a_proj", "weights": "int8"}],
            ["q_a_proj", "kv_a_proj_with_mqa", "no smoothing", "smoothing 0.5"],
        ),
        (
            [{"match": "*.3.mlp.experts.9.up_proj", "weights": "int8", "activations": "int8"}],
            ["layers.3.mlp.experts.0.gate_proj", "layers.3.mlp.experts.9.up_proj"],
        ),
        (
            [{"match": "*shared_experts.gate_proj", **SMOOTH, "smoothing": 0.7}],
            ["shared_experts.gate_proj", "smoothing 0.7"],
        ),
        (
            [{"match": "*", **KEPT}, {"match": "*.0.mlp.down_proj", **SMOOTH}],
            ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "FP8"],
        ),
    ],
)
def test_a_recipe_that_smooths_part_of_a_set_is_refused(
    tiny_model: Path, rules: list[dict[str, Any]], named: list[str]
) -> None:
    config = ModelConfig.from_directory(tiny_model)
    with pytest.raises(RecipeError) as refused:
        [wanted_of(config, layer, SMOOTH, *rules) for layer in range(config.num_hidden_layers)]
    for words in named:
        assert words in str(refused.value)

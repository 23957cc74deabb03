"""The inventory is the checkpoint: same names, same counts, same bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.synthetic import config_dict
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from deepseek.config import ModelConfig
from deepseek.inventory import (
    ATTENTION_ROLES,
    FUSED,
    LATENT_READER,
    MLP_ROLES,
    LinearInput,
    count_parameters,
    expert_of,
    global_tensors,
    group_of,
    input_key,
    layer_inputs,
    layer_of,
    layer_tensors,
    linears,
    tensors,
)
from deepseek.models import DEEPSEEK_V3, DEEPSEEK_V3_2, MODELS, MOONLIGHT
from deepseek.source.checkpoint import expected_source


@pytest.fixture(scope="module")
def release() -> list:  # type: ignore[type-arg]
    return list(tensors(DEEPSEEK_V3))


def test_deepseek_v3_has_671_billion_parameters() -> None:
    assert round(count_parameters(DEEPSEEK_V3) / 1e9, 1) == 671.0
    # The release's README gives the MTP module 14 B: 11.6 B of its own, and copies of embedding
    # (0.9 B) and head (0.9 B), which the checkpoint stores again.
    assert round(count_parameters(DEEPSEEK_V3, with_mtp=True) / 1e9, 1) == 684.5


def test_the_release_has_as_many_tensors_and_bytes_as_published() -> None:
    """163 shards of 688 586 727 753 bytes on the Hub, of which the headers take about 12 MB."""
    expected = expected_source(DEEPSEEK_V3)
    num_bytes = 0
    for name, (shape, dtypes) in expected.items():
        bias = name.endswith("e_score_correction_bias")
        dtype = torch.float32 if bias else dtypes[0]
        num_bytes += torch.Size(shape).numel() * dtype.itemsize
    published = 688_586_727_753
    assert 0 < published - num_bytes < 150 * len(expected)


def test_97_percent_of_the_parameters_are_routed_experts(release: list) -> None:  # type: ignore[type-arg]
    by_group: Counter[str] = Counter()
    for spec in release:
        by_group[spec.group] += spec.numel
    total = sum(count for group, count in by_group.items() if group != "mtp")
    assert by_group["routed_experts"] / total == pytest.approx(0.975, abs=0.001)
    assert set(by_group) == {
        "routed_experts",
        "shared_experts",
        "attention",
        "dense_mlp",
        "embeddings",
        "router",
        "norms",
        "mtp",
    }


def test_names_are_unique_and_layers_partition_them(release: list) -> None:  # type: ignore[type-arg]
    names = [spec.name for spec in release]
    assert len(set(names)) == len(names)
    parts = [spec.name for spec in global_tensors(DEEPSEEK_V3)]
    for layer in range(DEEPSEEK_V3.num_layers_with_mtp):
        parts += [spec.name for spec in layer_tensors(DEEPSEEK_V3, layer)]
    assert sorted(parts) == sorted(names)


def test_the_example_models_index_holds_exactly_the_inventory(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    index = json.loads((tiny_model / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected_source(config))


def test_shapes_are_those_of_transformers_own_model() -> None:
    """Up to the MTP layer, which it lacks, and the experts, which it fuses."""
    raw = config_dict(layers=3, fp8=False, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**raw))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = ModelConfig.from_dict(raw)
    fused: Counter[str] = Counter()
    for spec in tensors(config):
        if spec.expert is None:
            assert theirs.pop(spec.name) == spec.shape, spec.name
        else:
            fused[f"model.layers.{spec.layer}.mlp.experts"] += spec.numel
    for name, shape in theirs.items():
        fused[name.rpartition(".")[0]] -= torch.Size(shape).numel()
    assert set(fused.values()) == {0}
    assert len(fused) == 2


def test_linears_are_what_fp8_blocks_of_the_release_cover(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    index = json.loads((tiny_model / "model.safetensors.index.json").read_text())
    scaled = {n.removesuffix("_scale_inv") for n in index["weight_map"] if "_scale_inv" in n}
    modules = {
        spec.name for layer in range(config.num_layers_with_mtp) for spec in linears(config, layer)
    }
    assert modules == scaled


def test_router_norms_embeddings_and_head_are_never_linears(release: list) -> None:  # type: ignore[type-arg]
    for spec in release:
        if spec.kind == "linear":
            assert spec.role.endswith(("_proj", "_proj_with_mqa")), spec.name
            assert spec.role != "eh_proj"
            assert len(spec.shape) == 2
    bias = [spec for spec in release if spec.kind == "float32"]
    assert len(bias) == 59
    assert all(spec.name.endswith("mlp.gate.e_score_correction_bias") for spec in bias)


def test_splits_follow_the_direction_of_each_linear(release: list) -> None:  # type: ignore[type-arg]
    split = {}
    for spec in release:
        if spec.layer in (0, 3) and spec.expert in (None, 0) and spec.kind == "linear":
            split[spec.module.removeprefix(f"model.layers.{spec.layer}.")] = spec.split
    replicated = {name for name, direction in split.items() if direction == "replicated"}
    assert replicated == {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}
    assert split["self_attn.o_proj"] == split["mlp.down_proj"] == "row"
    assert split["self_attn.kv_b_proj"] == split["mlp.shared_experts.up_proj"] == "column"
    assert split["mlp.experts.0.gate_proj"] == split["mlp.experts.0.down_proj"] == "expert"


def test_a_model_without_dense_layers_or_mtp_has_neither() -> None:
    config = ModelConfig.from_dict(
        config_dict(first_k_dense_replace=0, num_nextn_predict_layers=0, layers=2)
    )
    groups = {spec.group for spec in tensors(config)}
    assert "dense_mlp" not in groups
    assert "mtp" not in groups
    assert count_parameters(config) == count_parameters(config, with_mtp=True)


def as_rows(inputs: list[LinearInput], prefix: str) -> list[tuple[object, ...]]:
    """(readers, maker, fused name, width), names below `prefix`."""

    def below(name: str | None) -> str | None:
        return None if name is None else name.removeprefix(prefix)

    return [
        (tuple(below(m) for m in i.modules), below(i.maker), below(i.fused), i.width)
        for i in inputs
    ]


ATTENTION_INPUTS = [
    (
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "input_layernorm.weight",
        "self_attn.qkv_a_proj",
        7168,
    ),
    (("self_attn.q_b_proj",), "self_attn.q_a_layernorm.weight", None, 1536),
    (("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm.weight", None, 512),
    (("self_attn.o_proj",), None, None, 128 * 128),
]


def mlp_inputs(mlp: str, width: int) -> list[tuple[object, ...]]:
    into, fused = (f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{mlp}.gate_up_proj"
    return [
        (into, "post_attention_layernorm.weight", fused, 7168),
        ((f"{mlp}.down_proj",), f"{mlp}.up_proj.weight", None, width),
    ]


def test_the_inputs_of_a_dense_layer_of_deepseek_v3() -> None:
    rows = as_rows(layer_inputs(DEEPSEEK_V3, 0), "model.layers.0.")
    assert rows == ATTENTION_INPUTS + mlp_inputs("mlp", 18432)


def test_the_inputs_of_a_moe_layer_of_deepseek_v3() -> None:
    """The MTP layer's decoder is one too; its eh_proj is no linear that a recipe may quantize."""
    for layer in (3, 60, 61):
        rows = as_rows(layer_inputs(DEEPSEEK_V3, layer), f"model.layers.{layer}.")
        experts = [mlp_inputs(f"mlp.experts.{expert}", 2048) for expert in range(256)]
        shared = mlp_inputs("mlp.shared_experts", 2048)
        assert rows == ATTENTION_INPUTS + sum(experts, []) + shared


@pytest.mark.parametrize("layer", [0, 3, 61])
def test_every_linear_reads_one_input_and_readers_agree_on_it(layer: int) -> None:
    inputs = layer_inputs(DEEPSEEK_V3, layer)
    readers = [spec for linear_input in inputs for spec in linear_input.readers]
    every = linears(DEEPSEEK_V3, layer)
    assert sorted(spec.name for spec in readers) == sorted(spec.name for spec in every)
    shapes = {spec.name: spec.shape for spec in layer_tensors(DEEPSEEK_V3, layer)}
    for linear_input in inputs:
        for spec in linear_input.readers:
            assert input_key(spec.module) == linear_input.name == linear_input.modules[0]
            assert (spec.input_maker, spec.parent) == (linear_input.maker, linear_input.parent)
            assert spec.expert == linear_input.expert
            assert linear_input.is_attention == spec.parent.endswith(".self_attn")
            assert spec.shape[1] == linear_input.width
        if linear_input.maker is not None:  # its elements or rows are the channels
            assert shapes[linear_input.maker][0] == linear_input.width


def test_the_router_reads_what_the_experts_read() -> None:
    maker = {spec.role: spec.input_maker for spec in layer_tensors(DEEPSEEK_V3, 3)}
    assert maker["gate"] == "model.layers.3.post_attention_layernorm.weight"
    others = [
        spec
        for spec in tensors(DEEPSEEK_V3)
        if spec.kind != "linear" and spec.input_maker is not None
    ]
    assert len(others) == 59
    assert all(spec.name.endswith("mlp.gate.weight") for spec in others)


def test_fused_roles_are_the_readers_of_one_input() -> None:
    assert FUSED == {
        "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    for linear_input in layer_inputs(DEEPSEEK_V3, 3):
        if linear_input.fused is not None:
            roles = tuple(spec.role for spec in linear_input.readers)
            assert roles == FUSED[linear_input.fused.rpartition(".")[2]]


@pytest.mark.parametrize(
    ("module", "layer", "group", "expert", "input_name"),
    [
        ("model.layers.0.mlp.up_proj", 0, "dense_mlp", None, "model.layers.0.mlp.gate_proj"),
        ("model.layers.2.mlp.down_proj", 2, "dense_mlp", None, "model.layers.2.mlp.down_proj"),
        (
            "model.layers.13.self_attn.kv_a_proj_with_mqa",
            13,
            "attention",
            None,
            "model.layers.13.self_attn.q_a_proj",
        ),
        (
            "model.layers.3.self_attn.o_proj",
            3,
            "attention",
            None,
            "model.layers.3.self_attn.o_proj",
        ),
        (
            "model.layers.60.mlp.experts.255.up_proj",
            60,
            "routed_experts",
            255,
            "model.layers.60.mlp.experts.255.gate_proj",
        ),
        (
            "model.layers.4.mlp.shared_experts.up_proj",
            4,
            "shared_experts",
            None,
            "model.layers.4.mlp.shared_experts.gate_proj",
        ),
    ],
)
def test_what_a_modules_name_says(
    module: str, layer: int, group: str, expert: int | None, input_name: str
) -> None:
    assert layer_of(module) == layer
    assert group_of(module) == group
    assert expert_of(module) == expert
    assert input_key(module) == input_name


@pytest.mark.parametrize(
    ("name", "parameters", "with_mtp"),
    [
        ("deepseek-v3", 671_026_419_200, 684_489_845_504),
        ("deepseek-v3.2", 671_877_944_064, 685_355_329_792),
        ("kimi-k2", 1_026_408_232_448, 1_026_408_232_448),
        ("moonlight", 15_960_110_208, 15_960_110_208),
    ],
)
def test_models_of_the_family_have_their_published_number_of_parameters(
    name: str, parameters: int, with_mtp: int
) -> None:
    assert count_parameters(MODELS[name]) == parameters
    assert count_parameters(MODELS[name], with_mtp=True) == with_mtp


def test_without_a_query_latent_one_linear_makes_the_queries() -> None:
    """Its input is that of kv_a, with which engines do not fuse it."""
    first, *_ = layer_inputs(MOONLIGHT, 0)
    assert [spec.role for spec in first.readers] == ["q_proj", "kv_a_proj_with_mqa"]
    assert first.readers[0].shape == (16 * 192, 2048)
    assert first.name == "model.layers.0.self_attn.q_proj"
    assert first.maker == "model.layers.0.input_layernorm.weight"
    assert first.fused is None
    assert len({input_key(module) for module in first.modules}) == 1


def test_an_indexer_is_carried_and_nothing_is_folded_into_what_it_reads() -> None:
    specs = {spec.name: spec for spec in layer_tensors(DEEPSEEK_V3_2, 3)}
    indexer = {name.rpartition("indexer.")[2]: s for name, s in specs.items() if s.is_indexer}
    assert {name: (spec.shape, spec.kind) for name, spec in indexer.items()} == {
        "wq_b.weight": ((8192, 1536), "linear"),
        "wk.weight": ((128, 7168), "linear"),
        "k_norm.weight": ((128,), "float32"),
        "k_norm.bias": ((128,), "float32"),
        "weights_proj.weight": ((64, 7168), "high"),
    }
    assert all(spec.is_carried and spec.group == "indexer" for spec in indexer.values())
    inputs = layer_inputs(DEEPSEEK_V3_2, 3)
    assert not any(spec.is_indexer for each in inputs for spec in each.readers)
    makers = {each.readers[0].role: each.maker for each in inputs if each.is_attention}
    assert makers == {
        "q_a_proj": None,
        "q_b_proj": None,
        "kv_b_proj": "model.layers.3.self_attn.kv_a_layernorm.weight",
        "o_proj": None,
    }
    assert all(spec.group == "mtp" for spec in layer_tensors(DEEPSEEK_V3_2, 61))


def test_a_name_says_what_the_inventory_states(release: list) -> None:  # type: ignore[type-arg]
    for spec in release:
        if spec.kind == "linear":
            assert layer_of(spec.module) == spec.layer
            assert expert_of(spec.module) == expert_of(spec.parent) == spec.expert
            if spec.group != "mtp":
                assert group_of(spec.module) == group_of(spec.parent) == spec.group


def test_roles_are_those_of_the_linears_in_their_order() -> None:
    with_latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert set(ATTENTION_ROLES) == {*with_latent, "q_proj"}
    assert MLP_ROLES == ("gate_proj", "up_proj", "down_proj")
    for layer in (0, 3, 61):
        roles: dict[str, tuple[str, ...]] = {}
        for spec in linears(DEEPSEEK_V3, layer):
            roles[spec.parent] = (*roles.get(spec.parent, ()), spec.role)
        assert roles.pop(f"model.layers.{layer}.self_attn") == with_latent
        assert set(roles.values()) == {MLP_ROLES}
    (latent_input,) = (
        linear_input
        for linear_input in layer_inputs(DEEPSEEK_V3, 3)
        if linear_input.maker == "model.layers.3.self_attn.kv_a_layernorm.weight"
    )
    assert [spec.role for spec in latent_input.readers] == [LATENT_READER]

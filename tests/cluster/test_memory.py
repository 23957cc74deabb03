"""Bytes against what was published or computed by others, and against first principles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.plans import plan_v3, recipe_of

from cluster.choice import tally_of
from cluster.hardware import parse_hardware
from cluster.matrix import FORMATS, TARGETS
from cluster.memory import GROUPS, kv_bytes_per_token_and_layer
from cluster.plan import make_plan
from deepseek.config import ModelConfig
from deepseek.engine.kv_cache import token_bytes
from deepseek.formats import stored_bytes
from deepseek.inventory import tensors
from deepseek.kv_layout import kv_layout, layer_token_bytes
from deepseek.models import DEEPSEEK_V3, DEEPSEEK_V3_2
from deepseek.recipe import Recipe, load_recipe

EXPERTS = "model.layers.*.mlp.experts.*"
BF16 = {"match": "*", "weights": "bf16"}
INT4_EXPERTS = {"match": EXPERTS, "weights": "int4", "group_size": 128}

#: Total GB of weights, MTP excluded, embedding and head in BF16.
PUBLISHED = {
    "bf16": (recipe_of(BF16), 1342.0),
    "fp8": (recipe_of(), 673.1),
    "int8": (load_recipe("int8"), 673.4),
    "int8-weight-only": (load_recipe("int8-weight-only"), 673.4),
    "int4-experts-g32-bf16-rest": (recipe_of(BF16, INT4_EXPERTS | {"group_size": 32}), 402.0),
    "int4-experts-bf16-rest": (recipe_of(BF16, INT4_EXPERTS), 371.4),
    "int4-g64-asym": (recipe_of({"match": "*", "weights": "int4-asym", "group_size": 64}), 364.6),
    "int4": (load_recipe("int4"), 356.3),
    "int4-all": (load_recipe("int4-all"), 348.9),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", PUBLISHED)
def test_total_weights_agree_with_the_published_sizes_within_1_percent(name: str) -> None:
    recipe, published_gb = PUBLISHED[name]
    footprint = plan_v3(recipe, "8xH800-80GB").footprint
    assert footprint.weights / 1e9 == pytest.approx(published_gb, rel=0.01)


def test_int4_takes_44_to_47_gb_on_each_of_eight_gpus_and_more_where_the_embedding_is_whole() -> (
    None
):
    """TensorRT-LLM's DeepSeek model holds all 129280 x 7168 BF16 values of it on every GPU."""
    split = plan_v3("int4", "8xH800-80GB", target="vllm").footprint.weights_per_gpu
    assert 44e9 <= split <= 47e9
    whole = plan_v3("int4", "8xH800-80GB", target="trtllm").footprint.weights_per_gpu
    assert whole - split == 129280 * 7168 * 2 * 7 // 8


def test_tensorrt_llm_divides_a_dense_mlp_within_one_node_only() -> None:
    tally = tally_of(DEEPSEEK_V3, load_recipe("int4"))
    for tp, ways in ((4, 4), (8, 8), (16, 8), (32, 8)):
        dense = tally.gpu_footprint(tp, "bf16", target="trtllm").groups["dense_mlp"]
        assert dense.values_per_gpu * ways == dense.values


def test_the_mtp_layer_weighs_11_7_gb_and_counts_only_when_loaded() -> None:
    without = plan_v3("int4", "8xH800-80GB").footprint
    loaded = plan_v3("int4", "8xH800-80GB", mtp=True).footprint
    assert loaded.weights - without.weights == pytest.approx(11.7e9, rel=0.01)
    assert loaded.weights_per_gpu > without.weights_per_gpu
    assert loaded.kv_bytes_per_token * 61 == without.kv_bytes_per_token * 62


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
def test_the_lines_add_up_to_what_the_formats_store(name: str) -> None:
    schemes = load_recipe(name).resolve(DEEPSEEK_V3)
    want = 0
    for spec in tensors(DEEPSEEK_V3):
        if spec.group == "mtp":
            continue
        if spec.kind == "linear":
            want += stored_bytes(schemes[spec.module], spec.shape[0], spec.shape[1])
        else:
            want += spec.numel * (4 if spec.kind == "float32" else 2)
    plan = plan_v3(name, "8xH800-80GB")
    assert plan.footprint.weights == want
    assert sum(line.total_bytes for line in plan.lines if line.name != "mtp") == want


def test_tensor_parallelism_replicates_what_cannot_be_split() -> None:
    groups = {
        tp: tally_of(DEEPSEEK_V3, recipe_of(BF16)).gpu_footprint(tp, "bf16", target="vllm")
        for tp in (1, 8)
    }
    one, eight = groups[1].groups, groups[8].groups
    for name in ("router", "norms"):
        assert eight[name].values_per_gpu == one[name].values, name
    hidden, layers = DEEPSEEK_V3.hidden_size, 61
    copied = 2 * layers * hidden * (DEEPSEEK_V3.q_lora_rank + DEEPSEEK_V3.latent_dim)
    split = (one["attention"].values - copied) // 8
    assert eight["attention"].values_per_gpu == copied + split
    for name in ("routed_experts", "shared_experts", "dense_mlp", "embeddings"):
        assert eight[name].values_per_gpu * 8 == one[name].values, name


@pytest.mark.heavy
def test_scales_of_int8_down_projections_are_on_every_gpu() -> None:
    only = recipe_of(BF16)
    last = recipe_of(BF16, {"match": "*.shared_experts.down_proj", "weights": "int8"})
    assert plan_v3(only, "8xH800-80GB").footprint.groups["shared_experts"].scales == 0
    group = plan_v3(last, "8xH800-80GB").footprint.groups["shared_experts"]
    assert group.scales_per_gpu == group.scales > 0


def test_a_split_never_cuts_an_fp8_block() -> None:
    """The shared expert's 2048 columns are 16 blocks: at 32 GPUs each holds one block, twice."""
    tally = tally_of(DEEPSEEK_V3, recipe_of())
    at = {
        tp: tally.gpu_footprint(tp, "bf16", target="vllm").groups["shared_experts"]
        for tp in (16, 32)
    }
    assert at[16].values_per_gpu == at[32].values_per_gpu == at[16].values // 16


@pytest.mark.parametrize(
    ("target", "form", "size"),
    [
        *((target, "bf16", 1152) for target in TARGETS),
        *(("trtllm", "fp8", 576), ("sglang", "fp8", 576)),
        ("embedded", "int8", 644),
        ("transformers", "fp8", 1152),  # refused there; it would be BF16
    ],
)
def test_a_cached_token_takes_the_published_bytes_per_layer(
    target: str, form: str, size: int
) -> None:
    assert kv_bytes_per_token_and_layer(DEEPSEEK_V3, target, form) == size


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("target", ["trtllm", "vllm", "sglang"])
def test_a_plan_counts_the_bytes_of_its_target(target: str, form: str) -> None:
    plan = plan_v3(recipe_of(kv_cache=form), "16xH800-80GB", target=target)
    layout = kv_layout(target, form)
    assert layout == ("fp8-tensor" if form == "fp8" else form)
    assert plan.kv_layout == layout
    assert plan.footprint.kv_bytes_per_token == 61 * layer_token_bytes(layout, 512, 64)


@pytest.mark.heavy
@pytest.mark.parametrize(("form", "size"), [("bf16", 1152), ("fp8", 576)])
def test_deepseek_v3_2_caches_132_bytes_more_for_its_indexer_in_every_layer(
    form: str, size: int
) -> None:
    """128 dimensions in FP8 and one FP32 scale, as vLLM, SGLang and TensorRT-LLM cache them."""
    tally = tally_of(DEEPSEEK_V3_2, recipe_of())
    assert tally.gpu_footprint(8, form, target="sglang").kv_bytes_per_token == 61 * (size + 132)
    assert tally.gpu_footprint(8, form, mtp=True, target="sglang").kv_bytes_per_token == 62 * (
        size + 132
    )
    v3 = tally_of(DEEPSEEK_V3, recipe_of()).gpu_footprint(8, form, target="sglang")
    assert v3.kv_bytes_per_token == 61 * size
    # Its weights are whole on every GPU: wq_b and wk in FP8, k_norm in FP32, weights_proj in BF16.
    indexer = tally.gpu_footprint(8, form, target="sglang").groups["indexer"]
    values = 8192 * 1536 + 128 * 7168 + 4 * 2 * 128 + 2 * 64 * 7168
    assert indexer.values == indexer.values_per_gpu == 61 * values
    assert indexer.scales == indexer.scales_per_gpu == 61 * 4 * (64 * 12 + 56)
    # 4 T (h + 1) d for its queries and keys, and 512 MiB of scores at a time.
    more = tally.gpu_footprint(8, form, target="sglang").workspace_per_gpu - v3.workspace_per_gpu
    assert more == 4 * 8192 * 65 * 128 + 2**29


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_kv_bytes_are_those_of_the_embedded_cache(form: str, tiny_model: Path) -> None:
    for config in (DEEPSEEK_V3, ModelConfig.from_directory(tiny_model)):
        per_layer = kv_bytes_per_token_and_layer(config, "embedded", form)
        assert per_layer * config.num_hidden_layers == token_bytes(config, form)


def test_the_latent_cache_is_replicated_on_every_gpu() -> None:
    footprints = [plan_v3("int4", f"{n}xH800-80GB").footprint for n in (8, 16)]
    assert footprints[0].kv_bytes(1000) == footprints[1].kv_bytes(1000)


#: TensorRT-LLM's README: fewest GPUs for DeepSeek-V3 by GPU and format.
MINIMUM = {
    ("H100-80GB", "fp8"): 16,
    ("H100-80GB", "int4"): 8,
    ("H20-96GB", "fp8"): 8,
    ("H20-96GB", "int4"): 4,
    ("H20-141GB", "fp8"): 8,
    ("H20-141GB", "int4"): 4,
    ("H200-141GB", "fp8"): 8,
    ("H200-141GB", "int4"): 4,
}


@pytest.mark.parametrize(("gpu", "form"), MINIMUM)
def test_the_fewest_gpus_are_those_of_nvidias_table(gpu: str, form: str) -> None:
    recipe: Recipe | str = recipe_of() if form == "fp8" else "int4"
    fitting = [n for n in (1, 2, 4, 8, 16) if plan_v3(recipe, f"{n}x{gpu}", context=4096).fits]
    assert fitting[0] == MINIMUM[gpu, form]


def test_every_format_of_the_matrix_has_bytes(tiny_model: Path) -> None:
    """A format that a recipe can name but the planner cannot weigh would fail only for users."""
    config = ModelConfig.from_directory(tiny_model)
    sizes = {}
    for label in sorted(FORMATS):
        given = re.fullmatch(r"(.+?)(?:-g(\d+))?(-a8|-afp8)?", label)
        assert given is not None
        weights, group, inputs = given.groups()
        rule: dict[str, object] = {"match": EXPERTS, "weights": weights}
        rule |= {"group_size": int(group)} if group else {}
        rule |= {"activations": "fp8" if inputs == "-afp8" else "int8"} if inputs else {}
        plan = make_plan(config, recipe_of(rule), parse_hardware("4xH800-80GB"))
        assert {line.name for line in plan.lines} == {*GROUPS, "scales"} - {"indexer"}
        sizes[label] = plan.footprint.weights
    order = ["int4-g128", "int4-g64", "int4-g32", "int8", "bf16"]
    assert sorted(order, key=sizes.__getitem__) == order
    for more, than in (
        ("int4-asym-g128", "int4-g128"),
        ("int4-g128-afp8", "int4-g128"),
        ("int8-asym", "int8"),
    ):
        assert sizes[more] > sizes[than], (more, than)


@pytest.mark.heavy
def test_transformers_holds_everything_in_bf16_and_whole_layers() -> None:
    plan = plan_v3("int8-experts", "8xH200-141GB", target="transformers")
    values = 2 * sum(spec.numel for spec in tensors(DEEPSEEK_V3) if spec.group != "mtp")
    assert plan.footprint.weights == pytest.approx(values, rel=1e-5)
    assert plan.loads
    assert not plan.fits  # 1,342 GB on 1,128
    one, eight = (
        plan_v3("int8-experts", f"{n}xH200-141GB", target="transformers").footprint for n in (1, 8)
    )
    assert one.weights_per_gpu == one.weights
    assert eight.weights_per_gpu > one.weights / 8
    assert (one.kv_bytes_per_token, eight.kv_bytes_per_token) == (61 * 1152, 8 * 1152)

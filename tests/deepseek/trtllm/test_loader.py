"""The model of TensorRT-LLM's loader: what it reads, what a rank holds, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.trtllm_directories import (
    Dialect,
    edit_tensors,
    input_scale,
    make_artifact,
    make_source,
    redigest,
    write_directory,
)
from torch import Tensor

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.source.checkpoint import CheckpointReader
from deepseek.trtllm.check import check_engine
from deepseek.trtllm.loader import LoaderModel, LoaderRefusal
from deepseek.trtllm.loader_config import read_quant_config
from deepseek.trtllm.loader_decode import compare
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions

LAYOUTS = [(4, 4), (4, 1), (4, 2), (1, 1)]
VERSIONS = ["1.2.1", "1.3.0rc29"]
DIALECTS: tuple[Dialect, ...] = ("mixed", "single")
LAYER_1 = "model-layer-00001.safetensors"
EXPERTS = "model.layers.1.mlp.experts"


def load_all(model: LoaderModel) -> None:
    for rank in range(model.ranks.tp):
        for _ in model.load(rank):
            pass


def reading(artifact: ArtifactReader) -> Any:
    def reference(layer: LayerKey) -> Mapping[str, Tensor]:
        return artifact.read_globals() if layer == "globals" else artifact.read_layer(layer)

    return reference


@pytest.mark.parametrize("dialect", ["mixed", "single"])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_every_rank_holds_the_artifacts_values_and_nothing_is_left_unread(
    made: Path, artifact: ArtifactReader, dialect: str, tp: int, ep: int
) -> None:
    version = VERSIONS[ep % 4 == 0]
    model = LoaderModel(made / dialect, RankLayout(tp=tp, ep=ep), version)
    compared = compare(model, reading(artifact))
    held = [n for layer in (0, 1) for n in artifact.read_layer(layer)] + [*artifact.read_globals()]
    assert compared == len([name for name in held if not name.endswith("weight_shape")])
    assert model.unread() == []
    assert model.silent == {}


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_keys_are_read_as_often_as_ranks_need_them(made: Path, tp: int, ep: int) -> None:
    """Without values too: 3 input scales of each expert, two of which every rank reads."""
    model = LoaderModel(made / "mixed", RankLayout(tp=tp, ep=ep), "1.2.1", values=False)
    load_all(model)
    for key, times in model.reads.items():
        sharing = tp
        if ".experts." in key and not key.endswith(
            ("gate_proj.input_scale", "up_proj.input_scale")
        ):
            sharing = tp // ep
        assert times == sharing, key
    assert model.unread() == []


def test_a_run_without_values_counts_the_bytes_of_one_with_them(made: Path) -> None:
    layout = RankLayout(tp=4, ep=2)
    counted = LoaderModel(made / "single", layout, "1.2.1", values=False)
    loaded = LoaderModel(made / "single", layout, "1.2.1")
    load_all(counted)
    load_all(loaded)
    assert counted.loads == loaded.loads
    assert counted.reads == loaded.reads


def test_input_scales_are_rounded_as_the_runtime_rounds_them(made: Path) -> None:
    model = LoaderModel(made / "mixed", RankLayout(tp=4, ep=4), "1.2.1")
    experts = dict(model.load(3, 1))[EXPERTS]
    gate_up, down = (torch.tensor(input_scale(1, role)) for role in ("up_proj", "down_proj"))
    assert torch.equal(experts["fc31_alpha"], gate_up.expand(1, 1))
    assert torch.equal(experts["fc31_act_scale"], (1 / gate_up).bfloat16().expand(1, 256))
    rounded = down.bfloat16()
    assert torch.equal(experts["fc2_alpha"], rounded.float().expand(1, 1))
    assert torch.equal(experts["fc2_act_scale"], (1 / rounded).expand(1, 512, 1))


def test_the_largest_input_scale_of_all_experts_counts_for_gate_and_up_and_of_its_own_for_down(
    mixed: Path,
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for role in ("gate_proj", "down_proj"):
            tensors[f"{EXPERTS}.0.{role}.input_scale"].fill_(4.0)

    edit_tensors(mixed, LAYER_1, enlarge)
    model = LoaderModel(mixed, RankLayout(tp=4, ep=4), "1.2.1")
    first, second = (dict(model.load(rank, 1))[EXPERTS] for rank in (0, 1))
    assert first["fc31_alpha"].item() == second["fc31_alpha"].item() == 4.0
    assert first["fc2_alpha"].item() == 4.0
    assert second["fc2_alpha"].item() == pytest.approx(input_scale(1, "down_proj"), rel=4e-3)


def test_scales_of_512_inputs_are_interleaved_by_four(made: Path) -> None:
    """Runtime [experts, groups / f, rows * f]: f groups of a row side by side. 256 inputs have 2
    groups, an inner width of 512 has 4."""
    model = LoaderModel(made / "mixed", RankLayout(tp=4, ep=4), "1.2.1")
    experts = dict(model.load(2, 1))[EXPERTS]
    assert experts["fc31_weight_scale"].shape == (1, 1, 2 * 512 * 2)
    assert experts["fc2_weight_scale"].shape == (1, 1, 256 * 4)
    stored = model.checkpoint.peek(f"{EXPERTS}.2.down_proj.weight_scale_inv")
    assert torch.equal(experts["fc2_weight_scale"][0, 0, 4:8], stored[1])


def test_ranks_next_to_each_other_hold_other_experts(made: Path) -> None:
    """tp 4, ep 2: rank 1 has the second half of the experts, and the first half of each."""
    model = LoaderModel(made / "mixed", RankLayout(tp=4, ep=2), "1.2.1")
    experts = dict(model.load(1, 1))[EXPERTS]
    stored = model.checkpoint.peek(f"{EXPERTS}.2.up_proj.weight")
    assert torch.equal(experts["w3_w1_weight"][0, :256], stored[:256])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("tp", "ep"), [(4, 4), (2, 1)])
def test_an_fp8_release_loads_as_it_is(made: Path, version: str, tp: int, ep: int) -> None:
    """The newer loader makes kv_b_proj BF16."""
    source = CheckpointReader(made / "source")

    def reference(layer: LayerKey) -> Mapping[str, Tensor]:
        read = source.read_globals() if layer == "globals" else source.read_layer(layer)
        tensors: dict[str, Tensor] = {}
        for tensor in read.values():
            tensors[tensor.spec.name] = tensor.data
            if tensor.scale_inv is not None:
                tensors[f"{tensor.spec.module}.weight_scale"] = tensor.scale_inv
        return tensors

    model = LoaderModel(made / "source", RankLayout(tp=tp, ep=ep), version)
    compare(model, reference)
    assert model.unread() == []
    assert model.silent == {}
    kv_b = dict(model.load(0, 0))["model.layers.0.self_attn.kv_b_proj"]["weight"]
    assert kv_b.dtype == (torch.float8_e4m3fn if version == "1.2.1" else torch.bfloat16)


def test_mtp_layers_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    make_source(tmp_path, num_nextn_predict_layers=1, moe_intermediate_size=256)
    ranks = RankLayout(tp=2, ep=2)
    without = LoaderModel(tmp_path, ranks, "1.2.1", values=False)
    load_all(without)
    assert {key.split(".")[2] for key in without.unread()} == {"2"}
    model = LoaderModel(tmp_path, ranks, "1.2.1", values=False, mtp=True)
    load_all(model)
    copies = ["embed_tokens", "shared_head.head"]
    assert model.unread() == [f"model.layers.2.{name}.weight" for name in copies]
    assert model.silent == {}


def test_a_model_without_query_latent_is_read_under_its_own_names(tmp_path: Path) -> None:
    make_source(tmp_path, q_lora_rank=None, moe_intermediate_size=256)
    model = LoaderModel(tmp_path, RankLayout(tp=2, ep=2), "1.2.1", values=False)
    load_all(model)
    assert model.unread() == []
    assert model.reads["model.layers.0.self_attn.q_proj.weight"] == 2


SHAPES: list[tuple[dict[str, Any], tuple[int, int], str]] = [
    ({"q_lora_rank": 192}, (2, 2), "q_lora_rank is 192, no multiple of 128"),
    ({"qk_nope_head_dim": 64}, (2, 2), "qk_nope_head_dim is 64, no multiple of 128"),
    ({"v_head_dim": 64}, (2, 2), "v_head_dim is 64, no multiple of 128"),
    ({}, (8, 4), "each of 8 ranks would hold 192 rows or columns of model.layers.0"),
    ({}, (3, 3), "tp 3 does not divide the 8 attention heads"),
    ({"experts": 6}, (4, 4), "ep 4 does not divide the 6 experts of model.layers.1"),
    ({}, (4, 1), "each rank would hold 64 inner rows of model.layers.1.mlp.experts"),
]


@pytest.mark.parametrize(("changes", "layout", "sentence"), SHAPES)
def test_shapes_that_ranks_cannot_cut_are_refused(
    tmp_path: Path, changes: dict[str, Any], layout: tuple[int, int], sentence: str
) -> None:
    make_source(tmp_path, **{"moe_intermediate_size": 256, **changes})
    model = LoaderModel(tmp_path, RankLayout(tp=layout[0], ep=layout[1]), "1.2.1", values=False)
    with pytest.raises(LoaderRefusal, match=sentence):
        load_all(model)


def test_a_directory_that_holds_another_value_is_found_on_the_rank_that_loads_it(
    mixed: Path, artifact: ArtifactReader
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERTS}.3.down_proj.weight"][7, 200] ^= 0x10

    edit_tensors(mixed, LAYER_1, change)
    model = LoaderModel(mixed, RankLayout(tp=4, ep=2), "1.2.1")
    with pytest.raises(ArtifactError, match=r"rank 3 does not hold .*\.3\.down_proj.weight_packed"):
        compare(model, reading(artifact))


def test_a_type_that_is_converted_without_a_word_is_noted(mixed: Path) -> None:
    path = mixed / "quant_cfg.json"
    content = json.loads(path.read_text())
    del content["quantized_layers"]["model.layers.0.self_attn.o_proj"]
    path.write_text(json.dumps(content))
    model = LoaderModel(mixed, RankLayout(tp=4, ep=4), "1.2.1", values=False)
    load_all(model)
    key = "model.layers.0.self_attn.o_proj.weight"
    assert model.silent == {
        key: "is float8_e4m3fn and is converted to bfloat16 value by value, because quant_cfg.json "
        "does not list its module"
    }
    assert model.unread() == [f"{key}_scale_inv"]


def test_exclusions_mean_an_ancestor_to_the_newer_loader_only(mixed: Path) -> None:
    quantization = {
        "quant_algo": "FP8_BLOCK_SCALES",
        "exclude_modules": ["model.layers.0.mlp", "model.layers.1.self_attn.*"],
    }
    content = {"quantization": quantization}
    (mixed / "hf_quant_config.json").write_text(json.dumps(content))
    older, newer = (read_quant_config(mixed, version) for version in VERSIONS)
    assert older.gate_up("model.layers.0.mlp.gate_up_proj") == "fp8-block"
    assert newer.gate_up("model.layers.0.mlp.gate_up_proj") == "bf16"
    assert older.linear("model.layers.1.self_attn.o_proj") == "bf16"
    assert newer.excludes("model.layers.1.self_attn")
    assert not older.excludes("model.layers.1.self_attn")
    assert newer.linear("model.layers.10.self_attn.o_proj") == "fp8-block"


def test_a_version_that_nobody_read_is_refused(made: Path) -> None:
    with pytest.raises(LoaderRefusal, match=r"no loader of TensorRT-LLM '1\.4\.0' is known here"):
        LoaderModel(made / "mixed", RankLayout(tp=1, ep=1), "1.4.0")


# --- directories of `build` ---


@pytest.mark.heavy
@pytest.mark.parametrize("dialect", ["mixed", pytest.param("single", marks=pytest.mark.slow)])
def test_a_model_of_v3s_head_dims_is_exact_on_every_rank_of_three_layouts(
    tmp_path_factory: pytest.TempPathFactory, dialect: Literal["mixed", "single"]
) -> None:
    """Hidden 1024, 3 layers, 16 heads, 8 experts in 4 groups; every tensor of `build`'s own output,
    each key read as often as the loader reads it, nothing unread."""
    root = tmp_path_factory.mktemp("v3")
    wide = {"layers": 3, "experts": 8, "hidden": 1024, "moe_intermediate_size": 1024}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "n_group": 4, "topk_group": 2}
    sizes = {"q_lora_rank": 512, "kv_lora_rank": 512, "intermediate_size": 2048}
    more = {"num_nextn_predict_layers": 1, "max_position_embeddings": 4096}
    make_source(root / "source", **wide, **heads, **sizes, **more)
    artifact = make_artifact(root / "source", "w4a8", root / "artifact")
    for tp, ep in [(8, 8), (8, 1), (4, 2)]:
        output = root / f"{tp}x{ep}"
        options = BuildOptions(
            tp=tp, ep=ep, dialect=dialect, context=1024, concurrency=4, engine_version="1.3.0rc29"
        )
        run_build(root / "artifact", "trtllm", output, options)
        report = check_engine(output, artifact=artifact)
        assert report.compared == sum(
            not name.endswith(("weight_shape", "input_scale"))
            for layer in (0, 1, 2)
            for name in artifact.read_layer(layer)
        ) + len(artifact.read_globals())
        model = LoaderModel(output, RankLayout(tp=tp, ep=ep), "1.3.0rc29", values=False)
        load_all(model)
        of_experts = {key: n for key, n in model.reads.items() if ".experts." in key}
        shared = ("gate_proj.input_scale", "up_proj.input_scale")
        for key, times in of_experts.items():
            assert times == (tp if key.endswith(shared) else tp // ep), key
        assert {n for key, n in model.reads.items() if key not in of_experts} == {tp}
        assert model.unread() == []


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0rc29"])
@pytest.mark.parametrize("mtp", [False, True])
def test_a_built_baseline_is_what_the_loader_loads(tmp_path: Path, version: str, mtp: bool) -> None:
    make_source(tmp_path / "source", num_nextn_predict_layers=1, max_position_embeddings=4096)
    options = BuildOptions(tp=4, ep=4, engine_version=version, mtp=mtp, context=1024, concurrency=4)
    run_build(tmp_path / "source", "trtllm", tmp_path / "engine", options)
    report = check_engine(tmp_path / "engine")
    assert report.dialect == "released"
    assert report.verified == 0
    assert report.hashed_bytes == sum(
        path.stat().st_size for path in (tmp_path / "engine").glob("*.safetensors")
    )


def test_experts_in_int8_are_exact_in_both_dialects(made: Path, tmp_path: Path) -> None:
    artifact = make_artifact(made / "source", "int8-experts", tmp_path / "artifact")
    for dialect in DIALECTS:
        write_directory(artifact, tmp_path / dialect, dialect)
        report = check_engine(tmp_path / dialect, artifact=artifact)
        assert report.compared == 69
        for tp, ep in LAYOUTS:
            model = LoaderModel(tmp_path / dialect, RankLayout(tp=tp, ep=ep), "1.2.1")
            assert compare(model, reading(artifact)) == 69
    experts = dict(model.load(0, 1))[EXPERTS]
    assert experts["w3_w1_weight"].shape == (4, 256, 1024)  # inputs first

    def two_dimensions(tensors: dict[str, Tensor]) -> None:
        key = f"{EXPERTS}.2.up_proj.weight_scale"
        tensors[key] = tensors[key].unsqueeze(1)

    edit_tensors(tmp_path / "mixed", LAYER_1, two_dimensions)
    redigest(tmp_path / "mixed")
    with pytest.raises(LoaderRefusal, match="needs one scale per output in a single dimension"):
        check_engine(tmp_path / "mixed")

"""The engine directory: verified when read, bytes as planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_reference import reference_logits
from support.engines import make_artifact, make_engine
from support.synthetic import write_checkpoint

from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    UNQUANTIZED,
    EnginePlan,
    RankLayout,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.config import ModelConfig
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.packed import LAYOUT, TENSOR_FILE, _aligned, load_packed
from deepseek.engine.packed_layout import packed_tensors, planned_bytes, projections, source_schemes
from deepseek.errors import ArtifactError, DeployError
from deepseek.recipe import Rule, load_recipe
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import read_header, save_tensors
from quant_jobs.targets.embedded import pack_engine

pytestmark = pytest.mark.heavy

RECIPES = [
    *("int8", "int8-weight-only", "int8-asym", "int8-block", "int4", "int4-all", "int4-asym"),
    *("w4a8", "int4-a8", "int8-head"),
]
#: Relative error of an engine's logits against transformers with the same artifact decompressed:
#: BF16 rounding in and out of each kernel, for int8 also that of activations. Measured on several
#: texts: 0.010 to 0.020, 0.005 to 0.014, 0.001 to 0.002, 0.005 to 0.006, 0.002 to 0.011.
MAX_LOGIT_ERROR = {
    "int8": 0.06,
    "int8-weight-only": 0.04,
    "int8-asym": 0.04,
    "int8-block": 0.06,
    "int4": 0.02,
    "int4-all": 0.03,
    "int4-asym": 0.03,
    "w4a8": 0.06,
    "int4-a8": 0.06,
    "int8-head": 0.06,
}


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_engine_answers_as_its_artifact_decompressed_in_transformers(
    recipe: str, tiny_model: Path, base: Path
) -> None:
    ids = torch.arange(200) * 7 % 2000 + 5
    directory = make_engine(tiny_model, recipe, base)
    want = reference_logits(make_artifact(tiny_model, recipe, base), ids)
    for kernels in ("native", "torch"):
        engine = LLMEngine.load(directory, EngineOptions(kv_cache="fp32", kernels=kernels))
        error = ((engine.score(ids) - want).norm() / want.norm()).item()
        assert error < MAX_LOGIT_ERROR[recipe], f"{recipe=} {kernels=} {error=:.4f}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kv_cache", ["bf16", "fp8", "int8"])
def test_allocated_bytes_are_the_planned_ones(
    recipe: str, kv_cache: str, tiny_model: Path, base: Path
) -> None:
    options = EngineOptions(kv_cache=kv_cache, max_kv_tokens=4096, max_model_len=4096)
    engine = LLMEngine.load(make_engine(tiny_model, recipe, base), options)
    slow = LLMEngine.load(
        make_engine(tiny_model, recipe, base), dataclasses.replace(options, kernels="torch")
    )
    config = ModelConfig.from_directory(tiny_model)
    schemes = load_recipe(recipe).resolve(config)
    sizes = {"kv_cache": kv_cache, "num_pages": 256, "page_tokens": 16}
    planned = planned_bytes(config, schemes, **sizes)
    assert slow.allocated_bytes() == planned_bytes(config, schemes, layout="torch", **sizes)
    assert engine.allocated_bytes() == planned
    file_bytes = read_header(make_engine(tiny_model, recipe, base) / TENSOR_FILE).tensors.values()
    weights = sum(planned.values()) - planned["kv_cache"]
    assert weights == sum(entry.num_bytes for entry in file_bytes)
    plan = read_engine_manifest(make_engine(tiny_model, recipe, base)).plan
    assert plan.rank_weight_bytes == (weights,)


@pytest.mark.heavy
def test_an_unquantized_engine_is_the_same_from_disk_and_from_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    manifest = pack_engine(CheckpointReader(tiny_model), tmp_path / "engine")
    assert manifest.recipe == UNQUANTIZED
    assert manifest.artifact_digest == CheckpointReader(tiny_model).fingerprint
    assert manifest.target_fields["layout"] == LAYOUT
    assert manifest.target_fields["mtp"] == "skipped"
    from_disk = LLMEngine.load(tmp_path / "engine")
    in_memory = LLMEngine.from_checkpoint(tiny_model)
    ids = torch.arange(5, 60)
    assert torch.equal(from_disk.score(ids), in_memory.score(ids))
    config = ModelConfig.from_directory(tiny_model)
    planned = planned_bytes(
        config, source_schemes(config), kv_cache="bf16", num_pages=1024, page_tokens=16
    )
    assert from_disk.allocated_bytes() == in_memory.allocated_bytes() == planned


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-asym", "w4a8"])
def test_tensors_begin_at_cache_lines_and_nearly_all_are_mapped(
    recipe: str, tiny_model: Path, base: Path
) -> None:
    directory = make_engine(tiny_model, recipe, base)
    header = read_header(directory / TENSOR_FILE)
    for name, tensor in load_packed(directory).tensors.items():
        assert tensor.data_ptr() % 64 == 0, name
    entries = header.tensors.values()
    mapped = sum(entry.num_bytes for entry in entries if entry.begin % 64 == 0)
    assert mapped > 0.99 * sum(entry.num_bytes for entry in entries)


def test_what_begins_within_a_cache_line_is_copied_and_the_rest_is_not() -> None:
    whole = torch.arange(256, dtype=torch.uint8)
    assert whole.data_ptr() % 64 == 0
    assert _aligned(whole) is whole
    copied = _aligned(whole[8:72])
    assert copied.data_ptr() % 64 == 0
    assert torch.equal(copied, whole[8:72])


def test_a_flipped_byte_in_the_engine_file_names_the_tensor(int4_engine: Path) -> None:
    path = int4_engine / TENSOR_FILE
    name = "model.layers.2.mlp.experts.7.down_proj.packed"
    position = read_header(path).tensors[name].begin + 100
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} in .*{TENSOR_FILE} is damaged"):
        LLMEngine.load(int4_engine)


@pytest.mark.parametrize("damage", ["cut", "extended", "header", "absent"])
def test_a_damaged_engine_file_is_refused_by_name(damage: str, int4_engine: Path) -> None:
    path = int4_engine / TENSOR_FILE
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        changed = {
            "cut": data[:-1],
            "extended": data + b"\0",
            "header": data.replace(b"experts.7.down", b"experts.6.down", 1),
        }
        path.write_bytes(changed[damage])
    with pytest.raises(ArtifactError, match=TENSOR_FILE):
        LLMEngine.load(int4_engine)


def test_every_tensor_is_used_and_none_is_missing(int4_engine: Path, tmp_path: Path) -> None:
    packed = load_packed(int4_engine)
    expected = packed_tensors(packed.config, packed.manifest.schemes)
    assert packed.tensors.keys() == expected.keys()

    def rebuilt(tensors: dict[str, torch.Tensor]) -> Path:
        """The same engine with other tensors and digests that agree with them."""
        saved = save_tensors(int4_engine / TENSOR_FILE, tensors, {"format": "pt"})
        fields = packed.fields.model_copy(
            update={"header_sha256": saved.header_sha256, "tensor_digests": saved.tensors}
        )
        record = TensorFile(num_bytes=saved.num_bytes, sha256=saved.sha256)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        update = {
            "plan": EnginePlan(rank_weight_bytes=(num_bytes,)),
            "tensor_files": {TENSOR_FILE: record},
            "target_fields": fields.model_dump(mode="json"),
        }
        write_engine_manifest(int4_engine, packed.manifest.model_copy(update=update))
        return int4_engine

    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    with pytest.raises(ArtifactError, match=r"tensor extra\.weight .* belongs to no part"):
        LLMEngine.load(rebuilt(tensors | {"extra.weight": torch.zeros(3)}))
    fewer = dict(tensors)
    del fewer["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.gate\.weight is missing"):
        LLMEngine.load(rebuilt(fewer))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight of the engine is"):
        LLMEngine.load(rebuilt(tensors | {"model.norm.weight": torch.zeros(3)}))
    assert LLMEngine.load(rebuilt(tensors)).score(torch.tensor([5])).shape == (1, 2048)


def test_an_edited_manifest_is_refused(int4_engine: Path) -> None:
    path = int4_engine / ENGINE_FILE
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"kv_cache": "int8"}))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        LLMEngine.load(int4_engine)
    path.write_text(json.dumps(raw | {"surprise": 1}))
    with pytest.raises(ArtifactError, match="surprise"):
        LLMEngine.load(int4_engine)
    path.write_text(json.dumps(raw | {"format_version": 3}))
    with pytest.raises(ArtifactError, match="format_version"):
        LLMEngine.load(int4_engine)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        LLMEngine.load(int4_engine)
    path.unlink()
    with pytest.raises(ArtifactError, match="is not an engine"):
        LLMEngine.load(int4_engine)


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"target": "trtllm"}, "is an engine for trtllm, which the embedded engine cannot load"),
        (
            {
                "ranks": RankLayout(tp=2, ep=1),
                "plan": EnginePlan(rank_weight_bytes=(1, 1)),
            },
            "must describe one rank",
        ),
        ({"tensor_files": {}}, rf"must describe one rank and the tensor file {TENSOR_FILE}"),
        ({"plan": EnginePlan(rank_weight_bytes=(7,))}, r"bytes of weights where .* plans 7"),
        ({"target_fields": {"surprise": 1}}, r"target_fields\.surprise: Extra inputs"),
        ({"target_fields": {"page_tokens": None}}, r"target_fields\.page_tokens: Input should be"),
    ],
)
def test_a_manifest_that_the_embedded_engine_does_not_understand_is_refused(
    int4_engine: Path, update: dict[str, Any], sentence: str
) -> None:
    """The common part's reader takes all of these, and the loader none."""
    manifest = read_engine_manifest(int4_engine)
    if "target_fields" in update:
        update = {"target_fields": manifest.target_fields | update["target_fields"]}
    write_engine_manifest(int4_engine, manifest.model_copy(update=update))
    assert read_engine_manifest(int4_engine) != manifest
    with pytest.raises(ArtifactError, match=sentence):
        LLMEngine.load(int4_engine)


def test_a_missing_field_of_the_embedded_engine_is_refused(int4_engine: Path) -> None:
    manifest = read_engine_manifest(int4_engine)
    fields = {name: value for name, value in manifest.target_fields.items() if name != "mtp"}
    changed = manifest.model_copy(update={"target_fields": fields})
    write_engine_manifest(int4_engine, changed)
    with pytest.raises(ArtifactError, match=r"target_fields\.mtp: Field required"):
        LLMEngine.load(int4_engine)


def test_an_edited_copy_of_a_source_file_is_refused(int4_engine: Path) -> None:
    path = int4_engine / "config.json"
    path.write_text(path.read_text().replace('"routed_scaling_factor": 2.5', '"x": 1'))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        LLMEngine.load(int4_engine)


def test_an_engine_of_another_layout_is_refused_in_one_sentence(int4_engine: Path) -> None:
    """As older versions wrote them, whose INT4 tensors suit one instruction set."""
    manifest = read_engine_manifest(int4_engine)
    fields = {k: v for k, v in manifest.target_fields.items() if k != "layout"}
    older = manifest.model_copy(update={"target_fields": fields | {"cpu_layout": "AVX2"}})
    write_engine_manifest(int4_engine, older)
    with pytest.raises(ArtifactError) as refused:
        LLMEngine.load(int4_engine)
    assert str(refused.value) == (
        f"{int4_engine} was built by a version whose tensors lie in another order in memory; "
        "delete it and build the engine again"
    )


def test_linears_are_fused_where_their_schemes_agree_and_only_there(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    recipe = load_recipe("int8")
    plain = projections(config, 1, recipe.resolve(config))
    assert all(len(packed) == 1 for packed in plain.values())
    rule = Rule(match="*.kv_a_proj_with_mqa", weights="source")
    mixed = recipe.model_copy(update={"rules": (*recipe.rules, rule)})
    by_name = projections(config, 1, mixed.resolve(config))
    split = {name: packed for name, packed in by_name.items() if len(packed) > 1}
    assert list(split) == ["model.layers.1.self_attn.qkv_a_proj"]
    names = [
        linear.name.rpartition(".")[2] for linear in split["model.layers.1.self_attn.qkv_a_proj"]
    ]
    assert names == ["q_a_proj", "kv_a_proj_with_mqa"]


def test_int4_outputs_that_torch_cannot_tile_are_refused_by_name(tmp_path: Path) -> None:
    """The native kernels take them: their weights are filled up with zeros."""
    config = write_checkpoint(tmp_path, qk_rope_head_dim=20)  # kv_a has 148 outputs
    schemes = load_recipe("int4-all").resolve(config)
    schemes |= {
        name: scheme
        for name, scheme in load_recipe("int8").resolve(config).items()
        if name.endswith("q_a_proj")
    }
    with pytest.raises(DeployError, match="kv_a_proj_with_mqa has 148 outputs"):
        packed_tensors(config, schemes, layout="torch")
    codes = packed_tensors(config, schemes)["model.layers.0.self_attn.kv_a_proj_with_mqa.packed"]
    assert codes.shape == (10, config.hidden_size // 8, 16, 4)

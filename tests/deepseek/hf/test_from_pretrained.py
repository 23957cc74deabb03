"""transformers itself loads what is built for it: the artifact's values in every parameter, nothing
missing, nothing unexpected; and what it makes of the artifacts themselves is what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import add_text
from support.synthetic import quantize_plainly, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.engine.options import EngineOptions
from deepseek.errors import ArtifactError, DeployError
from deepseek.formats import decompress
from deepseek.hf.loadable import artifact_problems
from deepseek.hf.loader import LoaderModel
from deepseek.hf.loader_decode import decode_tiles
from deepseek.inventory import layer_tensors
from deepseek.recipe import Recipe, load_recipe
from deepseek.source.checkpoint import CheckpointReader
from deepseek.target_engine import load_as_target
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions, BuildResult
from quant_jobs.check import run_check

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

SHAPE: dict[str, Any] = {"layers": 2, "experts": 2, "hidden": 128, "intermediate_size": 128,
                         "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}  # fmt: skip
INT4, INT8 = {"weights": "int4", "group_size": 128}, {"weights": "int8"}
#: What `from_pretrained` would make garbage of without a word, or refuses, by rules.
MIXED: dict[str, list[dict[str, Any]]] = {
    "two formats of linears": [{"match": "*", **INT4}, {"match": "*self_attn*", **INT8}],
    "two formats of experts": [
        {"match": "*mlp.experts*", **INT4},
        {"match": "*mlp.experts.1.*", **INT8},
    ],
    "fp8 experts beside integers": [{"match": "*self_attn*", **INT8}],
    "bf16 experts beside integers": [
        {"match": "*", **INT8},
        {"match": "*mlp.experts*", "weights": "bf16"},
    ],
}
EXECUTED = ("int4", "int8", "int8-asym", "int4-asym", "int8-block", "w4a8", *MIXED)


def recipe_of(name: str) -> Recipe:
    if name not in MIXED:
        return load_recipe(name)
    content = load_recipe("int4").model_dump(mode="json", exclude_defaults=True)
    rules = [{"match": "*", "weights": "source"}, *MIXED[name]]
    return Recipe.model_validate(content | {"name": "mixed", "rules": rules})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf") / "source"
    write_checkpoint(directory, **SHAPE)
    add_text(directory, directory.parent / "text.txt")
    return directory


def make(source: Path, name: str) -> Path:
    output = source.parent / name.replace(" ", "-")
    if not output.exists():
        quantize_plainly(source, recipe_of(name), output)
    return output


def build(checkpoint: Path, output: Path, **options: Any) -> BuildResult:
    return run_build(checkpoint, "transformers", output, BuildOptions(**options))


def load(directory: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The directory as its own launch file says that it is loaded."""
    arguments = json.loads((directory / "from_pretrained.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **arguments
    )
    return model.eval(), info


def by_expert(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by the names of a checkpoint."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                parent = f"{name.removesuffix('gate_up_proj')}{expert}"
                found |= {f"{parent}.gate_proj.weight": gate, f"{parent}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            found[name] = value
    return found


def values(artifact: ArtifactReader) -> dict[str, Tensor]:
    """The artifact's own values, decoded, without the MTP layer."""
    found = dict(artifact.read_globals())
    for layer in range(artifact.config.num_hidden_layers):
        tensors = artifact.read_layer(layer)
        for spec in layer_tensors(artifact.config, layer):
            if spec.kind != "linear":
                found[spec.name] = tensors[spec.name]
                continue
            scheme = artifact.schemes[spec.module]
            stored = pop_linear(tensors, spec.module, scheme)
            found[spec.name] = decompress(stored, scheme, (spec.shape[0], spec.shape[1]))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("name", EXECUTED)
def test_transformers_holds_the_artifacts_values(name: str, source: Path, tmp_path: Path) -> None:
    artifact = make(source, name)
    build(artifact, tmp_path / "built")
    assert run_check(tmp_path / "built", artifact).compared == 35
    model, info = load(tmp_path / "built")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held, expected = by_expert(model), values(ArtifactReader(artifact))
    assert held.keys() == expected.keys()
    for key, value in held.items():
        assert torch.equal(value, expected[key].to(value.dtype)), key
    # The directory executed here says what transformers says of it, up to BF16's roundings.
    ids = torch.arange(40) % 96
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].float().log_softmax(-1)
    engine = load_as_target(tmp_path / "built", EngineOptions(kv_cache="bf16"))
    ours = engine.score(ids).log_softmax(-1)
    assert (theirs.exp() * (theirs - ours)).sum(-1).median() < 2e-3


def test_a_release_is_built_with_its_partial_tiles_in_bf16(source: Path, tmp_path: Path) -> None:
    """kv_a has 160 rows: two tiles of 128, which transformers takes for 80; q_b has 192."""
    result = build(source, tmp_path / "built")
    assert result.warnings == (
        "4 linears are dequantized and rounded to BF16 once: their last FP8 tile is partial, and "
        "transformers infers the size of tiles",
    )
    model, reader = LoaderModel(tmp_path / "built"), CheckpointReader(source)
    for layer in range(2):
        read = reader.read_layer(layer)
        for spec, held in model.load(layer):
            tensor = read[spec.name]
            plain = tensor.data if tensor.scale_inv is None else tensor.dequantize()
            assert torch.equal(held, plain.to(held.dtype)), spec.name


def test_a_release_as_it_is_would_have_tiles_of_another_size(source: Path) -> None:
    layer = CheckpointReader(source).read_layer(0)
    stored = layer["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert stored.scale_inv is not None
    with pytest.raises(LoaderRefusal, match="takes equal tiles from the shapes, which"):
        decode_tiles({"weight": stored.data, "weight_scale_inv": stored.scale_inv}, "kv_a")


@pytest.mark.parametrize("option", [{"tp": 2}, {"ep": 2}, {"dialect": "mixed"}, {"mtp": True},
                                    {"context": 64}, {"concurrency": 2}])  # fmt: skip
def test_an_option_that_means_nothing_is_refused(
    option: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    name = next(iter(option))
    with pytest.raises(DeployError, match=rf"--{name} means nothing to target transformers"):
        build(source, tmp_path / "built", **option)
    assert not (tmp_path / "built").exists()


def test_a_kv_format_that_it_has_not_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="cannot load a KV cache in fp8: it caches keys and"):
        build(source, tmp_path / "built", kv_cache="fp8")


def test_a_directory_that_no_longer_dequantizes_is_refused(source: Path, tmp_path: Path) -> None:
    build(make(source, "int4"), tmp_path / "built")
    path = tmp_path / "built" / "config.json"
    path.write_text(path.read_text().replace('"dequantize": true', '"dequantize": false'))
    with pytest.raises(LoaderRefusal, match="does not say dequantize"):
        LoaderModel(tmp_path / "built")
    with pytest.raises(ArtifactError, match=r"config.json differs from what engine.json records"):
        run_check(tmp_path / "built")


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["int8", "int4-asym", "fp8 experts beside integers"])
def test_transformers_refuses_the_artifacts_that_are_said_to_be_refused(
    name: str, source: Path
) -> None:
    artifact = ArtifactReader(make(source, name))
    assert list(artifact_problems(artifact.config, artifact.schemes))
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(
            artifact.directory, quantization_config=CompressedTensorsConfig(dequantize=True)
        )


@pytest.mark.heavy
def test_two_formats_of_linears_are_loaded_as_garbage_without_a_word(tmp_path: Path) -> None:
    """Without an MTP layer, whose FP8 experts it takes for the scheme of all where they are few."""
    write_checkpoint(tmp_path / "source", **SHAPE, num_nextn_predict_layers=0)
    artifact = ArtifactReader(make(tmp_path / "source", "two formats of linears"))
    (problem,) = artifact_problems(artifact.config, artifact.schemes)
    assert problem.sentence() == (
        "transformers cannot load linears in int4-g128 and int8: transformers decodes all linears "
        "but the routed experts by the scheme of one config group; build it with --target "
        "transformers"
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        artifact.directory,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    name = "model.layers.0.self_attn.o_proj.weight"
    right, held = values(artifact)[name], model.state_dict()[name]
    assert (held - right).norm() > 0.5 * right.norm()


def test_a_recipe_that_transformers_reads_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    artifact = make(source, "int4")
    result = build(artifact, tmp_path / "built")
    assert result.warnings == ()
    report = run_check(tmp_path / "built")
    assert report.verified == report.tensors


def test_the_build_says_what_is_computed_otherwise(source: Path, tmp_path: Path) -> None:
    assert build(make(source, "int8"), tmp_path / "int8").warnings == (
        "transformers: INT8 activations are not quantized: it computes with the weights' values "
        "alone",
        "stored in another form, with the same values: int8-a8 as INT8 per channel",
        "transformers holds these experts in FP32, four bytes per weight, because their scales are "
        "FP32",
    )
    assert build(make(source, "w4a8"), tmp_path / "w4a8").warnings == (
        "transformers: FP8 activations are not quantized: it computes with the weights' values "
        "alone",
    )

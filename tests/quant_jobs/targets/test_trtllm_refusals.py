"""What `build --target trtllm` refuses: one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chain import Ended
from support.format_1 import write_format_1_artifact
from support.quantizing import flip_byte
from support.synthetic import V3_2, quantize_plainly
from support.trtllm_builds import CHANGES, build, digests, make_buildable, per_layer_recipe
from support.trtllm_directories import make_source

from cluster.hardware import parse_hardware
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, DeployError
from deepseek.models import DEEPSEEK_V3, KIMI_K2
from deepseek.recipe import Recipe, load_recipe
from deepseek.trtllm.layout import stored_schemes
from quant_jobs.check import run_check
from quant_jobs.targets.trtllm_args import args_from_plan
from quant_jobs.targets.trtllm_plan import TrtllmOptions

Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `source` and `artifact` (INT4 experts with maxima, 8 heads, 4 experts); nobody may
    change them."""
    root = tmp_path_factory.mktemp("refusals")
    make_buildable(root, "int4")
    return root


@pytest.fixture
def artifact(made: Path) -> Path:
    return made / "artifact"


def refused(ended: Ended, output: Path) -> str:
    """The sentence of a build that was refused, which has written nothing."""
    assert ended.code == 2, ended.out + ended.err
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert not output.exists()
    return ended.err


# --- recipes ---


def experts_as(**changes: Any) -> Recipe:
    """`int4` with other experts."""
    content = load_recipe("int4").model_dump(mode="json", exclude_defaults=True)
    rest, experts = content["rules"]
    return Recipe.model_validate(content | {"name": "own", "rules": [rest, experts | changes]})


W8A8 = {"weights": "int8", "activations": "int8", "group_size": None}
RECIPES: list[tuple[Recipe | str, str]] = [
    ("int8", "no INT8 W8A8 kernels on Hopper. Use the recipe int8-experts or int4"),
    ("int8-block", "it has no INT8 kernels with a scale per tile. Use the recipe int8-experts"),
    ("int8-smoothquant", "no INT8 W8A8 kernels on Hopper. Use the recipe int8-experts or int4"),
    ("int8-weight-only", "dense_mlp, o_proj, q_b_proj and shared_experts as int8"),
    ("int8-asym", "dense_mlp, o_proj, q_b_proj and shared_experts as int8-asym"),
    ("int4-all", "shared_experts as int4-g128: IntServe builds INT8 and INT4 for routed experts"),
    ("int4-asym", "shared_experts as int4-asym-g128: IntServe builds INT8 and INT4 for routed"),
    (experts_as(group_size=64), "INT4 experts (W4AFP8) are symmetric with groups of 128 only"),
    (experts_as(weights="int4-asym"), "INT4 experts (W4AFP8) are symmetric with groups of 128"),
    (experts_as(**W8A8), "no INT8 W8A8 kernels on Hopper. Use the recipe int8-experts or int4"),
    (
        experts_as(match="model.layers.*.mlp.experts.*.up_proj"),
        "all routed experts of layer 1 and 1 more: it fuses them into one tensor",
    ),
]


@pytest.mark.parametrize(("recipe", "sentence"), RECIPES)
def test_a_recipe_that_cannot_load_is_named_with_what_to_change(
    made: Path, tmp_path: Path, command: Command, recipe: Recipe | str, sentence: str
) -> None:
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    quantize_plainly(made / "source", recipe, tmp_path / "artifact")
    words = ("--checkpoint", tmp_path / "artifact", "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--output", tmp_path / "out")
    assert sentence in refused(ended, tmp_path / "out")


def test_one_quantization_for_all_experts_is_all_that_the_dialect_single_has(
    tmp_path: Path, command: Command
) -> None:
    made = make_buildable(tmp_path, per_layer_recipe())
    words = ("--checkpoint", made.directory, "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--dialect", "single", "--output", tmp_path / "out")
    assert "one quantization for all routed experts; use --dialect mixed" in refused(
        ended, tmp_path / "out"
    )


# --- options ---


OPTIONS: list[tuple[tuple[object, ...], str]] = [
    (("--tp", 3, "--ep", 3), "8 attention heads on 3 ranks: every rank holds whole heads"),
    (("--tp", 16), "--tp 16 needs 16 GPUs, and --hardware 8xH800-80GB has 8; use --hardware 16x"),
    (
        ("--tp", 16, "--hardware", "16xH800-80GB"),
        "8 attention heads on 16 ranks: every rank holds whole heads; use --tp 8",
    ),
    (("--tp", 4, "--ep", 3), "--ep 3 does not divide --tp 4"),
    (("--tp", 4, "--ep", 8), "--ep 8 does not divide --tp 4"),
    (("--ep", 1), "use --ep 2"),
    (("--ep", 4), "q_b_proj as fp8-block: its outputs, 192 for each of 8 ranks, are no multiple"),
    (
        ("--tp", 8, "--dialect", "single"),
        "4 routed experts in 8 groups: every group holds equally many experts; use --ep 4",
    ),
    (
        ("--tp", 8, "--ep", 1, "--dialect", "single"),
        "64 of an expert's 512 inner channels for each of 8 ranks are no multiple of 128",
    ),
    (("--tp", 4, "--kv-cache", "int8"), "no int8 KV cache for this model; give --kv-cache fp8 or"),
    (("--tp", 4, "--hardware", "cpu"), "runs on NVIDIA GPUs only. Use "),
    (("--tp", 4, "--hardware", "8xA100-80GB"), "does not support DeepSeek-V3 on Ampere"),
    (("--tp", 4, "--engine-version", "1.2.0"), "1.2.0 is not known to us; use --engine-version"),
    (("--tp", 4, "--engine-version", ""), "is not known to us; use --engine-version 1.2.1 or"),
    (("--tp", 4, "--engine-version", "1.3.0rc20"), "not built for: DeepSeek-V3 hangs in its warm"),
    (("--tp", 4, "--context", 10**6), "--context must be 1 to 256, the model's limit, not 1000000"),
    (("--tp", 4, "--concurrency", 0), "--concurrency must be at least 1, not 0"),
    (("--tp", 4, "--concurrency", 10**6), "max_num_tokens 8192 is less than max_batch_size"),
    (("--tp", 4, "--dialect", "single", "--mtp"), "the MTP layer in the dialect single"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), OPTIONS)
def test_options_that_do_not_fit_are_one_sentence(
    artifact: Path, tmp_path: Path, command: Command, words: tuple[object, ...], sentence: str
) -> None:
    fixed = ("--checkpoint", artifact, "--target", "trtllm", "--output", tmp_path / "out")
    assert sentence in refused(command("build", *fixed, *words), tmp_path / "out")


def test_a_source_has_no_dialect(made: Path, tmp_path: Path, command: Command) -> None:
    words = ("--checkpoint", made / "source", "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--dialect", "single", "--output", tmp_path / "out")
    assert "is a source, which stays as released; leave it out" in refused(ended, tmp_path / "out")


def test_a_model_with_an_indexer_is_for_other_targets(tmp_path: Path, command: Command) -> None:
    make_source(tmp_path / "source", **CHANGES | V3_2)
    words = ("--checkpoint", tmp_path / "source", "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--output", tmp_path / "out")
    assert "the indexer" in (sentence := refused(ended, tmp_path / "out"))
    assert "--target vllm" in sentence


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "recipe", "hardware"),
    [(DEEPSEEK_V3, "int8-experts", "8xH800-80GB"), (KIMI_K2, "int8-experts", "8xH20-96GB")],
)
def test_weights_that_leave_no_room_for_a_request_are_refused(
    config: ModelConfig, recipe: str, hardware: str
) -> None:
    machines = parse_hardware(hardware)
    ranks = RankLayout(tp=machines.count, ep=machines.count)
    stored = stored_schemes(config, load_recipe(recipe).resolve(config), "mixed")
    with pytest.raises(DeployError, match=f"{hardware} has no room: .* leave 0 tokens"):
        args_from_plan(config, stored, TrtllmOptions(ranks=ranks, kv_cache="bf16"), machines)


# --- the checkpoint ---


@pytest.mark.heavy
def test_an_artifact_of_format_1_gets_its_maxima_by_measure_and_is_built_then(
    tmp_path: Path, command: Command
) -> None:
    """As the sentence says. Its model has no heads for FP8 tiles: dialect single."""
    artifact, model = write_format_1_artifact(tmp_path)
    words = ("--checkpoint", artifact, "--target", "trtllm", "--tp", 1, "--dialect", "single")
    sentence = refused(command("build", *words, "--output", tmp_path / "out"), tmp_path / "out")
    assert "holds no maxima of its experts' inputs" in sentence
    given = sentence.split("python -m quant_jobs ")[1].split()
    assert given == ["measure", "--checkpoint", str(artifact), "--calibration", "FILE"]
    measured = command(*given[:-1], model.text, "--workers", 0)
    assert measured.code == 0, measured.err
    built = command("build", *words, "--output", tmp_path / "out")
    assert built.code == 0, built.err
    assert run_check(tmp_path / "out", artifact).compared > 0


def test_an_artifact_damaged_in_a_weight_ends_the_build_which_goes_on_after_repair(
    artifact: Path, tmp_path: Path, command: Command
) -> None:
    damaged, output = tmp_path / "artifact", tmp_path / "out"
    shutil.copytree(artifact, damaged)
    file = damaged / "model-layer-00002.safetensors"
    flip_byte(file, file.stat().st_size // 2)
    words = ("--checkpoint", damaged, "--target", "trtllm", "--tp", 4, "--output", output)
    ended = command("build", *words)
    assert ended.code == 2
    *_, error = ended.err.splitlines()
    assert error.startswith("error: tensor model.layers.2.mlp.")
    assert "is damaged: its bytes are not those that were published" in error
    left = {path.name: path.stat().st_mtime_ns for path in output.iterdir() if path.is_file()}
    assert left.keys() == {"model-layer-00000.safetensors", "model-layer-00001.safetensors"}

    shutil.copy(artifact / file.name, file)
    result = build(damaged, output)
    kept = {name: (output / name).stat().st_mtime_ns for name in left}
    assert kept == left
    assert result == build(artifact, tmp_path / "whole").model_copy(update={"output": str(output)})
    assert digests(output) == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["input_maxima.json", "model-layer-00001.safetensors"])
def test_an_artifact_without_one_of_its_files_is_refused(
    artifact: Path, tmp_path: Path, command: Command, name: str
) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    (tmp_path / "artifact" / name).unlink()
    words = ("--checkpoint", tmp_path / "artifact", "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--output", tmp_path / "out")
    assert f"{name} is absent; restore it" in refused(ended, tmp_path / "out")


# --- the output ---


@pytest.mark.parametrize("name", [".", "below"])
def test_the_checkpoint_is_no_output(
    artifact: Path, tmp_path: Path, command: Command, name: str
) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    before = digests(tmp_path / "artifact")
    words = ("--checkpoint", tmp_path / "artifact", "--target", "trtllm", "--tp", 4)
    ended = command("build", *words, "--output", tmp_path / "artifact" / name)
    assert ended.code == 2
    *_, error = ended.err.splitlines()  # `build` shows a line of progress before it
    assert error.startswith("error: ")
    assert "the checkpoint" in error
    assert digests(tmp_path / "artifact") == before


#: Options of another build, and what the sentence says of it.
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"tp": 2, "ep": 2}, r"ranks \(tp 4, ep 4, now tp 2, ep 2\)"),
    ({"ep": 2}, r"ranks \(tp 4, ep 4, now tp 4, ep 2\)"),
    ({"dialect": "single"}, r"dialect \(mixed, now single\)"),
    ({"engine_version": "1.3.0rc29"}, r"engine_version \(1\.2\.1, now 1\.3\.0rc29\)"),
    ({"mtp": True}, r"mtp \(left out, now kept\)"),
    ({"kv_cache": "fp8"}, r"kv_cache \(bf16, now fp8\)"),
    ({"context": 64}, r"llm_args\.yaml \(.*, now .*\)"),
]


def test_the_output_of_another_build_is_refused_and_kept(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(made / "artifact", output)
    before = digests(output)
    for options, difference in [*OTHERS, ({}, r"checkpoint \(.*, now .*\)")]:
        checkpoint = made / ("artifact" if options else "source")
        with pytest.raises(ArtifactError, match=f"an engine with another {difference}; choose"):
            build(checkpoint, output, **options)
    assert digests(output) == before


def test_an_unfinished_output_of_another_build_is_refused_and_kept(
    made: Path, tmp_path: Path
) -> None:
    damaged, output = tmp_path / "artifact", tmp_path / "out"
    shutil.copytree(made / "artifact", damaged)
    file = damaged / "model-layer-00002.safetensors"
    flip_byte(file, file.stat().st_size // 2)
    with pytest.raises(ArtifactError, match="is damaged"):
        build(damaged, output)
    before = digests(output)
    for options, difference in [*OTHERS, ({}, r"checkpoint \(.*, now .*\)")]:
        checkpoint = damaged if options else made / "source"
        with pytest.raises(
            ArtifactError, match=f"holds an unfinished build with another {difference}; choose"
        ):
            build(checkpoint, output, **options)
    assert digests(output) == before


def test_a_stray_weight_file_beside_a_finished_engine_is_named(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(made / "artifact", output)
    shutil.copy(output / "model-globals.safetensors", output / "model-00001.safetensors")
    with pytest.raises(ArtifactError, match="model-00001.safetensors is no file of this engine"):
        build(made / "artifact", output)

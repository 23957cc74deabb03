"""What vLLM would take without a word, `build --check` refuses by a sentence that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.quantizing import flip_byte
from support.trtllm_directories import redigest
from support.vllm_builds import LAYER_1, MUTATIONS, Edit, lines

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, DeployError, IntServeError
from deepseek.vllm.check import check_engine

pytestmark = pytest.mark.heavy  # engines are built and read


@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-weight-only", "int4-asym"])
def test_an_engine_passes_and_every_value_of_every_rank_is_the_artifacts(
    recipe: str, made: Path
) -> None:
    report = check_engine(made / f"e-{recipe}", artifact=ArtifactReader(made / recipe))
    assert (report.target, report.loader, len(report.ranks)) == ("vllm", "vLLM", 2)
    assert report.hashed_bytes > 1_000_000
    weights = [n for n in _keys(made / f"e-{recipe}") if not n.endswith("weight_shape")]
    assert report.compared == len(weights)
    assert report.ranks[0].held_bytes == report.ranks[1].held_bytes > 0


def test_of_a_release_every_tensor_is_read(made: Path) -> None:
    report = check_engine(made / "e-source")
    assert report.verified == 0  # there is no manifest of an artifact to verify against
    assert report.tensors == len(_keys(made / "e-source"))


def test_rounded_scales_are_the_only_tensors_without_a_digest_of_the_artifact(made: Path) -> None:
    keys = _keys(made / "e-int8-weight-only")
    scales = [key for key in keys if key.endswith(".weight_scale")]
    report = check_engine(made / "e-int8-weight-only")
    assert report.verified == len(keys) - len(scales) > 0
    assert check_engine(made / "e-int4").verified == len(_keys(made / "e-int4"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_edit_that_has_its_digest_is_refused_by_name(
    name: str, made: Path, tmp_path: Path
) -> None:
    edit, words = MUTATIONS[name]
    _refused(made / "e-int4", tmp_path, edit, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tensor-parallel-size: 2", "tensor-parallel-size: 4", "was built for 2 ranks"),
        ("enable-expert-parallel: true\n", "", "enable-expert-parallel is not"),
        ("kv-cache-dtype: bfloat16", "kv-cache-dtype: fp8", "with a KV cache in bf16"),
        ("max-model-len: 256", "max-model-len: 257", "exceeds the model's 256"),
        ("dtype: bfloat16\nload", "dtype: float16\nload", "dtype"),
        ("max-num-seqs: 256", "max-num-seqs: 256\ntrust-remote-code: true", "trust-remote-code"),
        (
            "max-num-seqs: 256",
            "max-num-seqs: 256\nspeculative-config: {method: mtp, num_speculative_tokens: 1}",
            "needs the MTP layers",
        ),
    ],
)
def test_a_launch_file_of_another_engine_is_refused(
    old: str, new: str, words: str, made: Path, tmp_path: Path
) -> None:
    _refused(made / "e-int4", tmp_path, lines(old, new), words)


def test_a_stray_shard_is_refused(made: Path, tmp_path: Path) -> None:
    def stray(directory: Path) -> None:
        shutil.copy(directory / LAYER_1, directory / "model-old.safetensors")

    _refused(made / "e-int4", tmp_path, stray, "is no file of this engine")


def test_an_index_that_lists_no_file_is_refused(made: Path, tmp_path: Path) -> None:
    def emptied(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
        redigest(directory)

    _refused(made / "e-int4", tmp_path, emptied, "names b, which is not in the directory")


def test_a_changed_value_is_refused_by_the_artifacts_digest(made: Path, tmp_path: Path) -> None:
    def flipped(directory: Path) -> None:
        flip_byte(directory / LAYER_1)
        redigest(directory)

    _refused(made / "e-int4", tmp_path, flipped, "its values are not those")


def test_an_engine_of_another_target_is_refused(made: Path, tmp_path: Path) -> None:
    def retargeted(directory: Path) -> None:
        redigest(directory, target="trtllm")

    _refused(made / "e-int4", tmp_path, retargeted, "an engine for trtllm, not for vLLM")


def test_another_artifact_than_the_engine_was_built_from_is_refused(made: Path) -> None:
    with pytest.raises(ArtifactError, match="give the artifact that it was built from"):
        check_engine(made / "e-int4", artifact=ArtifactReader(made / "int4-asym"))


def _refused(engine: Path, tmp_path: Path, edit: Edit, words: str) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine, copy)
    edit(copy)
    with pytest.raises((ArtifactError, DeployError)) as refusal:
        check_engine(copy)
    assert isinstance(refusal.value, IntServeError)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _keys(directory: Path) -> list[str]:
    from deepseek.tensor_files import read_header

    return [name for path in directory.glob("*.safetensors") for name in read_header(path).tensors]

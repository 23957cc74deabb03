"""Only checked bytes are copied, and nothing lies beside an artifact or engine unlisted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.engines import make_engine
from support.hostile import FILES, JSON, NAME, reseal
from support.synthetic import quantize_plainly

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.documents import COPIED_FILES, read_copied
from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.manifest import read_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.verdict import read_verdict
from deepseek.engine.packed import load_packed
from deepseek.errors import ArtifactError, CheckpointError, IntServeError, OutputError
from deepseek.outputs import check_apart
from deepseek.recipe import load_recipe
from deepseek.source.checkpoint import CheckpointReader
from deepseek.text import printable
from quant_jobs.targets.embedded import pack_engine

#: Files that some loader would take for a part of the model, ours or another project's.
UNLISTED = (
    *("chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json"),
    *(
        "processor_config.json",
        "adapter_config.json",
        "modeling_deepseek.py",
        "hf_quant_config.json",
    ),
    *("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.gguf"),
    *("additional_chat_templates/", "\x1b[31m\nerror: x.py", "\udcff.jinja"),
)
HARMLESS = (
    *("README.md", ".gitattributes", "LICENSE", "LICENSE-MODEL", "LICENSE.txt"),
    *(".cache/", ".git/"),
)


def put(directory: Path, name: str) -> None:
    if name.endswith("/"):
        (directory / name).mkdir()
        (directory / name / "evil.jinja").write_text("{{ 1 }}")
    else:
        (directory / name).write_text("{}")


# What is taken from a source.


@pytest.fixture
def hostile_source(source: Path, tmp_path: Path) -> Path:
    """A copy of a source, to add files to."""
    return shutil.copytree(source, tmp_path / "hostile")


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", ["merges.txt", "tokenizer_config.json"])
def test_a_source_file_that_is_no_plain_text_is_never_copied(
    hostile_source: Path, tmp_path: Path, name: str, case: str
) -> None:
    make, says = FILES[case]
    (hostile_source / name).unlink(missing_ok=True)
    make(hostile_source / name)
    with pytest.raises(CheckpointError) as refused:
        pack_engine(CheckpointReader(hostile_source), tmp_path / "engine")
    assert f"{hostile_source / name} {says}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("case", JSON)
def test_a_tokenizer_config_that_is_no_json_object_is_refused(
    hostile_source: Path, case: str
) -> None:
    make, says = JSON[case]
    (hostile_source / "tokenizer_config.json").unlink()
    make(hostile_source / "tokenizer_config.json")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json ") as refused:
        read_copied(hostile_source)
    assert says in str(refused.value)


def test_links_within_the_source_and_into_the_hubs_blobs_are_copied(
    source: Path, tmp_path: Path
) -> None:
    revision = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    (blobs / "abc").write_text("#version: 0.2\n")
    (revision / "merges.txt").symlink_to("../../blobs/abc")
    (revision / "vocab.json").write_text("{}")
    (revision / "added_tokens.json").symlink_to("vocab.json")
    assert read_copied(revision) == {
        "added_tokens.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
        "vocab.json": b"{}",
    }


def test_a_tiktoken_model_goes_along_and_code_does_not(
    hostile_source: Path, tmp_path: Path
) -> None:
    (hostile_source / "tiktoken.model").write_bytes(b"aGk= 0\n\xff")
    (hostile_source / "tokenization_kimi.py").write_text("import os\n")
    quantize_plainly(hostile_source, load_recipe("int4"), tmp_path / "artifact")
    pack_engine(ArtifactReader(tmp_path / "artifact"), tmp_path / "engine")
    for made in (tmp_path / "artifact", tmp_path / "engine"):
        assert (made / "tiktoken.model").read_bytes() == b"aGk= 0\n\xff"
        assert not list(made.glob("*.py"))
    assert not [name for name in COPIED_FILES if name.endswith(".py")]


# What may lie in an artifact and in an engine.


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_file_in_an_artifact_is_refused(artifact: Path, name: str) -> None:
    put(artifact, name)
    with pytest.raises(ArtifactError) as refused:
        ArtifactReader(artifact)
    assert printable(f"{artifact / name} is not part of this artifact") in str(refused.value)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_file_in_an_engine_is_refused(int4_engine: Path, name: str) -> None:
    put(int4_engine, name)
    for read in (load_packed, read_engine):
        with pytest.raises(ArtifactError) as refused:
            read(int4_engine)
        assert printable(f"{int4_engine / name} is not part of this engine") in str(refused.value)


def test_files_that_no_loader_reads_may_lie_there(artifact: Path, int4_engine: Path) -> None:
    for name in HARMLESS:
        put(artifact, name)
        put(int4_engine, name)
    for name in ("job_report.json", "job_report.html"):
        put(artifact, name)
    for name in ("gate.json", "gate.json.sig"):
        put(int4_engine, name)
    ArtifactReader(artifact)
    load_packed(int4_engine)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "a\0b", "modeling.py", NAME, "x" * 1_000_000]
)
def test_a_manifest_lists_only_files_that_intserve_writes(
    artifact: Path, int4_engine: Path, name: str
) -> None:
    reseal(artifact / "intserve.json", lambda raw: raw["files"].update({name: "0" * 64}))
    reseal(int4_engine / "engine.json", lambda raw: raw["files"].update({name: "0" * 64}))
    for read, directory in ((ArtifactReader, artifact), (load_packed, int4_engine)):
        with pytest.raises(ArtifactError, match="which is none that IntServe writes") as refused:
            read(directory)  # type: ignore[operator]
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", ["../rank-0.safetensors", "/dev/zero", "x\0.safetensors", "a.py"])
def test_a_tensor_file_has_a_plain_name(int4_engine: Path, name: str) -> None:
    record = {"num_bytes": 1, "sha256": "0" * 64}
    reseal(int4_engine / "engine.json", lambda raw: raw["tensor_files"].update({name: record}))
    with pytest.raises(ArtifactError, match="which is no plain name of a safetensors file"):
        read_engine(int4_engine)


@pytest.mark.parametrize("case", ["a link out of the directory", "a pipe", "a directory", "10 GB"])
def test_tensors_and_listed_documents_are_plain_files(
    artifact: Path, int4_engine: Path, case: str
) -> None:
    make, _ = FILES[case]
    for directory, name in (
        (artifact, "model-layer-00001.safetensors"),
        (artifact, "tokenizer.json"),
        (int4_engine, "rank-0.safetensors"),
        (int4_engine, "config.json"),
    ):
        kept = (directory / name).read_bytes()
        (directory / name).unlink()
        make(directory / name)
        with pytest.raises(ArtifactError) as refused:
            (ArtifactReader if directory == artifact else load_packed)(directory)
        assert str(directory / name) in str(refused.value)
        path = directory / name
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(kept)
        (directory.parent / "private.key").unlink(missing_ok=True)


def test_an_engine_without_a_linears_scheme_is_refused(int4_engine: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    reseal(int4_engine / "engine.json", lambda raw: raw["schemes"].pop(name))
    with pytest.raises(ArtifactError, match=f"has no scheme for {name}"):
        load_packed(int4_engine)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("errors", {NAME: 0.5}, "has figures of the linear"),
        ("errors", {"model.layers.0.mlp.down_proj": 1e999}, "should be a finite number"),
        ("errors", {"model.layers.0.mlp.down_proj": -1.0}, "greater than or equal to 0"),
        ("coverage", {"0": [1, 2, 3, 4]}, "has figures of experts in layer 0"),
        ("coverage", {"1": [1, 2]}, "has figures of 2 experts in layer 1"),
        ("coverage", {"1": [10**30] * 4}, "less than or equal to"),
        ("kv_latent_amax", {"9": 1.0}, "has figures of a layer 9"),
    ],
)
def test_figures_are_of_this_model(artifact: Path, field: str, value: object, says: str) -> None:
    path = artifact / "intserve.json"
    raw = json.loads(path.read_text())
    (raw["layers"][0] if field == "errors" else raw)[field] = value
    path.write_text(json.dumps(raw).replace("Infinity", "1e999"))  # which is JSON
    if "has figures" in says:
        reseal(path, lambda raw: None)
    with pytest.raises(ArtifactError) as refused:
        ArtifactReader(artifact)
    assert says in str(refused.value)
    assert str(refused.value).isprintable()


# The manifests themselves.

READERS = {
    "intserve.json": read_manifest,
    "engine.json": read_engine_manifest,
    "gate.json": read_verdict,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", FILES | JSON)
def test_a_hostile_manifest_is_one_sentence(tmp_path: Path, name: str, case: str) -> None:
    make, says = (FILES | JSON)[case]
    directory = tmp_path / "directory"
    directory.mkdir()
    make(directory / name)
    with pytest.raises(IntServeError) as refused:
        READERS[name](directory)
    assert str(refused.value).startswith(f"{directory / name} ")
    assert says in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("key", [NAME, "k" * 1_000_000])
def test_a_key_cannot_act_on_the_terminal_or_fill_it(
    artifact: Path, int4_engine: Path, name: str, key: str
) -> None:
    directory = artifact if name == "intserve.json" else int4_engine
    verdict = {"passed": True, "artifact_digest": "", "engine_digest": "", "measured": {}}
    limits = load_recipe("int4").gate.model_dump(exclude={"max_input_outliers"})  # form 1
    verdict |= {"limits": limits, "reasons": []}
    (int4_engine / "gate.json").write_text(json.dumps(verdict))
    raw = json.loads((directory / name).read_text()) | {key: 1}
    (directory / name).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="Extra inputs are not permitted") as refused:
        READERS[name](directory)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


# What commands write.


def test_no_output_may_lie_in_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "link").symlink_to("engine")
    for output in ("engine", "engine/report.html", "link/x", "engine/../engine/x"):
        with pytest.raises(OutputError, match="choose another --output"):
            check_apart(tmp_path / output, tmp_path / "engine", "the engine")
    check_apart(tmp_path / "engine-report.html", tmp_path / "engine", "the engine")


def test_build_does_not_write_into_its_checkpoint(
    artifact: Path, tiny_model: Path, base: Path
) -> None:
    from quant_jobs.build import run_build

    with pytest.raises(OutputError, match="is inside the checkpoint; choose another --output"):
        run_build(artifact, "embedded", artifact / "engine")
    ArtifactReader(artifact)
    made = make_engine(tiny_model, "int4", base)
    assert read_engine(made).documents.keys() >= {"config.json", "tokenizer.json"}

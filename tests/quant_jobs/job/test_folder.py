"""OUTPUT/.job: locking, which files and boundaries count as complete, and how damage is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.artifact.manifest import LayerRecord
from deepseek.artifact.tensors import layer_file
from deepseek.errors import ArtifactError
from deepseek.tensor_files import save_tensors
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.job.folder import JobFolder, PublishedFile
from quant_jobs.workers.boundary import boundary_files, load_blocks, save_blocks

RUN: dict[str, Any] = {"recipe": {"name": "int8", "rules": []}, "calibration text": "a" * 64}


def publish(folder: JobFolder, layer: int) -> PublishedFile:
    name = layer_file(layer)
    tensors = {"w": torch.arange(layer, layer + 32.0), "v": torch.ones(7)}
    saved = save_tensors(folder.output / name, tensors)
    record = LayerRecord(
        layer=layer,
        file=name,
        num_bytes=saved.num_bytes,
        sha256=saved.sha256,
        header_sha256=saved.header_sha256,
        source_sha256="0" * 64,
        tensors=saved.tensors,
        errors={"m": 0.125},
    )
    file = PublishedFile(record=record, coverage=(3, 4))
    folder.save_published(file)
    return file


def test_a_second_run_takes_up_what_the_first_published(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out", RUN) as folder:
        files = {layer: publish(folder, layer) for layer in (0, 1)}
    with JobFolder(tmp_path / "out", dict(RUN)) as folder:
        assert folder.load_published() == files
        folder.remove()
    assert not (tmp_path / "out" / ".job").exists()


@pytest.mark.heavy
def test_another_driver_is_refused_while_the_lock_is_held_and_not_after(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quant_jobs.job.folder import JobFolder\n"
        f"JobFolder(Path(sys.argv[1]), {RUN!r})\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ArtifactError, match=rf"another quantize \(process {other.pid}\)"):
            JobFolder(tmp_path / "out", RUN)
    finally:
        other.kill()
        other.communicate()
    JobFolder(tmp_path / "out", RUN).release()  # a dead process holds no lock


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": {"name": "int4"}}, "holds a run of recipe int8, not int4; choose another"),
        ({"recipe": {"name": "int8", "rules": [1]}}, "whose rules or settings have changed"),
        ({"calibration text": "b" * 64}, r"another calibration text \(aaaaaaaaaaaa, now bbb"),
        ({"tools": {"torch": "9"}}, "with another tools"),
    ],
)
def test_another_runs_output_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    JobFolder(tmp_path, RUN).release()
    with pytest.raises(ArtifactError, match=sentence):
        JobFolder(tmp_path, RUN | change)
    JobFolder(tmp_path, RUN).release()  # and the refused run has neither changed nor locked it


def test_a_folder_of_somebody_elses_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ArtifactError, match=r"is not empty \(thesis.tex\)"):
        JobFolder(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_flipped_byte_is_named_with_its_tensor_and_a_deleted_file_is_made_again(
    tmp_path: Path,
) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        publish(folder, 0)
        publish(folder, 1)
        path = tmp_path / layer_file(1)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: tensor v is not as"):
            folder.load_published()
        content[-1] ^= 1
        content[20] ^= 1
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: its header is not as"):
            folder.load_published()
        path.unlink()
        path.mkdir()
        with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: its header is not as"):
            folder.load_published()
        path.rmdir()
        assert list(folder.load_published()) == [0]


def test_a_boundary_counts_only_when_every_block_is_there(tmp_path: Path) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        blocks = {index: torch.full((4, 8), float(index)) for index in range(5)}
        for layer in (1, 2):
            boundary = folder.boundary(layer)
            boundary.mkdir()
            first, second = boundary_files(boundary, 2)
            save_blocks(first, {index: blocks[index] for index in (0, 2, 4)})
            if layer == 1:
                save_blocks(second, {index: blocks[index] for index in (1, 3)})
        assert folder.last_boundary(5, at_most=3) == 1
        assert folder.last_boundary(5, at_most=0) == 0
        # Three workers finish what two began.
        for index, path in enumerate(boundary_files(folder.boundary(2), 3)):
            save_blocks(path, {block: blocks[block] for block in range(index, 5, 3)})
        assert folder.last_boundary(5, at_most=3) == 2
        loaded = load_blocks(folder.boundary(2), [1, 4])
        assert {block: float(x[0, 0]) for block, x in loaded.items()} == {1: 1.0, 4: 4.0}
        folder.delete_boundaries(before=2)
        assert folder.last_boundary(5, at_most=3) == 2
        assert not folder.boundary(1).exists()


def test_a_damaged_boundary_is_named(tmp_path: Path) -> None:
    path = tmp_path / "worker-000-of-001.safetensors"
    save_blocks(path, {0: torch.ones(4, 8)})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged .*delete {tmp_path}"):
        load_blocks(tmp_path, [0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"null", "must hold a JSON object, not null"),
        (b"[" * 100_000, "is nested deeper than"),
        (b"", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["job.json", "part-00001.json", "source-00001.json"])
def test_a_damaged_file_of_the_job_is_named_with_what_to_delete(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        publish(folder, 1)
        assert folder.record_source(1, {"w": "a"}) is None
    (tmp_path / ".job" / name).write_bytes(content)

    def resume() -> None:
        with JobFolder(tmp_path, RUN) as folder:
            folder.load_published()
            folder.record_source(1, {"w": "a"})

    with pytest.raises(ArtifactError, match=rf"{name} {sentence}.*; delete .* and run again"):
        resume()


def test_a_record_whose_content_was_changed_is_refused(tmp_path: Path) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        file = publish(folder, 1)
        path = tmp_path / ".job" / "part-00001.json"
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"0.125", b"0.126"))
        with pytest.raises(ArtifactError, match="it was changed after it was written; delete it"):
            folder.load_published()
        content = json.loads(whole)
        del content["digest"]  # as earlier versions wrote it
        path.write_text(json.dumps(content))
        assert folder.load_published() == {1: file}


@pytest.mark.parametrize(
    "change", [{"file": "../../../../etc/passwd"}, {"layer": 7}, {"layer": "globals"}]
)
def test_a_record_of_another_file_than_its_own_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        publish(folder, 1)
        path = tmp_path / ".job" / "part-00001.json"
        content = json.loads(path.read_bytes())
        del content["digest"]
        content["record"] |= change
        path.write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=r"part-00001.json is damaged: it names .*; delete"):
            folder.load_published()


def test_the_first_source_tensor_that_differs_is_named(tmp_path: Path) -> None:
    with JobFolder(tmp_path, RUN) as folder:
        assert folder.record_source(3, {"a": "1", "b": "2"}) is None
    with JobFolder(tmp_path, RUN) as folder:
        assert folder.record_source(3, {"b": "2", "a": "1"}) is None
        assert folder.record_source(3, {"a": "1", "b": "3"}) == "b"
        assert folder.record_source(4, {"a": "7"}) is None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b"\xff" * 100), "is not a safetensors file"),
        (lambda path: os.truncate(path, 200), "is cut off"),
        (lambda path: save_tensors(path, {"block-00000": torch.ones(4, 8)}), "lacks block-00000"),
        (lambda path: save_blocks(path, {0: torch.ones(5, 8)}), r"is damaged .*\[5, 8\]"),
        (lambda path: save_blocks(path, {0: torch.ones(4, 8).half()}), "is damaged .*float16"),
        (lambda path: save_blocks(path, {1: torch.ones(4, 8)}), "lacks block-00000"),
    ],
)
def test_a_boundary_that_is_not_this_jobs_is_named(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    boundary = tmp_path / "boundary-00001"
    boundary.mkdir()
    path = boundary / "worker-000-of-001.safetensors"
    save_blocks(path, {0: torch.ones(4, 8)})
    assert load_blocks(boundary, [0], (4, 8))[0].shape == (4, 8)
    damage(path)
    with pytest.raises(ArtifactError, match=f"{sentence}.*; delete {boundary} and run again"):
        load_blocks(boundary, [0], (4, 8))


def test_the_ledgers_order_does_not_depend_on_who_notes_first() -> None:
    forward, backward = Ledger(), Ledger()
    notes = [("starved_expert", 2, "b"), ("starved_expert", 1, "z"), ("dead_channel", 2, "b")]
    for kind, layer, module in notes:
        forward.note(kind, layer, module, 3)  # type: ignore[arg-type]
    for kind, layer, module in reversed(notes):
        backward.note(kind, layer, module, 3)  # type: ignore[arg-type]
    forward.note("unseen_expert", 0, "a", 0)
    assert forward.entries() == backward.entries()
    assert [entry.layer for entry in forward.entries()] == [1, 2, 2]

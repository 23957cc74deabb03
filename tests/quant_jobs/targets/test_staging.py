"""Copies of an engine on local disks: verified, resumed, and nothing of others overwritten."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.disks import NotPermitted, mounted
from support.small_engines import make_small_engine, whole

from deepseek.errors import ArtifactError, OutputError
from quant_jobs.targets.local_copy import copy_engine
from quant_jobs.targets.staging import NodeCopy, StageReport, stage_engine


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    make_small_engine(tmp_path / "engine")
    return tmp_path / "engine"


def staging_of(local: Path) -> list[Path]:
    return list(local.parent.glob(f".{local.name}.*.staging"))


def test_a_copy_is_the_engine_and_a_second_one_copies_nothing(engine: Path, tmp_path: Path) -> None:
    local, seen = tmp_path / "disk" / "engine", []
    figures = copy_engine(engine, local, progress=lambda *counts: seen.append(counts))
    num_bytes = sum(path.stat().st_size for path in engine.glob("*.safetensors"))
    assert (figures.copied_bytes, figures.kept_bytes) == (num_bytes, 0)
    assert whole(local) == whole(engine)
    assert [path.name for path in local.parent.iterdir()] == ["engine"]
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    figures = copy_engine(engine, local)
    assert (figures.copied_bytes, figures.kept_bytes) == (0, num_bytes)


def test_a_copy_that_was_cut_off_goes_on_with_what_is_there(engine: Path, tmp_path: Path) -> None:
    local, last = tmp_path / "disk" / "engine", engine / "model-layer-00004.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{last} differs from what engine.json records; run"):
        copy_engine(engine, local)
    last.write_bytes(content)
    assert not local.exists()
    (staging,) = staging_of(local)
    assert sorted(whole(staging)) == [
        f"model-layer-{number:05d}.safetensors" for number in range(4)
    ]
    (staging / "model-layer-00002.safetensors").write_bytes(b"half")
    (staging / ".model-layer-00004.safetensors.0badcafe.tmp").write_bytes(b"half")
    figures = copy_engine(engine, local)
    assert (figures.copied_bytes, figures.kept_bytes) == (200_006, 300_004)
    assert whole(local) == whole(engine)
    assert staging_of(local) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
)
def test_what_a_whole_copy_has_lost_is_copied_again(
    engine: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    local = tmp_path / "disk" / "engine"
    copy_engine(engine, local)
    damage(local / "model-layer-00003.safetensors")
    (local / "config.json").write_bytes(b"")
    assert copy_engine(engine, local).copied_bytes == 100_003
    assert whole(local) == whole(engine)


def test_the_verdict_goes_along_and_is_taken_away_again(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine-copy"
    copy_engine(engine, local)
    for name in ("gate.json", "gate.json.sig"):
        (engine / name).write_bytes(b"passed")
    copy_engine(engine, local)
    assert whole(local) == whole(engine)
    (engine / "gate.json").write_bytes(b"failed")
    (engine / "gate.json.sig").unlink()
    copy_engine(engine, local)
    assert whole(local) == whole(engine)


def test_another_engine_and_other_files_are_refused_and_stay(engine: Path, tmp_path: Path) -> None:
    other, thesis = tmp_path / "other", tmp_path / "thesis"
    make_small_engine(other, seed=1)
    before = whole(other)
    with pytest.raises(
        ArtifactError, match=rf"{other} holds another engine \(.*; choose another -"
    ):
        copy_engine(engine, other)
    (other / "engine.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=rf"format_version .*; delete {other} first"):
        copy_engine(engine, other)
    assert whole(other) | {"engine.json": b""} == before | {"engine.json": b""}
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("...")
    with pytest.raises(ArtifactError, match=r"holds files of something else \(thesis.tex\) and no"):
        copy_engine(engine, thesis)
    assert sorted(whole(thesis)) == ["thesis.tex"]
    assert staging_of(thesis) == []


def test_a_stray_file_in_the_copy_is_named(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine-copy"
    copy_engine(engine, local)
    (local / "model-layer-00009.safetensors").write_bytes(b"stray")
    with pytest.raises(ArtifactError, match="model-layer-00009.safetensors is not part of this en"):
        copy_engine(engine, local)


def test_a_directory_inside_the_engine_and_a_file_in_the_way_are_refused(
    engine: Path, tmp_path: Path
) -> None:
    before = whole(engine)
    for inside in (engine, engine / "copy"):
        with pytest.raises(OutputError, match="the engine.*; choose another --stage"):
            copy_engine(engine, inside)
    assert whole(engine) == before
    (tmp_path / "file").write_text("...")
    with pytest.raises(OutputError, match="file is a file; --stage must name a directory"):
        copy_engine(engine, tmp_path / "file" / "copy")


def test_two_at_the_same_time_do_not_write_one_directory(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "copy"
    copy_engine(engine, local)
    handle = os.open(local, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match=r"another process; wait .*put \{node\} into the path"):
        copy_engine(engine, local)
    os.close(handle)
    copy_engine(engine, local)


def test_an_engine_of_another_digest_than_asked_for_is_refused(
    engine: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="is another engine on this node .*storage that all n"):
        copy_engine(engine, tmp_path / "copy", "0" * 64)


def test_a_disk_without_room_is_refused_before_anything_is_copied(
    engine: Path, tmp_path: Path
) -> None:
    try:
        with mounted(tmp_path / "disk", "size=200k") as disk:
            report = stage_engine(engine, disk / "copy", 0, lambda *_: None)
            assert list(disk.iterdir()) == []
    except NotPermitted as error:
        pytest.skip(str(error))
    (node,) = report.nodes
    assert node.problem is not None
    assert "needs 500.0 kB more of its disk, but only " in node.problem
    assert node.problem.endswith("free some space there or choose another --stage")
    with pytest.raises(OutputError, match=r"1 of 1 nodes have no copy of the engine: node .*needs"):
        report.check()


def test_without_ray_this_machine_alone_gets_a_copy_under_its_name(
    engine: Path, tmp_path: Path
) -> None:
    report = stage_engine(engine, tmp_path / "{node}" / "e", 0, lambda *_: None)
    report.check()
    local = tmp_path / socket.gethostname() / "e"
    assert whole(local) == whole(engine)
    assert [node.directory for node in report.nodes] == [str(local)]
    (line,) = report.describe()
    assert f"{local}, 500.0 kB copied and 0 bytes kept in " in line


def test_nodes_that_left_fail_nothing_and_others_are_named_with_their_reasons() -> None:
    good = NodeCopy(node="a" * 56, address="10.0.0.1", directory="/d", copied_bytes=5, seconds=1.0)
    gone = good.model_copy(update={"node": "b" * 56, "problem": "no copy", "has_left": True})
    StageReport(engine_digest="0", nodes=(good, gone)).check()
    full = good.model_copy(update={"node": "c" * 56, "problem": "the disk is full"})
    with pytest.raises(OutputError) as refused:
        StageReport(engine_digest="0", nodes=(good, gone, full)).check()
    assert str(refused.value) == (
        "1 of 2 nodes have no copy of the engine: node cccccccccccc (10.0.0.1): the disk is full"
    )

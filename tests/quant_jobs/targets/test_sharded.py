"""Engines of many files: what a run records, what the next one makes again, who is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.disks import NotPermitted, mounted
from support.file_makers import INPUTS, KEYS, NUM_FILES, SmallMaker, build

from deepseek.errors import ArtifactError, OutputError
from deepseek.files import sha256_file
from quant_jobs.targets.sharded import BuildFolder, BuiltFile, TaskRunner, build_files


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the maker notes what it makes."""
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def made(log: Path) -> dict[str, int]:
    """How often each key was made; the notes are taken away."""
    counts = {}
    for path in log.iterdir():
        counts[path.name] = path.read_text().count("made")
        path.unlink()
    return counts


def test_every_file_is_made_once_and_nothing_else_is_left(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    with BuildFolder(out, INPUTS) as folder:
        maker = SmallMaker(log)
        built = build_files(folder, KEYS, maker, 0, lambda *counts: seen.append(counts))
        assert folder.records() == built
        folder.remove()
    assert list(built) == list(KEYS)
    assert made(log) == dict.fromkeys(KEYS, 1)
    assert seen == [(done, NUM_FILES) for done in range(NUM_FILES + 1)]
    assert sorted(path.name for path in out.iterdir()) == [b.file for b in built.values()]


def test_the_next_run_makes_only_what_is_absent_damaged_or_was_never_recorded(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "out"
    with BuildFolder(out, INPUTS) as folder, pytest.raises(ArtifactError, match="layer 00009"):
        build_files(folder, KEYS, SmallMaker(log, damaged="00009"), 0, lambda *_: None)
    assert sorted(made(log)) == list(KEYS[:9])
    whole = {path.name: path.read_bytes() for path in out.glob("model-*")}

    (out / "model-00001.safetensors").unlink()
    flipped = bytearray(whole["model-00003.safetensors"])
    flipped[100] ^= 1
    (out / "model-00003.safetensors").write_bytes(flipped)
    (out / "model-00005.safetensors").unlink()
    (out / "model-00005.safetensors").symlink_to("/etc/hostname")
    os.truncate(out / "model-00006.safetensors", 100)
    (out / ".build" / "part-00004.json").unlink()
    (out / ".model-00007.safetensors.0badcafe.tmp").write_bytes(b"half")
    notes: list[str] = []
    with BuildFolder(out, INPUTS) as folder:
        built = build_files(folder, KEYS, SmallMaker(log), 0, lambda *_: None, note=notes.append)
        folder.remove()
    again = ["00001", "00003", "00004", "00005", "00006"]
    assert sorted(made(log)) == [*again, *KEYS[9:]]
    assert len(notes) == 4
    assert notes[0] == "model-00001.safetensors is absent or damaged and is made again"
    assert {path.name for path in out.iterdir()} == {b.file for b in built.values()}
    assert whole.items() <= {path.name: path.read_bytes() for path in out.iterdir()}.items()
    assert not (out / "model-00005.safetensors").is_symlink()


def test_files_of_a_finished_engine_are_verified_and_repaired_with_the_same_bytes(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "out"
    known = build(out, SmallMaker(log))
    made(log)
    (out / "engine.json").write_text("{}")

    def again(maker: SmallMaker) -> dict[str, BuiltFile]:
        with BuildFolder(out, INPUTS) as folder:
            built = build_files(folder, KEYS, maker, 0, lambda *_: None, known)
            folder.remove()
            return built

    assert again(SmallMaker(log)) == known
    assert made(log) == {}
    path = out / known["00002"].file
    whole = path.read_bytes()
    path.unlink()
    assert again(SmallMaker(log)) == known
    assert (made(log), path.read_bytes()) == ({"00002": 1}, whole)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{path} was lost or damaged, and the one built aga"):
        again(SmallMaker(log, seed=1))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tp": 4}, r"holds an unfinished build with another tp \(8, now 4\)"),
        ({"checkpoint": "b" * 64}, r"another checkpoint \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)"),
        ({"ep": 2}, r"another ep \(null, now 2\)"),
    ],
)
def test_an_output_of_another_build_is_refused(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    BuildFolder(tmp_path, INPUTS).__exit__()
    with pytest.raises(ArtifactError, match=sentence + "; choose another --output or delete it"):
        BuildFolder(tmp_path, INPUTS | change)
    BuildFolder(tmp_path, INPUTS).__exit__()  # the refused one has neither changed nor locked it


def test_a_folder_of_somebody_elses_files_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ArtifactError, match=r"is not empty \(thesis.tex\) and not an output of b"):
        BuildFolder(tmp_path, INPUTS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="thesis.tex is a file; --output must name a directory"):
        BuildFolder(tmp_path / "thesis.tex", INPUTS)


@pytest.mark.heavy
def test_a_second_build_is_refused_while_the_first_one_runs_and_not_after(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from quant_jobs.targets.sharded import BuildFolder\n"
        f"folder = BuildFolder(Path(sys.argv[1]), {INPUTS!r})\n"
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
        with pytest.raises(ArtifactError, match=rf"written by another build \(process {other.pid}"):
            BuildFolder(tmp_path / "out", INPUTS)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    BuildFolder(tmp_path / "out", INPUTS).__exit__()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda raw: b"[1]", r"part-00001.json must hold a JSON object, not a list"),
        (lambda raw: b"\xff", r"part-00001.json is not UTF-8 text"),
        (lambda raw: raw.replace(b"65536", b"65537"), "it was changed after it was written"),
        (lambda raw: b"{}", r"part-00001.json is damaged; delete it and run again"),
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, log: Path, damage: object, sentence: str
) -> None:
    with BuildFolder(tmp_path / "out", INPUTS) as folder:
        build_files(folder, KEYS[:2], SmallMaker(log), 0, lambda *_: None)
        path = folder.path / "part-00001.json"
        path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
        with pytest.raises(ArtifactError, match=sentence):
            build_files(folder, KEYS, SmallMaker(log), 0, lambda *_: None)


@pytest.mark.parametrize("change", [{"file": "../../x"}, {"file": ".lock"}, {"key": "00000"}])
def test_a_record_of_another_file_than_its_own_is_refused(
    tmp_path: Path, change: dict[str, str]
) -> None:
    built = {"key": "00001", "file": "a", "num_bytes": 1, "sha256": "0" * 64, "bytes_read": 1}
    with BuildFolder(tmp_path / "out", INPUTS) as folder:
        folder.save(BuiltFile.model_validate(built | change))
        written = next(folder.path.glob("part-*.json"))
        written.rename(folder.path / "part-00001.json")
        with pytest.raises(ArtifactError, match=r"part-00001.json is damaged: it names the file"):
            folder.records()


def test_damaged_inputs_are_named_with_what_to_delete(tmp_path: Path) -> None:
    BuildFolder(tmp_path, INPUTS).__exit__()
    (tmp_path / ".build" / "build.json").write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match=rf"build.json must hold a JSON obj.*delete {tmp_path}"):
        BuildFolder(tmp_path, INPUTS)


def test_a_disk_that_fills_up_ends_the_build_and_the_same_command_goes_on(
    tmp_path: Path, log: Path
) -> None:
    try:
        with mounted(tmp_path / "disk", "size=1m") as disk:
            filler = disk / "filler"
            filler.write_bytes(bytes(600_000))
            with pytest.raises(
                OutputError, match=r"cannot be written: the disk is full .*free som"
            ):
                build(disk / "out", SmallMaker(log))
            assert not list((disk / "out").glob(".*.tmp"))
            first = made(log)
            assert 0 < len(first) < NUM_FILES
            filler.unlink()
            built = build(disk / "out", SmallMaker(log))
            assert made(log).keys() == set(KEYS) - first.keys()
            assert {path.name for path in (disk / "out").iterdir()} == {
                file.file for file in built.values()
            }
    except NotPermitted as error:
        pytest.skip(str(error))


def test_a_node_that_does_not_see_the_output_is_named(tmp_path: Path, log: Path) -> None:
    with BuildFolder(tmp_path / "out", INPUTS) as folder:
        digest = sha256_file(folder.path / "build.json")
        runner = TaskRunner(SmallMaker(log), folder.output, digest)
        assert runner.node_of("00001") is None
        runner.start("00001", "abc", "10.0.0.7")
        assert runner.node_of("00001") == "abc"
        runner.forget_node("00001")
        assert runner.node_of("00001") is None
        for output, inputs in ((tmp_path / "elsewhere", digest), (folder.output, "0" * 64)):
            with pytest.raises(
                OutputError, match=rf"{output} on node 10.0.0.7 is not the dir.*all"
            ):
                TaskRunner(SmallMaker(log), output, inputs).start("00001", "abc", "10.0.0.7")

"""Outputs that cannot be written: one sentence each, and nothing half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from support.disks import NotPermitted, fill, limited_files, mounted

from deepseek.errors import OutputError
from deepseek.files import published_file, write_atomic
from deepseek.outputs import (
    check_apart,
    check_directory,
    check_space,
    check_writable,
    make_directory,
    writing,
)
from deepseek.tensor_files import save_tensors


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"the disk is full \(the file takes 2\.00 MB, .* are free\); free some"),
        (errno.EDQUOT, "the disk quota is used up; free some of it or have it raised"),
        (
            errno.EFBIG,
            r"it would be larger than a file may be here \(the file takes 2\.00 MB\); r",
        ),
        (errno.EROFS, "the file system is read-only; mount it for writing or choose another"),
        (errno.EACCES, "this user may not write there; change the permissions"),
        (errno.ENAMETOOLONG, "its name is too long; choose a shorter one"),
        (errno.EIO, r"the storage failed \(input/output error\); see the state of the disk"),
        (errno.ESTALE, r"the storage failed \(stale file handle\); mount it again"),
        (errno.ENOLCK, "its file system has no locks; choose storage that supports flock"),
        (errno.EXDEV, "Invalid cross-device link; correct that"),
    ],
)
def test_every_refusal_names_the_file_the_reason_and_the_remedy(
    tmp_path: Path, code: int, words: str
) -> None:
    sentence = rf"layer\.bin cannot be written: {words}.*, then run the same command again to go on"
    with pytest.raises(OutputError, match=sentence), writing(tmp_path / "layer.bin", 2_000_000):
        raise OSError(code, os.strerror(code))


def test_a_mistake_in_the_program_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), writing(tmp_path):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("file", "file is a file; --output must name a directory"),
        ("file/below/it", "file is a file; --output must name a directory"),
        ("link", "link is a link to nowhere, which leads nowhere; --output must name"),
        ("link/below", "link is a link to nowhere, which leads nowhere"),
        ("circle", "circle cannot be written: its path has links in a circle"),
        ("n" * 300, "cannot be written: its name is too long"),
        ("a\0b", r"a\\x00b' is no name of a file"),
    ],
)
def test_an_impossible_directory_is_refused_by_what_is_in_the_way(
    tmp_path: Path, place: str, sentence: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())
    for check in (check_directory, make_directory):
        with pytest.raises(OutputError, match=sentence):
            check(tmp_path / place)
    assert sorted(tmp_path.iterdir()) == before
    make_directory(tmp_path / "new" / "one")
    make_directory(tmp_path / "new" / "one")
    check_writable(tmp_path / "new" / "one")
    assert not list((tmp_path / "new" / "one").iterdir())


def test_an_output_inside_its_source_is_refused_whatever_links_lead_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "alias").symlink_to("model")
    with pytest.raises(OutputError, match="alias is the model itself; choose another --output"):
        check_apart(tmp_path / "alias", tmp_path / "model", "the model")
    with pytest.raises(OutputError, match="out is inside the model; choose another --output"):
        check_apart(tmp_path / "alias" / "out", tmp_path / "model", "the model")
    check_apart(tmp_path / "model-int4", tmp_path / "model", "the model")
    check_apart(tmp_path, tmp_path / "model", "the model")


def test_a_file_beyond_the_limit_leaves_the_old_one_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_atomic(path, b"old")
    with (
        limited_files(1000),
        pytest.raises(OutputError, match=rf"{path} cannot .*\(the file takes 4\.1. kB\); raise"),
    ):
        save_tensors(path, {"x": torch.ones(1000)})
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
        (path.name, b"old")
    ]
    assert save_tensors(path, {"x": torch.ones(1000)}).num_bytes == path.stat().st_size


def test_a_full_disk_says_what_the_file_takes_and_what_is_free(tmp_path: Path) -> None:
    try:
        with mounted(tmp_path / "disk", "size=64k") as disk:
            filler = fill(disk)
            with pytest.raises(
                OutputError, match=r"a\.bin cannot .*\(the file takes 30\.0 kB, 0 bytes are free\)"
            ):
                write_atomic(disk / "a.bin", bytes(30_000))
            assert list(disk.iterdir()) == [filler]
            filler.unlink()
            write_atomic(disk / "a.bin", bytes(30_000))
    except NotPermitted as error:
        pytest.skip(str(error))


def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    try:
        with mounted(tmp_path / "disk", "ro") as disk:
            for refused in (make_directory, check_writable):
                with pytest.raises(OutputError, match="the file system is read-only"):
                    refused(disk / "out" if refused is make_directory else disk)
    except NotPermitted as error:
        pytest.skip(str(error))


def test_a_name_as_long_as_a_name_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomic(path, b"x")
    assert path.read_bytes() == b"x"


def test_what_else_fails_while_a_file_is_open_is_not_taken_for_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the source") as raised, published_file(tmp_path / "a"):
        raise OSError(errno.EIO, "of the source")
    assert not isinstance(raised.value, OutputError)
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_with_both_numbers_unless_the_disk_does_not_tell(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        OutputError, match=r"out needs 1000000000\.0 GB more .* only .* are free; .* or pray"
    ):
        check_space(tmp_path / "new" / "out", 10**18, "pray")
    check_space(tmp_path / "new" / "out", 1, "pray")
    check_space(Path("/proc/self"), 10**18, "pray")  # /proc has no size

"""Where outputs go: one sentence for whatever keeps a file from being written, and checks before
work begins.

The operating system says why a write fails as an `OSError`. `writing` turns it into an
`OutputError` that names the file, the reason, the sizes where they are known, and the remedy; it is
the one place where that happens. `files.py` publishes through it, and so does all other code that
makes, renames or deletes something. Every sentence ends with what to do before the same command
runs again. This file imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from deepseek.errors import OutputError

#: errno -> what happened, and what to do about it.
_REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space there"),
    errno.EDQUOT: ("the disk quota is used up", "free some of it or have it raised"),
    errno.EFBIG: (
        "it would be larger than a file may be here",
        "raise the limit (ulimit -f, or the file system's own)",
    ),
    errno.EROFS: (
        "the file system is read-only",
        "mount it for writing or choose another place",
    ),
    errno.EACCES: (
        "this user may not write there",
        "change the permissions or choose another place",
    ),
    errno.EPERM: (
        "this user may not write there",
        "change the permissions or choose another place",
    ),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.ENOTDIR: ("part of its path is not a directory", "choose another place"),
    errno.EISDIR: ("a directory of that name is in the way", "remove it or choose another place"),
    errno.EEXIST: ("something else of that name is in the way", "remove it"),
    errno.ENOTEMPTY: ("a directory that is not empty is in the way", "remove it"),
    errno.ENOENT: ("its directory is gone", "see what removed it"),
    errno.ELOOP: ("its path has links in a circle", "correct them or choose another place"),
    errno.EIO: ("the storage failed (input/output error)", "see the state of the disk or mount"),
    errno.ESTALE: ("the storage failed (stale file handle)", "mount it again"),
    errno.ENOLCK: ("its file system has no locks", "choose storage that supports flock"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
}


@contextlib.contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Around what creates, writes, renames or deletes `path`, and nothing else. `num_bytes` is the
    size that the file is to have, for the sentence where there is no room for it.

    Raises:
        OutputError: the operating system refuses it.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(_sentence(path, error, num_bytes)) from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise OutputError(f"{str(path)!r} is no name of a file; correct it") from error


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, where they are absent.

    Raises:
        OutputError: it cannot be made; the sentence names what is in the way.
    """
    check_directory(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_directory(path: Path, option: str = "--output") -> None:
    """Check that `path` is a directory or that nothing stands where it or one above it has to be.
    Makes nothing. `option` is what the user named it with.

    Raises:
        OutputError: a file, or a link that leads nowhere, is in the way, or the name is impossible.
    """
    with writing(path):
        for place in reversed((path, *path.parents)):
            try:
                is_directory = stat.S_ISDIR(os.stat(place).st_mode)
            except FileNotFoundError:
                if not place.is_symlink():
                    return
                is_directory = False
            if not is_directory:
                raise OutputError(f"{place} is {_kind(place)}; {option} must name a directory")


def check_apart(output: Path, source: Path, what: str, option: str = "--output") -> None:
    """Check that `output` is not the directory `source` nor inside it. `what` is what `source` is,
    `option` what the user named `output` with.

    Raises:
        OutputError: it is.
    """
    with writing(output):
        inside = Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source))
    if inside:
        same = os.path.realpath(output) == os.path.realpath(source)
        raise OutputError(
            f"{output} is {'' if same else 'inside '}{what}{' itself' if same else ''}; choose "
            f"another {option}"
        )


def check_writable(directory: Path) -> None:
    """Check that files can be made in a directory, or in the one above it that exists, before work
    begins whose result goes there.

    Raises:
        OutputError: they cannot.
    """
    with writing(directory):
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        probe = place / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()


def check_space(place: Path, needed_bytes: int, remedy: str) -> None:
    """Check that the disk has room for `needed_bytes` more bytes in or at `place`, which need not
    exist yet. A file system that does not tell its size (some network mounts) counts as large
    enough. `remedy` says what to do besides freeing space.

    Raises:
        OutputError: it has less; the sentence has both numbers.
    """
    usage = _usage(place)
    if usage is not None and usage[1] < needed_bytes:
        raise OutputError(
            f"{place} needs {format_bytes(needed_bytes)} more of its disk, but only "
            f"{format_bytes(usage[1])} are free; free some space there or {remedy}"
        )


def format_bytes(number: int) -> str:
    """`1.23 GB`, `45.6 MB`, `678 bytes`: enough digits to compare two sizes."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.{2 if number < 10 * size else 1}f} {unit}"
    return f"{number} bytes"


def _usage(place: Path) -> tuple[int, int] | None:
    """Total and free bytes of the file system that `place` is on or would be on; None where it
    does not tell."""
    parent = next((path for path in (place, *place.absolute().parents) if path.exists()), None)
    if parent is None:
        return None
    try:
        usage = shutil.disk_usage(parent)
    except OSError:
        return None
    return (usage.total, usage.free) if usage.total else None


def _sentence(path: Path, error: OSError, num_bytes: int | None) -> str:
    unknown = (error.strerror or str(error), "correct that")
    reason, remedy = _REASONS.get(error.errno or 0, unknown)
    sizes = ""
    if error.errno == errno.ENOSPC:
        usage = _usage(path.parent)
        free = "" if usage is None else f"{format_bytes(usage[1])} are free"
        needed = "" if num_bytes is None else f"the file takes {format_bytes(num_bytes)}"
        sizes = ", ".join(part for part in (needed, free) if part)
    elif error.errno == errno.EFBIG and num_bytes is not None:
        sizes = f"the file takes {format_bytes(num_bytes)}"
    detail = f" ({sizes})" if sizes else ""
    again = "then run the same command again to go on"
    return f"{path} cannot be written: {reason}{detail}; {remedy}, {again}"


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which leads nowhere"
    return "a file"

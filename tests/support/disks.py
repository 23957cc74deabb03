"""Disks that refuse to be written: a limit on the size of files, and a small disk that is full."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


class NotPermitted(Exception):
    """File systems cannot be mounted here; says why."""


@contextlib.contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes` (EFBIG), as under `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A disk in memory at `place`, mounted with `options` (`size=100k`, `ro`).

    Raises:
        NotPermitted: this process may not mount.
    """
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "intserve", str(place)]
    try:
        subprocess.run(words, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NotPermitted("the command `mount` is not installed") from None
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"{' '.join(words)}: {error.stderr.strip()}") from None
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=True)


def fill(place: Path) -> Path:
    """Take all free space of the disk that `place` is on; returns the file that has it."""
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler

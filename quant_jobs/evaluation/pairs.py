"""A record and its values: a JSON file that names the SHA-256 of the tensor file beside it.

An evaluation, a stored reference and the measurement of a service are such pairs. The two files are
published together and the values are verified when they are read. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.outputs import make_directory, writing
from deepseek.untrusted import UnusableFileError


@contextmanager
def publishing(directory: Path, *, values: str, record: str) -> Iterator[Path]:
    """A folder in `directory` for the two files, which take the place of an earlier pair when both
    are whole: a disk that is full costs neither.

    Raises:
        OutputError: the folder cannot be made, or the files not put in place.
    """
    staging = directory / f".{secrets.token_hex(4)}.tmp"
    try:
        make_directory(staging)
        yield staging
        with writing(directory / record):
            # A run that is killed between the two leaves no old record beside new values.
            (directory / record).unlink(missing_ok=True)
            for name in (values, record):
                os.replace(staging / name, directory / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_values(path: Path, *, sha256: str, record: str, max_bytes: int, remedy: str) -> bytes:
    """The content of a file of values, verified against what the `record` beside it names.

    Raises:
        ArtifactError: it is absent, no regular file, too long, or another one; with the remedy.
    """
    try:
        data = untrusted.read_bytes(path, root=path.parent, max_bytes=max_bytes)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; {remedy}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path} is not the one that {record} beside it names; {remedy}")
    return data

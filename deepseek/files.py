"""Files on disk: whole or absent, and the same bytes for the same content.

IntServe publishes every file through this module. A file is written under a temporary name in the
same directory, synced, then renamed, so that a reader sees all of it or nothing. Tensors are in
`tensor_files.py`; this file imports no torch, so that a manifest can be read without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.outputs import writing
from deepseek.untrusted import UnusableFileError

#: Bytes per read.
CHUNK_BYTES = 1 << 22


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all, also after a power cut.

    Raises:
        OutputError: see `published_file`; so for all functions here that write.
    """
    with published_file(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read: sorted keys, two spaces, a final newline; atomically."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object from a file that should be one that IntServe wrote; `hint` ends the
    sentence where there is no such file.

    Raises:
        ArtifactError: it cannot be read, is not JSON, or is not an object.
    """
    try:
        return untrusted.read_json_object(path, root=path.parent)
    except UnusableFileError as error:
        change = "restore it or make it again" if os.path.lexists(path) else hint
        raise ArtifactError(f"{path} {error}; {change}") from error


def canonical_json(value: Any) -> bytes:
    """The serialization of a JSON value from which digests are computed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def remove_scraps(directory: Path) -> None:
    """Delete the temporary files of killed writers. The caller knows that no writer is running."""
    for path in directory.glob(".*.tmp"):
        if path.is_file():
            with writing(path):
                path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_intact(path: Path, num_bytes: int, sha256: str) -> bool:
    """Whether a regular file, or a link to one beside it, is there with this size and SHA-256.
    Reads it whole. A file that cannot be read counts as damaged: its bytes are not to be had."""
    try:
        descriptor = untrusted.open_regular(path, root=path.parent)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size != num_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except (OSError, UnusableFileError):
        return False


@contextlib.contextmanager
def published_file(path: Path, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A writable file under a temporary name. It is renamed to `path` when the block ends without
    an exception, and deleted otherwise. `num_bytes` is the size that it is to have, if known.

    Raises:
        OutputError: the disk is full, read-only, or otherwise refuses the file; nothing is left of
            it, and what was at `path` before is still there.
    """
    # The name is random because processes of several nodes may share the directory; and short,
    # because that of `path` may be as long as a name can be.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    with writing(path, num_bytes):
        raw = _RawFile(temporary, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            with writing(path, num_bytes):
                os.fsync(file.fileno())
        with writing(path, num_bytes):
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        if error is raw.error:
            with writing(path, num_bytes):
                raise
        raise
    with writing(path):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class _RawFile(io.FileIO):
    """Remembers which error a write met, so that what else happens while the file is open (reading
    the values to be written, say) is not taken for one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise

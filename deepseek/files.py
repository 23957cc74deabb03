"""Files on disk: whole or absent, and the same bytes for the same content.

IntServe publishes every file through this module. A file is written under a temporary name in the
same directory, synced, then renamed, so that a reader sees all of it or nothing. Tensors are in
`tensor_files.py`; this file imports no torch, so that a manifest can be read without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.untrusted import UnusableFileError

#: Bytes per read.
CHUNK_BYTES = 1 << 22


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all, also after a power cut."""
    with published_file(path) as file:
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
        path.unlink()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[BinaryIO]:
    """A writable file under a temporary name. It is renamed to `path` when the block ends without
    an exception, and deleted otherwise."""
    # The name is random because processes of several nodes may share the directory.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

"""Bytes on disk: whole or absent, and the same for the same content.

Everything that IntServe publishes goes through here. A file is written under a temporary name in
the same directory, synced, then renamed, so that a reader sees all of it or nothing. Tensors are in
`tensor_files.py`: this file imports no torch, so that who only reads a manifest need not.
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

from deepseek.errors import ArtifactError

#: Bytes of a file that are read at once.
CHUNK_BYTES = 1 << 22


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all, also after a power cut."""
    with published_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read: sorted keys, two spaces, a final newline; atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file of ours; `hint` says what to do when it is not there.

    Raises:
        ArtifactError: it cannot be read, is not JSON, or is not an object.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def canonical_json(value: Any) -> bytes:
    """The one serialization of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def remove_scraps(directory: Path) -> None:
    """Delete temporary files that killed writers left; only when no other writer is at work."""
    for path in directory.glob(".*.tmp"):
        path.unlink()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name that takes its own name only when the block ends well."""
    # Random, because processes of several nodes may share the directory.
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

"""The documents beside the tensors of an artifact or an engine, and what else may lie there.

A document is read once: its bytes are checked, and the same bytes are copied, parsed or handed on,
so that nothing is used that was not checked. From a source only the files of `COPIED_FILES` are
taken, data and never code. In the directory of an artifact or an engine every document is listed in
the manifest with its SHA-256, and nothing lies there that is not: loaders, ours and those of other
projects, find chat templates, added tokens, adapters and code by name. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deepseek import untrusted
from deepseek.errors import ArtifactError, CheckpointError
from deepseek.untrusted import UnusableFileError

#: Files that are copied from the source where it has them. No code is ever copied.
COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

#: What no loader reads: hidden files (also of git and of the hub's clients), and what a model page
#: consists of.
_HARMLESS = re.compile(
    r"[.].*|[\w-]+[.]md|(LICEN[SC]E|NOTICE|COPYING)(-\w+)?([.]txt)?", re.ASCII | re.DOTALL
)


def read_copied(directory: Path) -> dict[str, bytes]:
    """The files of `COPIED_FILES` that a source has, by name: regular files of at most
    `untrusted.MAX_FILE_BYTES`, links only within the directory, JSON where the name says so.

    Raises:
        CheckpointError: one cannot be copied; the sentence names it.
    """
    found: dict[str, bytes] = {}
    for name in COPIED_FILES:
        path = directory / name
        if not os.path.lexists(path):
            continue
        try:
            found[name] = data = untrusted.read_bytes(path, root=directory)
            if name.endswith(".json"):
                untrusted.parse_json_object(data)
            elif not name.endswith(".model"):
                untrusted.decode_text(data)
        except UnusableFileError as error:
            raise CheckpointError(
                f"{path} {error}; it would go into the artifact, so correct or remove it"
            ) from error
    return found


def read_listed(
    directory: Path, listed: Mapping[str, str], allowed: Collection[str], *, manifest: str
) -> dict[str, bytes]:
    """The documents that a manifest lists by SHA-256, each verified. `manifest` is its name.

    Raises:
        ArtifactError: one is absent, differs, is no regular file, or is none of `allowed`, the
            names that such a manifest lists; the sentence names it.
    """
    found: dict[str, bytes] = {}
    for name, sha256 in listed.items():
        path = directory / name
        if name not in allowed:
            raise ArtifactError(
                f"{directory / manifest} lists the file {name}, which is none that IntServe "
                "writes; make it again"
            )
        if not os.path.lexists(path):
            raise ArtifactError(f"{path} is absent; restore it or make {directory} again")
        try:
            found[name] = data = untrusted.read_bytes(path, root=directory)
        except UnusableFileError as error:
            raise ArtifactError(f"{path} {error}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArtifactError(
                f"{path} differs from what {manifest} records; restore it or make {directory} again"
            )
    return found


def document_object(directory: Path, documents: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object of one of the documents that `read_listed` returned.

    Raises:
        ArtifactError: it is not among them, or is not a JSON object.
    """
    if name not in documents:
        raise ArtifactError(f"{directory} lists no {name} in its manifest; make it again")
    try:
        return untrusted.parse_json_object(documents[name])
    except UnusableFileError as error:
        raise ArtifactError(f"{directory / name} {error}; make {directory} again") from error


def check_tensor_file(path: Path, num_bytes: int, root: Path) -> None:
    """Check that a tensor file is a regular file of this size, before it is opened.

    Raises:
        ArtifactError: it is absent, something else, outside `root`, or of another size.
    """
    if not os.path.lexists(path):
        raise ArtifactError(f"{path} is absent; restore it or make {root} again")
    try:
        descriptor = untrusted.open_regular(path, root=root)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}") from error
    try:
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size != num_bytes:
        raise ArtifactError(
            f"{path} has {size} bytes instead of {num_bytes}; restore it or make {root} again"
        )


def check_nothing_else(directory: Path, known: Collection[str], *, what: str) -> None:
    """Check that the directory holds nothing but `known` names and files that no loader reads
    (hidden ones, README.md, licenses). `what` is "artifact" or "engine".

    Raises:
        ArtifactError: it holds more, the sentence names it; or it cannot be listed.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be listed ({error.strerror})") from error
    for name in names:
        if name not in known and not _HARMLESS.fullmatch(name):
            raise ArtifactError(
                f"{directory / name} is not part of this {what}, yet a loader may take it for a "
                "part; remove it"
            )

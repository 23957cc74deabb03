"""The files of a source checkpoint: config.json aside, its index and its shards, by name.

The index is read whole and checked before a shard is opened: every name is text, every shard is the
name of a file in the directory itself. This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.errors import CheckpointError
from deepseek.limits import MAX_TENSORS
from deepseek.untrusted import (
    UnusableFileError,
    json_kind,
    parse_json_object,
    read_bytes,
    show,
    show_name,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class Listing:
    """The shards of a checkpoint.

    `shards` maps each file to the tensors that the index lists there, None where there is no index.
    `index` is the index as stored, empty without one. `total_size` is what its metadata says; by
    convention the bytes of the tensors, but the index of DeepSeek-V3 has twice the number of
    elements, and others have 0 or the bytes of the files. It binds nothing.
    """

    shards: dict[str, frozenset[str] | None]
    index: bytes
    total_size: Any


def list_shards(directory: Path) -> Listing:
    """Read the index of a checkpoint, or find its single file.

    Raises:
        CheckpointError: there is neither; or the index is malformed, or names what is no file of
            the directory.
    """
    path = directory / INDEX_FILE
    # A dangling link to an index is an index that cannot be read, not a checkpoint without one.
    if not path.exists() and not path.is_symlink():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{directory} holds neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors "
                "checkpoints are read"
            )
        return Listing({SINGLE_FILE: None}, b"", None)
    try:
        content = read_bytes(path, root=directory)
        index = parse_json_object(content)
    except UnusableFileError as error:
        raise CheckpointError(f"{path} is not a safetensors index: it {error}") from error
    metadata = index.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Listing(dict(_shards(path, index.get("weight_map"))), content, total_size)


def _shards(path: Path, weight_map: Any) -> dict[str, frozenset[str]]:
    """The names by shard, from the index's `weight_map`."""
    if not isinstance(weight_map, dict) or not weight_map:
        found = "an empty object" if weight_map == {} else json_kind(weight_map)
        raise CheckpointError(
            f"{path} is not a safetensors index: weight_map must map each tensor to its shard, and "
            f"is {found}; download the index again"
        )
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} lists {len(weight_map):,} tensors, more than the {MAX_TENSORS:,} of any model "
            "that is read"
        )
    names: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{path} is not a safetensors index: the shard of {show_name(name)} must be the "
                f"name of a file, not {json_kind(shard)}; download the index again"
            )
        names.setdefault(shard, set()).add(name)
    for shard in names:
        if not shard or not shard.isprintable() or len(shard) > _MAX_NAME:
            raise CheckpointError(
                f"{path} names the shard {show(shard)}, which is no file's name; download the "
                "index again"
            )
        if Path(shard).name != shard or shard == "..":
            raise CheckpointError(
                f"{path} names the shard {show(shard)} outside its own directory; put the shards "
                "beside the index and name them without a folder"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the shard {show_name(shard)}; only .safetensors files are read"
            )
    return {shard: frozenset(tensors) for shard, tensors in names.items()}

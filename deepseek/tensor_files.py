"""Safetensors files: equal tensors give equal bytes, and a header is checked when it is read.

`save_tensors` replaces the library's `save_file` for three reasons: tensors are written one by one
(no second copy of a layer in memory), the bytes do not depend on the order of a hash map, and the
digests are computed while writing. Tensor data are read by `safetensors.safe_open`; only the header
is parsed here, because its bytes are part of digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek.files import CHUNK_BYTES, published_file
from deepseek.untrusted import UnusableFileError, json_kind, open_regular, show, show_name

#: Safetensors' names of the data types that appear in our files.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Bytes of a cache line. Kernels crash or round differently on tensors that begin within one.
ALIGNMENT = 64

#: Longest header that is read. The largest of the release has 76 KB; the whole of DeepSeek-V3 in
#: one file would need 11.9 MB and Kimi-K2 18 MB. safetensors itself allows 100 MB.
MAX_HEADER_BYTES = 32 << 20
#: A header above this size must look like a table of tensors before it is parsed: at most one
#: character in eight is punctuation of JSON (in a true one, one in twelve).
_SMALL_HEADER_BYTES = 1 << 20
_MAX_DIMENSIONS = 8
_MAX_OFFSET = 1 << 62

#: Types of safetensors that no model of the family has and nothing here reads.
_UNSUPPORTED = (
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("U16", "U32", "U64", "C64"),
)


class DamagedFileError(Exception):
    """A damaged safetensors file. The caller puts the name of the file before the message."""


class UnsupportedTypeError(DamagedFileError):
    """A whole safetensors file with a tensor of a type that is not read here."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it; `begin` and `end` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one safetensors file. `raw` is the length prefix and the JSON text;
    `sha256` is computed over it."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    raw: bytes
    file_bytes: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()


@dataclass(frozen=True, slots=True)
class SavedFile:
    """What `save_tensors` wrote: digests in hex, size in bytes, digest of each tensor by name."""

    sha256: str
    header_sha256: str
    num_bytes: int
    tensors: dict[str, str]


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> SavedFile:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes.

    The data begin at a multiple of 64 bytes. Tensors whose size is a multiple of 64 bytes come
    first, so that kernels can use them as they are mapped into memory. Within both groups the order
    is descending item size, then name, so that each tensor is aligned to its items. Tensors may
    have any strides and may be on any device; one tensor at a time is copied to the host.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order, raw, num_bytes = _lay_out(layout, metadata)

    file_digest = hashlib.sha256(raw)
    digests: dict[str, str] = {}
    with published_file(path, num_bytes) as file:
        file.write(raw)
        for name in order:
            tensor = tensors[name].detach().cpu()
            data = tensor_bytes(tensor)
            file.write(data)
            file_digest.update(data)
            digests[name] = _digest(tensor, data)
    return SavedFile(
        sha256=file_digest.hexdigest(),
        header_sha256=hashlib.sha256(raw).hexdigest(),
        num_bytes=num_bytes,
        tensors=dict(sorted(digests.items())),
    )


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, int]:
    """Write a safetensors file as `save_tensors` does, from tensors that are made one by one, and
    return the file's SHA-256 in hex and its size in bytes.

    `layout` maps each name to its type and shape. `make(name)` yields the values of one tensor in
    row-major order, in pieces of any size.

    Raises:
        OutputError: the file cannot be written.
    """
    order, raw, num_bytes = _lay_out(layout, metadata)
    digest = hashlib.sha256(raw)
    with published_file(path, num_bytes) as file:
        file.write(raw)
        for name in order:
            for piece in make(name):
                assert piece.dtype == layout[name][0], name
                data = tensor_bytes(piece)
                file.write(data)
                digest.update(data)
        assert file.tell() == num_bytes, "a tensor is not as long as announced"
    return digest.hexdigest(), num_bytes


def saved_bytes(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Size of the file that `save_tensors` would write, header included."""
    return _lay_out(layout, metadata)[2]


def read_header(path: Path, *, root: Path | None = None) -> Header:
    """Parse a safetensors header and check it: known types, no gaps, no overlaps, complete data.

    `root` is the directory that the file belongs to; a link must then end inside it
    (`untrusted.check_inside`).

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is not a complete safetensors file, or no regular file.
    """
    try:
        descriptor = open_regular(path, root=root)
    except UnusableFileError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise DamagedFileError(str(error)) from error
    with open(descriptor, "rb") as file:
        file_bytes = os.fstat(descriptor).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > file_bytes - 8:
            raise DamagedFileError("is not a safetensors file, or is cut off within its header")
        if length > MAX_HEADER_BYTES:
            raise DamagedFileError(
                f"has a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that any "
                "model of the family needs"
            )
        text = file.read(length)
    try:
        tensors, metadata = _parse_header(text, 8 + length)
    except (ValueError, RecursionError) as error:
        problem = "its header is nested without end" if isinstance(error, RecursionError) else error
        raise DamagedFileError(f"is not a safetensors file ({problem})") from error
    position = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise DamagedFileError(f"has a gap or an overlap before tensor {show_name(name)}")
        position = entry.end
    if position != file_bytes:
        raise DamagedFileError(
            f"has {file_bytes} bytes where its header announces {position}; it is cut off or "
            "was appended to"
        )
    return Header(tensors, metadata, prefix + text, file_bytes)


def read_tensor(file: FileIO, entry: TensorEntry) -> Tensor:
    """Read one tensor of an unbuffered safetensors file into newly allocated memory.

    Raises:
        OSError: it cannot be read.
        EOFError: the file has become shorter since its header was read.
    """
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    view = memoryview(data.numpy().data)
    position = 0
    while position < entry.num_bytes:
        chunk = view[position : position + CHUNK_BYTES]
        count = os.preadv(file.fileno(), [chunk], entry.begin + position)
        if not count:
            raise EOFError(f"it ends at {entry.begin + position} bytes")
        position += count
    return data.view(entry.dtype).view(entry.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a host tensor in row-major order as bytes; no copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """BLAKE2b-128 in hex over type, shape and values of a host tensor."""
    return _digest(tensor, tensor_bytes(tensor))


def _lay_out(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
) -> tuple[list[str], bytes, int]:
    """The order of the tensors, the length prefix with the header, and the file size in bytes."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
    order = sorted(
        layout, key=lambda name: (sizes[name] % ALIGNMENT != 0, -layout[name][0].itemsize, name)
    )
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = layout[name]
        end = offset + sizes[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    raw = len(text).to_bytes(8, "little") + text
    return order, raw, len(raw) + offset


def _digest(tensor: Tensor, data: memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
    digest.update(data)
    return digest.hexdigest()


def _parse_header(text: bytes, start: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the metadata of a header; `start` is the offset of the data in the file.

    Raises:
        ValueError, RecursionError: it is not JSON, or not the JSON of a header.
        UnsupportedTypeError: a tensor's type is one that is not read.
    """
    punctuation = sum(text.count(sign) for sign in (b"{", b"[", b",", b":"))
    if len(text) > _SMALL_HEADER_BYTES and punctuation > len(text) // 8:
        raise ValueError("its header is no table of tensors")
    parsed = json.loads(
        text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
    )
    if not isinstance(parsed, dict):
        raise ValueError(f"its header is {json_kind(parsed)}, not an object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise ValueError("__metadata__ must map names to text")
    return {name: _entry(name, value, start) for name, value in parsed.items()}, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _entry(name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {show_name(name)} must have dtype, shape and data_offsets")
    label, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        if isinstance(label, str) and label in _UNSUPPORTED:
            raise UnsupportedTypeError(
                f"holds tensor {show_name(name)} in the type {label}, which is not supported"
            )
        raise ValueError(f"tensor {show_name(name)} has the unknown type {show(label)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {show_name(name)} has the shape {show(shape)}, which is none")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {show_name(name)} has the data_offsets {show(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"tensor {show_name(name)} has {end - begin} bytes, which its shape contradicts"
        )
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of integers from 0 on that a file's size can hold."""
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < _MAX_OFFSET for size in value
    )

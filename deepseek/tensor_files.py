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
from typing import Any

import torch
from torch import Tensor

from deepseek.files import CHUNK_BYTES, published_file

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

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class DamagedFileError(Exception):
    """A damaged safetensors file. The caller puts the name of the file before the message."""


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
) -> None:
    """Write a safetensors file as `save_tensors` does, from tensors that are made one by one.

    `layout` maps each name to its type and shape. `make(name)` yields the values of one tensor in
    row-major order, in pieces of any size. No digests are computed.

    Raises:
        OutputError: the file cannot be written.
    """
    order, raw, num_bytes = _lay_out(layout, metadata)
    with published_file(path, num_bytes) as file:
        file.write(raw)
        for name in order:
            for piece in make(name):
                assert piece.dtype == layout[name][0], name
                file.write(tensor_bytes(piece))
        assert file.tell() == num_bytes, "a tensor is not as long as announced"


def saved_bytes(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Size of the file that `save_tensors` would write, header included."""
    return _lay_out(layout, metadata)[2]


def read_header(path: Path) -> Header:
    """Parse a safetensors header and check it: known types, no gaps, no overlaps, complete data.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is not a complete safetensors file.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise DamagedFileError("is not a safetensors file, or is cut off within its header")
        text = file.read(length)
    try:
        parsed = json.loads(text, object_pairs_hook=_no_duplicates)
        metadata = parsed.pop("__metadata__", {})
        start = 8 + length
        tensors = {name: _entry(name, value, start) for name, value in parsed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"is not a safetensors file ({error})") from error
    position = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise DamagedFileError(f"has a gap or an overlap before tensor {name}")
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries


def _entry(name: str, value: dict[str, Any], start: int) -> TensorEntry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown type {value['dtype']!r}")
    dtype = DTYPES[value["dtype"]]
    shape = tuple(int(size) for size in value["shape"])
    begin, end = value["data_offsets"]
    if any(size < 0 for size in shape) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} has {end - begin} bytes, which its shape contradicts")
    return TensorEntry(dtype, shape, start + begin, start + end)

"""Reads the source checkpoint layer by layer: a Hugging Face directory in the release's layout.

Opening reads the header of every shard, not its data, and checks all names, shapes and types
against the inventory, so that a missing, extra or misshapen tensor is named before a long job
starts. Reading a layer reads the bytes of that layer only. Two kinds of source are supported: the
release's FP8 e4m3 tiles with a `weight_scale_inv` per linear, and plain BF16, FP16 or FP32.
`deepseek/artifact/reader.py` reads IntServe's quantized checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError
from deepseek.formats import FP8_BLOCK, dequantize_fp8_block
from deepseek.formats.scales import row_chunks
from deepseek.inventory import TensorSpec, global_tensors, layer_tensors, tensors
from deepseek.tensor_files import (
    DTYPE_NAMES,
    DamagedFileError,
    Header,
    read_header,
    read_tensor,
    tensor_digest,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_log = logging.getLogger(__name__)

#: A table of rotary frequencies that older code saved with each layer. Kimi-K2 was released with
#: them (56 values, where its own code computes 32). The config says all that they could, so they
#: are no part of the model: not read, not counted, not written. vLLM and SGLang skip them too.
_ROTARY_TABLE = re.compile(r"model[.]layers[.]\d+[.]self_attn[.]rotary_emb[.]inv_freq")

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EDGE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor as the source stores it.

    `data` has the spec's shape. `scale_inv` is f32 [ceil(N/128), ceil(K/128)], the multiplier of
    each FP8 tile (the release names it an inverse, which it is not); None where `data` is not FP8.
    """

    spec: TensorSpec
    data: Tensor
    scale_inv: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes as stored, scales included."""
        return self.data.nbytes + (0 if self.scale_inv is None else self.scale_inv.nbytes)

    def bands(self) -> Iterator[SourceTensor]:
        """Yield bands of rows of a matrix, so that no caller needs all of it in float32 at once."""
        for rows in row_chunks(self.data, multiple=FP8_BLOCK):
            tile_rows = slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK))
            scale_inv = None if self.scale_inv is None else self.scale_inv[tile_rows]
            yield SourceTensor(self.spec, self.data[rows], scale_inv)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values in `dtype`, same shape; FP8 tiles are multiplied by their scales in FP32."""
        if self.scale_inv is None:
            return self.data.to(dtype)
        return dequantize_fp8_block(self.data, self.scale_inv).to(dtype)


def source_digests(source: Mapping[str, SourceTensor]) -> dict[str, str]:
    """Digest of the stored values of each tensor by name, scales included."""
    return {
        name: tensor_digest(tensor.data)
        + ("" if tensor.scale_inv is None else f"*{tensor_digest(tensor.scale_inv)}")
        for name, tensor in source.items()
    }


def join_digests(digests: Mapping[str, str]) -> str:
    """SHA-256 in hex over `source_digests`, whatever their order."""
    lines = (f"{name}={digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_digest(source: Mapping[str, SourceTensor]) -> str:
    """SHA-256 in hex over names and stored values of the tensors, scales included."""
    return join_digests(source_digests(source))


class CheckpointReader:
    """A source checkpoint, checked when it is opened and read layer by layer.

    Raises on opening:
        ConfigError: config.json is absent or asks for something that is not implemented.
        CheckpointError: a shard is absent or damaged, or a tensor is missing, extra, of a wrong
            shape or of a wrong type; the sentence names it.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if (self.directory / "intserve.json").exists():
            raise CheckpointError(
                f"{self.directory} is a quantized checkpoint of IntServe; --model must name the "
                "source checkpoint that it was made from"
            )
        self.config = ModelConfig.from_directory(self.directory)
        self._index_bytes, shards = _list_shards(self.directory)
        self._headers = {name: _open_shard(self.directory / name) for name in sorted(shards)}
        self._shard_of = self._locate(shards)
        self._check_total()
        self._check_inventory()
        self._unread = set(self._shard_of)
        #: Bytes that `load` has read from storage so far.
        self.bytes_read = 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over config.json, the index, and each shard's header, size, first and
        last 64 KiB. Cheap for 700 GB; `content_digest` covers all bytes of a layer."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        digest.update(self._index_bytes)
        for name, header in self._headers.items():
            digest.update(f"\n{name} {header.file_bytes}\n".encode())
            digest.update(header.raw)
            with (self.directory / name).open("rb") as file:
                digest.update(file.read(_EDGE_BYTES))
                file.seek(max(0, header.file_bytes - _EDGE_BYTES))
                digest.update(file.read(_EDGE_BYTES))
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        headers = self._headers.values()
        return sum(
            entry.num_bytes
            for header in headers
            for name, entry in header.tensors.items()
            if name in self._shard_of
        )

    def num_bytes(self, layer: int | Literal["globals"]) -> int:
        """Bytes, as stored, of one decoder layer or of the tensors outside the layers."""
        specs = (
            global_tensors(self.config) if layer == "globals" else layer_tensors(self.config, layer)
        )
        names = {name for spec in specs for name in (spec.name, scale_name(spec.name))}
        return sum(
            self._headers[self._shard_of[name]].tensors[name].num_bytes
            for name in names & self._shard_of.keys()
        )

    def read_layer(self, layer: int) -> dict[str, SourceTensor]:
        """All tensors of one decoder layer by name, mapped from their files. MTP layers come after
        the main layers."""
        assert 0 <= layer < self.config.num_layers_with_mtp
        return self._read(list(layer_tensors(self.config, layer)))

    def read_globals(self) -> dict[str, SourceTensor]:
        """The tensors outside the decoder layers by name: embeddings, final norm, head."""
        return self._read(global_tensors(self.config))

    def load(self, specs: Iterable[TensorSpec]) -> dict[str, SourceTensor]:
        """Read these tensors into newly allocated memory and return them by name.

        When it returns, all bytes are in memory and counted in `bytes_read`, which threads that
        read ahead need; `read_layer` maps files, whose bytes are read at their first use.

        Raises:
            CheckpointError: a shard changed or cannot be read.
        """
        specs = list(specs)
        names = [spec.name for spec in specs]
        names += [scale for name in names if (scale := scale_name(name)) in self._shard_of]
        stored: dict[str, Tensor] = {}
        for shard in sorted({self._shard_of[name] for name in names}):
            path, entries = self.directory / shard, self._headers[shard].tensors
            try:
                with path.open("rb", buffering=0) as file:
                    for name in names:
                        if self._shard_of[name] == shard:
                            stored[name] = read_tensor(file, entries[name])
                            self.bytes_read += entries[name].num_bytes
            except (OSError, EOFError) as error:
                raise CheckpointError(
                    f"{path} changed or became unreadable while it was in use ({error})"
                ) from error
        self._unread -= set(names)
        return _with_scales(specs, stored)

    def embed(self, ids: Tensor) -> Tensor:
        """Read the rows of the embedding for token ids int64 [T], and no others: float32 [T, D]."""
        name = "model.embed_tokens.weight"
        path = self.directory / self._shard_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                return cast(Tensor, file.get_tensor(name)[ids].float())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} changed or became unreadable while it was in use ({error})"
            ) from error

    def finish(self) -> None:
        """Check that every tensor was read.

        Raises:
            CheckpointError: a tensor was not read, so the output would lack it.
        """
        if self._unread:
            raise CheckpointError(
                f"{self.directory}: {_name_first(self._unread)} never read, so the output would "
                "lack it"
            )

    def _read(self, specs: list[TensorSpec]) -> dict[str, SourceTensor]:
        stored: dict[str, Tensor] = {}
        names = [spec.name for spec in specs]
        names += [scale for name in names if (scale := scale_name(name)) in self._shard_of]
        for shard in sorted({self._shard_of[name] for name in names}):
            path = self.directory / shard
            try:
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        if self._shard_of[name] == shard:
                            stored[name] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} changed or became unreadable while it was in use ({error})"
                ) from error
        self._unread -= set(names)
        return _with_scales(specs, stored)

    def _locate(self, shards: dict[str, set[str] | None]) -> dict[str, str]:
        """The shard of every tensor by name, checked against the index."""
        shard_of: dict[str, str] = {}
        for shard, indexed in shards.items():
            path = self.directory / shard
            present = set(self._headers[shard].tensors)
            if indexed is not None and (absent := indexed - present):
                raise CheckpointError(
                    f"{path}: {INDEX_FILE} says that {_name_first(absent)} here, but the shard "
                    "does not hold it; download the shard again"
                )
            if indexed is not None and (extra := present - indexed):
                raise CheckpointError(
                    f"{path}: {_name_first(extra)} not listed in {INDEX_FILE}; index and shards "
                    "are of different checkpoints"
                )
            shard_of |= dict.fromkeys(present, shard)
        return {name: at for name, at in shard_of.items() if not _ROTARY_TABLE.fullmatch(name)}

    def _check_total(self) -> None:
        """Log it where the index gives another size than the shards have."""
        total = _index_total(self._index_bytes)
        if total is not None and total != self.total_bytes:
            _log.info(
                "%s says total_size %s; the shards hold %d bytes of tensors",
                self.directory / INDEX_FILE, total, self.total_bytes,
            )  # fmt: skip

    def _check_inventory(self) -> None:
        expected = expected_source(self.config)
        actual = {
            name: self._headers[shard].tensors[name] for name, shard in self._shard_of.items()
        }
        if missing := set(expected) - set(actual):
            raise CheckpointError(
                f"{self.directory}: {_name_first(missing)} missing; config.json announces it"
            )
        if extra := set(actual) - set(expected):
            raise CheckpointError(
                f"{self.directory}: {_name_first(extra)} not part of the model that config.json "
                "describes"
            )
        for name, (shape, dtypes) in expected.items():
            if actual[name].shape != shape:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} has the shape {list(actual[name].shape)}; "
                    f"config.json asks for {list(shape)}"
                )
            if actual[name].dtype not in dtypes:
                allowed = " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
                raise CheckpointError(
                    f"{self.directory}: tensor {name} is {DTYPE_NAMES[actual[name].dtype]}; "
                    f"expected {allowed} (quantization_config in config.json decides)"
                )


def _with_scales(specs: list[TensorSpec], stored: dict[str, Tensor]) -> dict[str, SourceTensor]:
    return {
        spec.name: SourceTensor(spec, stored[spec.name], stored.get(scale_name(spec.name)))
        for spec in specs
    }


def scale_name(name: str) -> str:
    """Name of the tensor that holds the scales of the FP8 tiles of the tensor `name`."""
    return f"{name}_scale_inv"


def expected_source(
    config: ModelConfig,
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and admissible types of every tensor of the source, by name, scales included."""
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    for spec in tensors(config):
        if spec.kind == "linear" and config.weight_block_size:
            rows, columns = config.weight_block_size
            num_tiles = (-(-spec.shape[0] // rows), -(-spec.shape[1] // columns))
            expected[spec.name] = (spec.shape, (torch.float8_e4m3fn,))
            expected[scale_name(spec.name)] = (num_tiles, (torch.float32,))
        else:
            expected[spec.name] = (spec.shape, _FLOATS)
    return expected


def _list_shards(directory: Path) -> tuple[bytes, dict[str, set[str] | None]]:
    """The bytes of the index (empty without one), and the names that it lists by shard (None: any
    names)."""
    path = directory / INDEX_FILE
    if not path.exists():
        if not (directory / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"{directory} holds neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors "
                "checkpoints are read"
            )
        return b"", {SINGLE_FILE: None}
    content = path.read_bytes()
    try:
        weight_map = json.loads(content)["weight_map"]
        shards: dict[str, set[str] | None] = {}
        for name, shard in weight_map.items():
            names = shards.setdefault(shard, set())
            assert names is not None
            names.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index ({error!r})") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{path} names the shard {shard!r} outside its own directory")
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{path} names the shard {shard}, which is absent; download it again"
            )
    return content, shards


def _open_shard(path: Path) -> Header:
    try:
        return read_header(path)
    except DamagedFileError as error:
        raise CheckpointError(f"{path} {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _index_total(index: bytes) -> Any:
    """The `total_size` of the index; None where it has none.

    The value is only logged, at level INFO; `weight_map` is checked instead. By convention
    `total_size` is the bytes of the tensors, but the index of DeepSeek-V3 has twice the number of
    elements, and others have 0 or the bytes of the files.
    """
    metadata = json.loads(index).get("metadata") if index else None
    return metadata.get("total_size") if isinstance(metadata, dict) else None


def _name_first(names: set[str]) -> str:
    """`tensor a is`, or `tensor a (and 3 more) is`."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {min(names)}{more} is"

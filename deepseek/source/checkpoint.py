"""Reads the source checkpoint layer by layer: a Hugging Face directory in the release's layout.

Opening reads the header of every shard, not its data, and checks all names, shapes and types
against the inventory, so that a missing, extra or misshapen tensor is named before a long job
starts. Reading a layer reads the bytes of that layer only, and checks its numbers (`values.py`): no
tensor is handed out that holds NaN, infinity or a scale that cannot be. Two kinds of source are
supported: the release's FP8 e4m3 tiles with a `weight_scale_inv` per linear, and plain BF16, FP16
or FP32.
`deepseek/artifact/reader.py` reads IntServe's quantized checkpoints.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from deepseek.config import ModelConfig, read_config
from deepseek.errors import CheckpointError
from deepseek.formats import dequantize_fp8_block
from deepseek.inventory import TensorSpec, global_tensors, layer_tensors, tensors
from deepseek.source.index import INDEX_FILE, Listing, list_shards
from deepseek.source.origin import SCALE_SUFFIX, as_named, refuse_quantized, true_config, warn_once
from deepseek.source.shards import Shard, open_shard
from deepseek.source.values import check_scales, check_values
from deepseek.tensor_files import DTYPE_NAMES, TensorEntry, read_tensor, tensor_digest
from deepseek.untrusted import show, show_name

_log = logging.getLogger(__name__)

#: A table of rotary frequencies that older code saved with each layer. Kimi-K2 was released with
#: them (56 values, where its own code computes 32). The config says all that they could, so they
#: are no part of the model: not read, not counted, not written. vLLM and SGLang skip them too.
_ROTARY_TABLE = re.compile(r"model[.]layers[.]\d+[.]self_attn[.]rotary_emb[.]inv_freq")

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

    `config` is what the tensors say where config.json is untrue of a common kind of copy
    (`origin.py`), with a warning; `warn` False is for workers, whose driver has warned.

    Raises on opening:
        ConfigError: config.json is absent or asks for something that is not implemented.
        CheckpointError: the directory is quantized already, a shard is absent or damaged, or a
            tensor is missing, extra, of a wrong shape or of a wrong type; the sentence names it.

    Raises on reading:
        CheckpointError: a shard changed or cannot be read, or a tensor holds NaN, infinity or a
            scale that is not between 2^-126 and `values.LARGEST_SCALE_INV`; the sentence names it.
    """

    def __init__(self, directory: Path | str, *, warn: bool = True) -> None:
        self.directory = Path(directory)
        refuse_quantized(self.directory)
        self._config_bytes, self._config_content = read_config(self.directory)
        announced = ModelConfig.from_dict(self._config_content)
        listing = list_shards(self.directory)
        self._index_bytes = listing.index
        self._shards: dict[str, Shard] = {}
        self._shard_of: dict[str, str] = {}
        for name in sorted(listing.shards):
            self._open(name, listing.shards[name])
        self._log_total(listing)
        headers = [shard.header for shard in self._shards.values()]
        stored = {entry.dtype for header in headers for entry in header.tensors.values()}
        self.config, notes = as_named(
            self.directory,
            announced,
            self._shard_of.keys(),
            holds_fp8=torch.float8_e4m3fn in stored,
        )
        self._check_inventory()
        for note in notes if warn else ():
            warn_once(note)
        self._unread = set(self._shard_of)
        #: Bytes that `load` has read from storage so far.
        self.bytes_read = 0

    @property
    def config_content(self) -> dict[str, Any]:
        """config.json's content, made true of the checkpoint; see `origin.true_config`."""
        return true_config(self._config_content, self.config)

    @property
    def config_bytes(self) -> bytes | None:
        """config.json as stored; None where it is untrue of the checkpoint."""
        return self._config_bytes if self.config_content == self._config_content else None

    @property
    def config_sha256(self) -> str:
        """SHA-256 in hex of config.json as stored."""
        return hashlib.sha256(self._config_bytes).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over config.json, the index, and each shard's header, size, first and
        last 64 KiB. Cheap for 700 GB; `content_digest` covers all bytes of a layer."""
        digest = hashlib.sha256(self._config_bytes)
        digest.update(self._index_bytes)
        for name, shard in self._shards.items():
            header = shard.header
            digest.update(f"\n{name} {header.file_bytes}\n".encode())
            digest.update(header.raw)
            with shard.opened() as file:
                for position in (0, max(0, header.file_bytes - _EDGE_BYTES)):
                    digest.update(os.pread(file.fileno(), _EDGE_BYTES, position))
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.stored_bytes.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the shards' files, headers included."""
        return sum(shard.header.file_bytes for shard in self._shards.values())

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor as stored, by name; scales are tensors of their own."""
        return {name: self._entry(name).num_bytes for name in self._shard_of}

    def num_bytes(self, layer: int | Literal["globals"]) -> int:
        """Bytes, as stored, of one decoder layer or of the tensors outside the layers."""
        specs = (
            global_tensors(self.config) if layer == "globals" else layer_tensors(self.config, layer)
        )
        names = {name for spec in specs for name in (spec.name, scale_name(spec.name))}
        return sum(self._entry(name).num_bytes for name in names & self._shard_of.keys())

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in."""
        return self._entry(name).dtype

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
        read ahead need; `read_layer` maps files, whose bytes are read once to check them and may
        be read again.
        """
        specs = list(specs)
        names = [spec.name for spec in specs]
        names += [scale for name in names if (scale := scale_name(name)) in self._shard_of]
        stored: dict[str, Tensor] = {}
        for shard in sorted({self._shard_of[name] for name in names}):
            path, entries = self._shards[shard].path, self._shards[shard].header.tensors
            with self._shards[shard].opened() as file:
                for name in names:
                    if self._shard_of[name] == shard:
                        stored[name] = _checked(path, name, read_tensor(file, entries[name]))
                        self.bytes_read += entries[name].num_bytes
        self._unread -= set(names)
        return _with_scales(specs, stored)

    def load_tensor(self, name: str) -> Tensor:
        """Read one stored tensor by name, a scale too, into newly allocated memory; see `load`."""
        shard = self._shards[self._shard_of[name]]
        with shard.opened() as file:
            entry = shard.header.tensors[name]
            tensor = _checked(shard.path, name, read_tensor(file, entry))
        self.bytes_read += entry.num_bytes
        self._unread.discard(name)
        return tensor

    def embed(self, ids: Tensor) -> Tensor:
        """Read the rows of the embedding for token ids int64 [T], and no others: float32 [T, D]."""
        name = "model.embed_tokens.weight"
        shard = self._shards[self._shard_of[name]]
        with shard.mapped() as file:
            rows = cast(Tensor, file.get_tensor(name)[ids])
        check_values(shard.path, name, rows, ids)
        return rows.float()

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
            path = self._shards[shard].path
            with self._shards[shard].mapped() as file:
                for name in names:
                    if self._shard_of[name] == shard:
                        stored[name] = _checked(path, name, file.get_tensor(name))
        self._unread -= set(names)
        return _with_scales(specs, stored)

    def _entry(self, name: str) -> TensorEntry:
        """What the header of its shard says of one tensor."""
        return self._shards[self._shard_of[name]].header.tensors[name]

    def _open(self, name: str, listed: AbstractSet[str] | None) -> None:
        """Open one shard and check its names against the index, before the next one costs time."""
        shard = open_shard(self.directory, name)
        present = shard.header.tensors.keys()
        if listed is not None and (absent := listed - present):
            raise CheckpointError(
                f"{shard.path}: {INDEX_FILE} says that {_name_first(absent)} here, but the shard "
                "does not hold it; download the shard again"
            )
        if listed is not None and (extra := present - listed):
            raise CheckpointError(
                f"{shard.path}: {_name_first(extra)} not listed in {INDEX_FILE}; index and shards "
                "are of different checkpoints"
            )
        self._shards[name] = shard
        self._shard_of |= {
            tensor: name for tensor in present if not _ROTARY_TABLE.fullmatch(tensor)
        }

    def _log_total(self, listing: Listing) -> None:
        """Note a `total_size` that is not the bytes of the tensors; see `Listing`."""
        if listing.total_size is not None and listing.total_size != self.total_bytes:
            _log.info(
                "%s says total_size %s; the shards hold %d bytes of tensors",
                self.directory / INDEX_FILE, show(listing.total_size), self.total_bytes,
            )  # fmt: skip

    def _check_inventory(self) -> None:
        expected = expected_source(self.config)
        actual = {name: self._entry(name) for name in self._shard_of}
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


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the shard `path`, once its numbers are known to be usable."""
    check_values(path, name, tensor)
    if name.endswith(SCALE_SUFFIX):
        check_scales(path, name, tensor)
    return tensor


def _with_scales(specs: list[TensorSpec], stored: dict[str, Tensor]) -> dict[str, SourceTensor]:
    return {
        spec.name: SourceTensor(spec, stored[spec.name], stored.get(scale_name(spec.name)))
        for spec in specs
    }


def scale_name(name: str) -> str:
    """Name of the tensor that holds the scales of the FP8 tiles of the tensor `name`."""
    return f"{name}{SCALE_SUFFIX}"


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


def _name_first(names: AbstractSet[str]) -> str:
    """`tensor a is`, or `tensor a (and 3 more) is`."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {show_name(min(names))}{more} is"

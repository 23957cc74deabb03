"""Reads a finished quantized checkpoint (writer.py describes its files).

Every tensor is verified against the manifest, and `finish` checks that every file was read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.artifact.documents import (
    COPIED_FILES,
    check_nothing_else,
    check_tensor_file,
    document_object,
    read_listed,
)
from deepseek.artifact.input_maxima import (
    INPUT_MAXIMA_FILE,
    InputMaxima,
    find_outliers,
    parse_input_maxima,
)
from deepseek.artifact.manifest import (
    JOB_REPORTS,
    MANIFEST_FILE,
    LayerKey,
    LayerRecord,
    check_figures,
    read_manifest,
)
from deepseek.artifact.tensors import expected_tensors, layer_file, layer_keys, mismatch
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import DamagedFileError, Header, read_header, tensor_digest

_OUR_SHARDS = re.compile(r"model-(layer-\d{5}|globals)[.]safetensors")


class LayerFile:
    """One published file, open: each tensor is verified when it is read. `header` is checked."""

    def __init__(self, path: Path, header: Header, record: LayerRecord, file: Any) -> None:
        self.header = header
        self._path, self._record, self._file = path, record, file

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file.

        Raises:
            ArtifactError: its bytes are not those that were published; the sentence names it.
        """
        with _reading(self._path):
            tensor: Tensor = self._file.get_tensor(name)
        if tensor_digest(tensor) != self._record.tensors.get(name):
            raise ArtifactError(
                f"tensor {name} in {self._path} is damaged: its bytes are not those that were "
                "published; restore the file or quantize again"
            )
        return tensor


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (DamagedFileError, SafetensorError) as error:
        raise ArtifactError(f"{path} {error}; restore the file or quantize again") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error


class ArtifactReader:
    """A finished quantized checkpoint, verified as it is read.

    `ignore_input_maxima` neither reads nor requires input_maxima.json: for `quant_jobs measure`,
    which writes it.

    Raises on opening:
        ArtifactError: unfinished, edited, incomplete, or holding a file that is not its own.
    """

    def __init__(self, directory: Path | str, *, ignore_input_maxima: bool = False) -> None:
        self.directory = Path(directory)
        self._ignores_maxima = ignore_input_maxima
        self.manifest = read_manifest(self.directory)
        #: The artifact's digest: that of the manifest, which covers every byte of the tensors.
        self.digest = self.manifest.digest
        self.recipe = self.manifest.recipe
        #: config.json, index and tokenizer files by name, as verified against the manifest; without
        #: the input maxima, which no engine copies.
        self.documents = self._read_documents()
        raw = document_object(self.directory, self.documents, "config.json")
        # The schemes follow from the *source's* config, which had FP8 blocks where this has none.
        self.config = replace(
            ModelConfig.from_dict(raw), weight_block_size=self.manifest.source.weight_block_size
        )
        self.schemes = self.recipe.resolve(self.config)
        self._check_config(raw)
        #: The largest input of each routed expert; None where the artifact does not hold them.
        self.input_maxima = self._parse_maxima(self.documents.pop(INPUT_MAXIMA_FILE, None))
        self._unread: set[LayerKey] = set(layer_keys(self.config))

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer by full name, each verified against the manifest.

        Raises:
            ArtifactError: the file is damaged; the sentence names the tensor and the file.
        """
        assert 0 <= layer < self.config.num_layers_with_mtp
        tensors = self.read_some(layer, lambda _: True)
        self._unread.discard(layer)
        return tensors

    def read_globals(self) -> dict[str, Tensor]:
        """The tensors outside the decoder layers, verified; see `read_layer`."""
        tensors = self.read_some("globals", lambda _: True)
        self._unread.discard("globals")
        return tensors

    def finish(self) -> None:
        """Check that every published file was read.

        Raises:
            ArtifactError: one was not, so the consumer's output lacks it.
        """
        if self._unread:
            first = min(self._unread, key=str)
            raise ArtifactError(f"{self.directory}: {layer_file(first)} was never read")

    @contextmanager
    def open_file(self, layer: LayerKey) -> Iterator[LayerFile]:
        """The file of one layer, or of the globals, open to be read tensor by tensor. Does not
        count as reading the file for `finish`.

        Raises:
            ArtifactError: the file is damaged; the sentence names it.
        """
        record = self.manifest.record(layer)
        path = self.directory / record.file
        with _reading(path):
            header = read_header(path)
            if header.sha256 != record.header_sha256:
                raise DamagedFileError("has a header other than the one that was published")
            actual = {name: (entry.shape, entry.dtype) for name, entry in header.tensors.items()}
            if difference := mismatch(actual, expected_tensors(self.config, self.schemes, layer)):
                raise DamagedFileError(f"does not hold what config.json describes: {difference}")
            opened = safe_open(path, framework="pt")
        with opened as file:
            yield LayerFile(path, header, record, file)

    def read_some(self, layer: LayerKey, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those tensors of one layer, or of the globals, whose full name `wanted` accepts, each
        verified; see `open_file`."""
        with self.open_file(layer) as file:
            return {name: file.read(name) for name in file.header.tensors if wanted(name)}

    def _read_documents(self) -> dict[str, bytes]:
        """The documents, and a look at everything else in the directory."""
        shards = {record.file: record.num_bytes for record in self.manifest.layers}
        for name, num_bytes in shards.items():
            if not _OUR_SHARDS.fullmatch(name):
                raise ArtifactError(
                    f"{self.directory / MANIFEST_FILE} lists the file {name}, which is none that "
                    "IntServe writes; quantize again"
                )
            check_tensor_file(self.directory / name, num_bytes, self.directory)
        allowed = ("config.json", INDEX_FILE, INPUT_MAXIMA_FILE, *COPIED_FILES)
        listed = dict(self.manifest.files)
        known = {MANIFEST_FILE, *JOB_REPORTS, *shards}
        if self._ignores_maxima:
            listed.pop(INPUT_MAXIMA_FILE, None)
            known.add(INPUT_MAXIMA_FILE)
        documents = read_listed(self.directory, listed, allowed, manifest=MANIFEST_FILE)
        stray = self.directory / INPUT_MAXIMA_FILE
        if INPUT_MAXIMA_FILE not in known | documents.keys() and os.path.lexists(stray):
            raise ArtifactError(
                f"{stray} is not listed in {MANIFEST_FILE}, as after a `quant_jobs measure` that "
                "was killed; run that again, or remove the file"
            )
        check_nothing_else(self.directory, known | documents.keys(), what="artifact")
        return documents

    def _parse_maxima(self, data: bytes | None) -> InputMaxima | None:
        """The maxima of input_maxima.json, whose outliers must be those of the manifest."""
        if self._ignores_maxima:
            return None
        path = self.directory / INPUT_MAXIMA_FILE
        maxima = None if data is None else parse_input_maxima(data, self.config, path)
        if self.manifest.input_outliers != (() if maxima is None else find_outliers(maxima)):
            raise ArtifactError(
                f"{self.directory / MANIFEST_FILE} has other input_outliers than follow from "
                f"{INPUT_MAXIMA_FILE}; restore both or quantize again"
            )
        return maxima

    def _check_config(self, raw: dict[str, Any]) -> None:
        """Check the manifest against the model that config.json, of content `raw`, describes."""
        check_figures(self.manifest, self.config, self.directory / MANIFEST_FILE)
        records = {record.layer: record for record in self.manifest.layers}
        keys = layer_keys(self.config)
        if [record.layer for record in self.manifest.layers] != keys:
            raise ArtifactError(
                f"{self.directory}: {MANIFEST_FILE} lists {len(records)} parts, but config.json "
                f"describes a model of {len(keys)}"
            )
        for key in keys:
            expected = expected_tensors(self.config, self.schemes, key)
            if different := sorted(expected.keys() ^ records[key].tensors.keys()):
                state = "lacks" if different[0] in expected else "has the unknown"
                raise ArtifactError(
                    f"{self.directory}: {MANIFEST_FILE} {state} tensor {different[0]} for the "
                    "model that config.json describes"
                )
        form = self.manifest.format_version
        described = quantization_config(self.config, self.schemes, form=form)
        if raw.get("quantization_config") != described:
            raise ArtifactError(
                f"{self.directory}: quantization_config in config.json does not describe the "
                f"recipe {self.recipe.name!r} of {MANIFEST_FILE}"
            )

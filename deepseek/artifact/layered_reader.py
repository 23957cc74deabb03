"""Reads the tensor files of an engine directory: one per decoder layer and one for the rest.

`quant_jobs/targets/layered.py` writes such directories. The stored model of a target
(`deepseek/trtllm/stored_model.py`, ...) reads them here: a file is read once, into memory, and its
SHA-256 is computed over the very bytes that are used. Memory holds one file at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest
from deepseek.artifact.layout import StoredTensor
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.tensors import HIGH_DTYPES, layer_file, mismatch
from deepseek.errors import ArtifactError
from deepseek.tensor_files import (
    DTYPES,
    DamagedFileError,
    Header,
    read_header,
    read_tensor,
    tensor_bytes,
)
from deepseek.untrusted import UnusableFileError

#: The tensors of one file by full name, as a target's `stored_tensors` gives them.
Layout = Callable[[LayerKey], Mapping[str, StoredTensor]]


class LayeredReader:
    """The tensor files of one engine directory, each verified as it is read.

    `manifest` is the directory's engine.json, `layers` are the files that it must have
    (`stored_layers`), and `layout` says what is in each. A tensor that is no linear may have any
    high precision.

    Raises on opening:
        ArtifactError: engine.json lists other tensor files.
    """

    def __init__(
        self, directory: Path, manifest: EngineManifest, layers: Iterable[LayerKey], layout: Layout
    ) -> None:
        self.directory = directory
        self._files = manifest.tensor_files
        self._layout = layout
        self._unread = {layer_file(layer) for layer in layers}
        if different := sorted(self._unread ^ self._files.keys()):
            state = "lacks" if different[0] in self._unread else "lists the unknown"
            raise ArtifactError(
                f"{directory / ENGINE_FILE} {state} tensor file "
                f"{untrusted.show_name(different[0])} for the model of config.json; build again"
            )

    def read(self, layer: LayerKey) -> dict[str, Tensor]:
        """All tensors of one file by full name, in its own types, each in memory of its own.

        Raises:
            ArtifactError: the file is not the one that was built, or does not hold what the model
                of config.json needs; the sentence names it.
        """
        name = layer_file(layer)
        path = self.directory / name
        try:
            header = read_header(path, root=self.directory)
            actual = {key: (entry.shape, entry.dtype) for key, entry in header.tensors.items()}
            if difference := mismatch(actual, _expected(self._layout(layer))):
                raise DamagedFileError(f"does not hold what config.json describes: {difference}")
            tensors = self._read_whole(path, header, self._files[name].sha256)
        except (DamagedFileError, UnusableFileError) as error:
            raise ArtifactError(f"{path} {error}; restore it or build again") from error
        except (OSError, EOFError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); build again") from error
        self._unread.discard(name)
        return tensors

    def finish(self) -> None:
        """Check that every file was read.

        Raises:
            ArtifactError: one was not.
        """
        if self._unread:
            raise ArtifactError(f"{self.directory}: {min(self._unread)} was never read")

    def _read_whole(self, path: Path, header: Header, sha256: str) -> dict[str, Tensor]:
        """The tensors of the file, in its order, whose SHA-256 with the header is the recorded one.
        A checked header leaves no gap, so that every byte of the file is hashed."""
        digest = hashlib.sha256(header.raw)
        tensors: dict[str, Tensor] = {}
        descriptor = untrusted.open_regular(path, root=self.directory)
        with FileIO(descriptor) as file:
            for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                tensors[key] = tensor = read_tensor(file, entry)
                digest.update(tensor_bytes(tensor))
        if digest.hexdigest() != sha256:
            raise DamagedFileError(
                f"was edited after the engine was built: its SHA-256 is not that of {ENGINE_FILE}"
            )
        return tensors


def _expected(
    layout: Mapping[str, StoredTensor],
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    return {
        name: (
            tensor.shape,
            (DTYPES[tensor.dtype],) if tensor.is_linear else HIGH_DTYPES,
        )
        for name, tensor in layout.items()
    }

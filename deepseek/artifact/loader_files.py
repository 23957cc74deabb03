"""The tensors of a directory as a target's loader finds them, counted as they are read.

Which files it takes is the loader's own rule; what is in two of them is `duplicates`. `Checkpoint`
holds the headers. With `values` it maps the data into memory, so that only what is
sliced is read; without, every tensor is a `meta` tensor and the loader's arithmetic on names, types
and shapes runs without a byte of data.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from deepseek import untrusted
from deepseek.errors import ArtifactError, DeployError
from deepseek.tensor_files import DamagedFileError, TensorEntry, read_header


class LoaderRefusal(DeployError):
    """The target's loader would not load the directory. One sentence of ours names the key or the
    module, and the rule that it breaks."""


class Checkpoint:
    """All tensors of the files of a directory by key. `loader` names who reads them, for sentences.

    `reads` counts how often each key was read, and `read_bytes` adds up the bytes of what was taken
    of it, over all ranks so far. `duplicates` maps a key that several files hold to their names.

    Raises on opening:
        ArtifactError: a file is damaged, or no regular file of the directory.
    """

    def __init__(
        self, directory: Path, files: Iterable[Path], *, values: bool, loader: str
    ) -> None:
        self.directory = directory
        self.loader = loader
        self.values = values
        self.reads: Counter[str] = Counter()
        self.read_bytes = 0
        self.duplicates: dict[str, list[str]] = {}
        self._entries: dict[str, tuple[Path, TensorEntry]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in files:
            try:
                header = read_header(path, root=directory)
            except DamagedFileError as error:
                raise ArtifactError(f"{path} {error}; restore it or build again") from error
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
            for key, entry in header.tensors.items():
                if key in self._entries:
                    first = self._entries[key][0].name
                    self.duplicates.setdefault(key, [first]).append(path.name)
                self._entries[key] = (path, entry)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def entry(self, key: str) -> TensorEntry:
        """Type and shape of a key that is there, without reading it."""
        return self._entries[key][1]

    def file(self, key: str) -> Path:
        """The file that holds a key."""
        return self._entries[key][0]

    def take(
        self, key: str, dim: int = 0, part: slice | None = None, *, needed_by: str = ""
    ) -> Tensor:
        """A tensor as the loader reads it, or the `part` of it along `dim`.

        Raises:
            LoaderRefusal: the directory has no such key.
        """
        if key not in self._entries:
            user = needed_by or key.rpartition(".")[0]
            raise LoaderRefusal(
                f"{self.directory} lacks the tensor {key}, which {self.loader} reads for {user}"
            )
        tensor = self.peek(key)
        if part is not None:
            index = [slice(None)] * tensor.dim()
            index[dim] = part
            tensor = tensor[tuple(index)]
        self.reads[key] += 1
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def peek(self, key: str) -> Tensor:
        """The whole tensor, a view of the mapped file or a `meta` tensor, without counting."""
        path, entry = self._entries[key]
        if not self.values:
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.frombuffer(self._map(path), dtype=entry.dtype, count=count, offset=entry.begin)
        return data.view(entry.shape)

    def with_values(self) -> Self:
        """The same headers over mapped data, with counts of its own; files are not parsed again."""
        mapped = copy.copy(self)
        mapped.values, mapped.reads, mapped.read_bytes, mapped._maps = True, Counter(), 0, {}
        return mapped

    def close(self) -> None:
        """Forget the mapped files; tensors that still view one keep it alive."""
        self._maps.clear()

    def unread(self) -> list[str]:
        """Keys that nothing has read so far."""
        return sorted(key for key in self._entries if not self.reads[key])

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                descriptor = untrusted.open_regular(path, root=self.directory)
            except untrusted.UnusableFileError as error:
                raise ArtifactError(f"{path} {error}") from error
            try:  # a private map: writable, as torch wants it, and nothing reaches the file
                self._maps[path] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
        return self._maps[path]

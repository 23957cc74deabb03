"""One shard of a source checkpoint: checked when it is opened, later the same file or an error.

A shard is a regular file inside the checkpoint's directory; a link of a hub cache into its own
blobs is followed. Whoever reads tensors later opens the file again (a job runs for hours on network
storage), and it is then compared with the header that was checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deepseek.errors import CheckpointError
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import DamagedFileError, Header, UnsupportedTypeError, read_header
from deepseek.untrusted import UnusableFileError, open_regular


@dataclass(frozen=True, slots=True)
class Shard:
    """A checked shard of the checkpoint in `directory`."""

    directory: Path
    name: str
    header: Header

    @property
    def path(self) -> Path:
        return self.directory / self.name

    @contextlib.contextmanager
    def opened(self) -> Iterator[FileIO]:
        """The file, unbuffered, once it is known to be the one that was checked. Errors of reading
        within the block get its name.

        Raises:
            CheckpointError: it is another file now, or cannot be read.
        """
        try:
            descriptor = open_regular(self.path, root=self.directory)
            with open(descriptor, "rb", buffering=0) as file:
                size = os.fstat(descriptor).st_size
                if size != self.header.file_bytes:
                    raise EOFError(f"it has {size} bytes instead of {self.header.file_bytes}")
                if os.pread(descriptor, len(self.header.raw), 0) != self.header.raw:
                    raise EOFError("its header is another one")
                yield file
        except (UnusableFileError, OSError, EOFError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path} changed or became unreadable while it was in use ({error})"
            ) from error

    @contextlib.contextmanager
    def mapped(self) -> Iterator[Any]:
        """The file as safetensors maps it: `get_tensor(name)`, valid also after the block. Raises
        as `opened`."""
        with (
            self.opened() as file,
            safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as tensors,
        ):
            yield tensors


def open_shard(directory: Path, name: str) -> Shard:
    """Read and check the header of a shard.

    Raises:
        CheckpointError: it is absent, outside the directory, no regular file, damaged, or holds a
            type that is not read.
    """
    path = directory / name
    try:
        return Shard(directory, name, read_header(path, root=directory))
    except UnsupportedTypeError as error:
        raise CheckpointError(
            f"{path} {error}; give the release, in FP8 e4m3 tiles or in BF16"
        ) from error
    except DamagedFileError as error:
        kept = isinstance(error.__cause__, UnusableFileError)  # says itself what to change
        raise CheckpointError(f"{path} {error}{'' if kept else '; download it again'}") from error
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory / INDEX_FILE} names the shard {name}, which is absent; download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error

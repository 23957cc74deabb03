"""What the folders of unfinished runs share: the lock, the pinned inputs, the records of parts.

`quantize` keeps such a folder in its output (`job/folder.py`), and so does a build of many files
(`targets/sharded.py`). A folder is locked while a run writes the output, holds in one file the
inputs that the output is made from, and one record per finished part; the next run of the same
command goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deepseek.errors import ArtifactError
from deepseek.files import canonical_json, write_json
from deepseek.outputs import writing
from deepseek.untrusted import UnusableFileError, read_json_object

#: Attempts to delete a folder into which a worker may still write.
_REMOVALS = 10

Record = TypeVar("Record", bound=BaseModel)


class FolderLock:
    """The lock of a folder that exists: held from here until `release`, or until the process ends.
    The file `lock` holds the process id.

    Raises:
        ArtifactError: another process holds it; the sentence calls `output` by its name and the
            other process a `command`.
        OutputError: the lock cannot be written.
    """

    def __init__(self, folder: Path, output: Path, command: str) -> None:
        self.path = folder / "lock"
        self._handle: int | None = _lock(self.path, output, command)

    def release(self) -> None:
        """Release the lock. The file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def remove_folder(self) -> None:
        """Delete the folder of a run that is done, the lock file last, and release the lock.

        Raises:
            OutputError: something cannot be deleted.
        """
        folder = self.path.parent
        with writing(folder):
            for path in sorted(folder.iterdir()):
                if path.name != self.path.name:
                    delete_tree(path) if path.is_dir() else path.unlink()
            self.path.unlink()
            folder.rmdir()
        self.release()


def _lock(path: Path, output: Path, command: str) -> int:
    with writing(path), contextlib.ExitStack() as opened:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
                raise ArtifactError(
                    f"{output} is being written by another {command} (process {owner}); wait for "
                    "it or choose another --output"
                ) from None
            # The file may have been deleted, by a run that ended, between opening and locking.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                break
            opened.close()
            path.parent.mkdir(exist_ok=True)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        opened.pop_all()  # open from here on: closing it frees the lock
    return handle


def refuse_foreign_files(output: Path, folder: Path, manifest: str, command: str) -> None:
    """Refuse an output that exists and holds files, but neither `folder`, which a run of `command`
    makes first, nor the file `manifest`, which it writes last.

    Raises:
        ArtifactError: so it is; the sentence names the first file.
        OutputError: the output cannot be listed.
    """
    with writing(output):
        if not output.is_dir() or folder.is_dir() or (output / manifest).exists():
            return
        foreign = sorted(path.name for path in output.iterdir())
    if foreign:
        raise ArtifactError(
            f"{output} is not empty ({foreign[0]}) and not an output of {command}; choose another "
            "--output"
        )


def pin_inputs(path: Path, inputs: dict[str, Any], output: Path) -> tuple[dict[str, Any], ...]:
    """Write the inputs of a run of `output` into the file `path`, unless an earlier run has.
    Returns what is stored there and `inputs`, both as JSON gives them back, to be compared.

    Raises:
        ArtifactError: the file is damaged.
    """
    current: dict[str, Any] = json.loads(json.dumps(inputs))
    if not path.exists():
        write_json(path, current)
        return current, current
    try:
        return read_json_object(path), current
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; delete {output} and run again") from error


def save_record(path: Path, record: BaseModel) -> None:
    """Write the record of a finished part, its own digest beside the content, atomically."""
    content = record.model_dump(mode="json")
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    write_json(path, content | {"digest": digest})


def load_record(path: Path, kind: type[Record]) -> Record:
    """Read what `save_record` wrote.

    Raises:
        ArtifactError: it is damaged, or was changed since.
    """
    try:
        raw = read_json_object(path)
        digest = raw.pop("digest", None)
        record = kind.model_validate(raw)
    except (UnusableFileError, ValidationError) as error:
        reason = "is damaged" if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"{path} {reason}; delete it and run again") from error
    if digest != hashlib.sha256(canonical_json(raw)).hexdigest():
        raise ArtifactError(
            f"{path} is damaged: it was changed after it was written; delete it and run again"
        )
    return record


def short(value: Any) -> str:
    """A pinned input for a sentence: a digest by its first 12 characters."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:12] if len(text) == 64 else text


def delete_tree(path: Path) -> None:
    """Delete a folder, even while a worker that counts as dead still writes into it: one whose node
    lost its network link finishes its last call."""
    for _ in range(_REMOVALS):
        with contextlib.suppress(OSError):  # not empty after all
            shutil.rmtree(path)
            return
    shutil.rmtree(path)

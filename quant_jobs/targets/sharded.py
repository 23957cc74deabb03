"""Build an engine of many tensor files: one task per file, the tasks on the nodes of a cluster.

    OUTPUT/.build/lock               flock: released when the driver of the build dies
    OUTPUT/.build/build.json         the inputs that the engine is made from
    OUTPUT/.build/part-00003.json    the file of key 00003 is in OUTPUT: its BuiltFile
    OUTPUT/.build/node-00003         Ray's id of the node whose worker has that file in hand

A file is made by one task from what it reads itself, so no byte travels between workers, and the
bytes depend neither on their number nor on who died. A file counts as built when its part-*.json
exists, which the driver writes after the file itself; the next run of the same command verifies it
and makes what is absent or damaged. The driver writes engine.json at the end and deletes .build.

`--workers 0` runs the tasks in the driver's process, without Ray. Otherwise OUTPUT is on storage
that all nodes share, which every task checks before it works.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.engine_manifest import ENGINE_FILE
from deepseek.errors import ArtifactError, OutputError
from deepseek.files import is_intact, remove_scraps, sha256_file, write_atomic
from deepseek.outputs import check_directory, make_directory, writing
from quant_jobs.run_folder import (
    FolderLock,
    load_record,
    pin_inputs,
    refuse_foreign_files,
    save_record,
    short,
)

FOLDER = ".build"
INPUTS_FILE = "build.json"

#: Called with the number of files that are done, and of all.
Progress = Callable[[int, int], None]
#: Called with a sentence for people.
Note = Callable[[str], None]


class BuiltFile(BaseModel):
    """One tensor file of an engine: its plain name in the engine's directory, its size in bytes,
    its SHA-256 in hex, and the bytes that were read to make it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    file: str
    num_bytes: int
    sha256: str
    bytes_read: int


class FileMaker(Protocol):
    """Makes the files of one engine. Small, and travels to the workers (a frozen dataclass of plain
    values); opens its checkpoint itself, once per process."""

    def make(self, key: str, directory: Path) -> BuiltFile:
        """Write the file of `key` into `directory`, atomically. The same key gives the same bytes.

        Raises:
            IntServeError: in one sentence, which ends the build.
        """
        ...


class BuildFolder:
    """OUTPUT/.build of one running build. Opening it takes the lock; `remove`, or leaving the
    context, frees it. `inputs` is everything that decides the engine's bytes, as JSON; its keys are
    words for the sentence about a difference.

    Raises on opening:
        ArtifactError: another process writes this output, it is that of another build, or it holds
            files of something else.
        OutputError: it cannot be written, here and in every method that writes or deletes.
    """

    def __init__(self, output: Path, inputs: dict[str, Any]) -> None:
        self.output = output.absolute()
        self.path = self.output / FOLDER
        check_directory(self.output)
        refuse_foreign_files(self.output, self.path, ENGINE_FILE, "build")
        make_directory(self.path)
        self._lock = FolderLock(self.path, output, "build")
        try:
            self._pin(inputs)
            remove_scraps(self.output)
            remove_scraps(self.path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> BuildFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def records(self) -> dict[str, BuiltFile]:
        """The files that were built, by key, as their records say; whether they still have these
        bytes is not looked at.

        Raises:
            ArtifactError: a record is damaged.
        """
        records = {}
        for path in sorted(self.path.glob("part-*.json")):
            record = load_record(path, BuiltFile)
            if self._record_path(record.key) != path or not _is_plain_name(record.file):
                raise ArtifactError(
                    f"{path} is damaged: it names the file {record.file!r} of "
                    f"{record.key!r}; delete it and run again"
                )
            records[record.key] = record
        return records

    def save(self, built: BuiltFile) -> None:
        """Record a file as built; it must be on disk already."""
        save_record(self._record_path(built.key), built)

    def remove(self) -> None:
        """Delete the folder of a finished build, with what lost workers have left beside it, and
        release the lock."""
        remove_scraps(self.output)
        self._lock.remove_folder()

    def _record_path(self, key: str) -> Path:
        return self.path / f"part-{key}.json"

    def _pin(self, inputs: dict[str, Any]) -> None:
        stored, current = pin_inputs(self.path / INPUTS_FILE, inputs, self.output)
        check_same_inputs(self.output, "an unfinished build", stored, current)


def check_same_inputs(
    output: Path, what: str, stored: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Check that an output, which holds `what`, was made from the same inputs; the first difference
    in the order of `current` is named.

    Raises:
        ArtifactError: it was not.
    """
    for key in [*current, *sorted(stored.keys() - current.keys())]:
        theirs, ours = stored.get(key), current.get(key)
        if theirs != ours:
            raise ArtifactError(
                f"{output} holds {what} with another {key} ({short(theirs)}, now {short(ours)}); "
                "choose another --output or delete it"
            )


@dataclass(frozen=True, slots=True)
class Task:
    """Make the file of `key`, or, with its `record`, verify the one that is there."""

    key: str
    record: BuiltFile | None = None


@dataclass(frozen=True, slots=True)
class TaskRunner:
    """Runs tasks on whatever node it has traveled to. `inputs_sha256` is that of build.json."""

    maker: FileMaker
    output: Path
    inputs_sha256: str

    def run(self, task: Task) -> BuiltFile | None:
        """The record of the file: made, or verified; None where it is absent or damaged.

        Raises:
            IntServeError: of the maker.
        """
        if task.record is not None:
            path = self.output / task.record.file
            intact = is_intact(path, task.record.num_bytes, task.record.sha256)
            return task.record if intact else None
        return self.maker.make(task.key, self.output)

    def start(self, key: str, node: str, address: str) -> None:
        """Note that the task of `key` runs on this node, which must see the driver's output.

        Raises:
            OutputError: it does not see it, or may not write there.
        """
        try:
            same = sha256_file(self.output / FOLDER / INPUTS_FILE) == self.inputs_sha256
        except OSError:
            same = False
        if not same:
            raise OutputError(
                f"{self.output} on node {address} is not the directory that this build writes; "
                "choose an --output on storage that all nodes share, or build with --workers 0"
            )
        write_atomic(self._note_path(key), node.encode())

    def node_of(self, key: str) -> str | None:
        """The node that has noted so, or None."""
        try:
            return self._note_path(key).read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def forget_node(self, key: str) -> None:
        """Before a task of `key` is submitted: what an earlier one has noted counts no more."""
        path = self._note_path(key)
        with writing(path):
            path.unlink(missing_ok=True)

    def _note_path(self, key: str) -> Path:
        return self.output / FOLDER / f"node-{key}"


def build_files(
    folder: BuildFolder,
    keys: Sequence[str],
    maker: FileMaker,
    workers: int,
    progress: Progress,
    known: Mapping[str, BuiltFile] | None = None,
    *,
    note: Note = lambda line: None,
) -> dict[str, BuiltFile]:
    """Make the files of all `keys` in the folder's output, and return their records by key, in the
    order of `keys`. What has a record, in `known` (what engine.json of a finished engine says) or
    from an earlier run, is verified by its SHA-256 and made only where it is absent or damaged.

    `workers` 0 works in this process. Otherwise so many tasks of one CPU each run at a time on the
    nodes of the Ray cluster, or of a local Ray; those lost with a worker or node are run again,
    with a `note` for each.

    Raises:
        ArtifactError: a file was made again with other bytes than its record says.
        IntServeError: of the maker, or the workers keep dying. What is built by then stays built.
    """
    assert all(re.fullmatch(r"[\w-]{1,64}", key) for key in keys)
    records = folder.records() | dict(known or {})
    tasks = deque(Task(key, records[key]) for key in keys if key in records)
    tasks.extend(Task(key) for key in keys if key not in records)
    done: dict[str, BuiltFile] = {}

    def finish(task: Task, built: BuiltFile | None) -> None:
        if built is None:
            note(f"{records[task.key].file} is absent or damaged and is made again")
            tasks.append(Task(task.key))
            return
        assert built.key == task.key
        assert _is_plain_name(built.file)
        assert built.file not in {other.file for other in done.values()}
        if task.record is None:
            _check_same(folder.output, built, records.get(task.key))
            folder.save(built)
        done[task.key] = built
        progress(len(done), len(keys))

    progress(0, len(keys))
    inputs_sha256 = sha256_file(folder.path / INPUTS_FILE)
    runner = TaskRunner(maker, folder.output, inputs_sha256)
    if workers:
        from quant_jobs.targets.ray_tasks import run_on_ray

        run_on_ray(runner, tasks, finish, workers, note)
    else:
        while tasks:
            task = tasks.popleft()
            finish(task, runner.run(task))
    return {key: done[key] for key in keys}


def _check_same(output: Path, built: BuiltFile, record: BuiltFile | None) -> None:
    if record is None or (built.file, built.sha256) == (record.file, record.sha256):
        return
    raise ArtifactError(
        f"{output / record.file} was lost or damaged, and the one built again has other bytes than "
        f"before; delete {output} and run again"
    )


def _is_plain_name(name: str) -> bool:
    return Path(name).name == name and not name.startswith(".") and name.isprintable()

"""Copy an engine directory to a disk of this machine, every byte verified by engine.json's digests.

    LOCAL                            the copy: appears whole, by a rename
    .LOCAL.0123456789ab.staging      beside it, until it is whole: the files that are there already

A file is verified while it is copied and published under its name only then; a copy that was cut
off goes on with the files that are there with the right digest. A copy that is whole is verified,
and what it has lost is copied again. The digest in the staging name is the engine's. The verdict
(gate.json and its signature), which engine.json cannot list, goes along as it is. A machine serves
from such a copy what it would otherwise read over the network at every start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    SIGNATURE_FILE,
    VERDICT_FILE,
    EngineManifest,
    TensorFile,
    read_documents,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.errors import ArtifactError, OutputError
from deepseek.files import CHUNK_BYTES, is_intact, published_file, remove_scraps, write_atomic
from deepseek.outputs import check_apart, check_directory, check_space, make_directory, writing
from deepseek.untrusted import UnusableFileError, open_regular, read_bytes

OPTION = "--stage"
#: Files that are copied at a time; one stream seldom fills a network file system's link.
STREAMS = 4


class CopyFigures(BaseModel):
    """Bytes of tensor files that were copied, and that were there already and verified; seconds for
    both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    copied_bytes: int
    kept_bytes: int
    seconds: float


def copy_engine(
    engine: Path,
    local: Path,
    digest: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CopyFigures:
    """Copy the engine in `engine` to `local`, or what `local` lacks of it. `digest` is the digest
    that the engine must have; `progress` gets the number of tensor files that are done, and of all.

    Raises:
        ArtifactError: `engine` is no whole engine or another one; or `local` holds another engine
            or other files, which stay as they are.
        OutputError: the disk is too small, `local` cannot be written, or another process writes it.
    """
    started = time.monotonic()
    manifest = read_engine_manifest(engine)
    if digest not in (None, manifest.digest):
        raise ArtifactError(
            f"{engine} is another engine on this node ({manifest.digest[:12]}); the engine must be "
            "on storage that all nodes share"
        )
    documents = read_documents(engine, manifest)
    check_directory(local, OPTION)
    check_apart(local, engine, "the engine", OPTION)
    make_directory(local.parent)
    with _target(local, manifest) as target:
        remove_scraps(target)
        kept = _copy_files(engine, local, target, manifest, progress)
        _write_documents(engine, target, documents)
        if target != local:
            write_engine_manifest(target, manifest)
        read_documents(target, manifest)  # and nothing else is there
        if target != local:
            with writing(local):
                os.replace(target, local)
                _sync(local.parent)
    return CopyFigures(
        copied_bytes=manifest.num_bytes - kept,
        kept_bytes=kept,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _target(local: Path, manifest: EngineManifest) -> Iterator[Path]:
    """The directory to copy into, locked: `local` where it holds this engine already, else the
    staging directory beside it."""
    staging = local.with_name(f".{local.name[:40]}.{manifest.digest[:12]}.staging")
    while True:
        is_there = _holds(local, manifest)
        target = local if is_there else staging
        with contextlib.ExitStack() as opened, writing(target):
            if not is_there:
                target.mkdir(exist_ok=True)
            handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{local} is being written by another process; wait for it, or, where several "
                    f"nodes share this directory, choose storage of each node for {OPTION} or "
                    "put {node} into the path"
                ) from None
            if not _is_same(handle, target) or _holds(local, manifest) != is_there:
                continue  # another process has completed it in this moment
            opened.pop_all()
        try:
            yield target
        finally:
            if not is_there:
                with contextlib.suppress(OSError):  # renamed by now, or not empty
                    staging.rmdir()
            os.close(handle)
        return


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holds(local: Path, manifest: EngineManifest) -> bool:
    """Whether `local` holds this engine; False where it is absent or empty.

    Raises:
        ArtifactError: it holds something else.
    """
    with writing(local):
        names = sorted(os.listdir(local)) if local.is_dir() else []
    if not names:
        return False
    if ENGINE_FILE not in names:
        raise ArtifactError(
            f"{local} holds files of something else ({names[0]}) and no {ENGINE_FILE}; choose "
            f"another {OPTION}"
        )
    try:
        there = read_engine_manifest(local).digest
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete {local} first") from error
    if there != manifest.digest:
        raise ArtifactError(
            f"{local} holds another engine ({there[:12]}, not {manifest.digest[:12]}); choose "
            f"another {OPTION} or delete it there"
        )
    return True


def _copy_files(
    engine: Path,
    local: Path,
    target: Path,
    manifest: EngineManifest,
    progress: Callable[[int, int], None],
) -> int:
    """Copy the tensor files that `target` lacks; returns the bytes of those that it has."""
    files, done = manifest.tensor_files, 0
    with ThreadPoolExecutor(STREAMS) as pool:
        progress(0, len(files))
        intact = dict(
            zip(
                files,
                pool.map(lambda name: _is_there(target / name, files[name]), files),
                strict=True,
            )
        )
        missing = {name: file for name, file in files.items() if not intact[name]}
        needed = sum(file.num_bytes for file in missing.values())
        check_space(local, needed, f"choose another {OPTION}")
        try:
            for _ in pool.map(
                lambda name: _copy_file(engine / name, target / name, files[name]), missing
            ):
                done += 1
                progress(len(files) - len(missing) + done, len(files))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        progress(len(files), len(files))
    return manifest.num_bytes - needed


def _is_there(path: Path, file: TensorFile) -> bool:
    return is_intact(path, file.num_bytes, file.sha256)


def _copy_file(source: Path, path: Path, file: TensorFile) -> None:
    """Copy one tensor file; nothing is published where its bytes are not those of `file`."""
    try:
        descriptor = open_regular(source, root=source.parent)
    except UnusableFileError as error:
        raise ArtifactError(f"{source} {error}") from error
    digest = hashlib.sha256()
    with (
        os.fdopen(descriptor, "rb", buffering=0) as opened,
        published_file(path, file.num_bytes) as copy,
    ):
        while chunk := _read(opened, source):
            digest.update(chunk)
            copy.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise ArtifactError(
                f"{source} differs from what {ENGINE_FILE} records; run build again, which makes it"
                " anew"
            )


def _read(file: FileIO, path: Path) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}); see the state of the disk or mount, then "
            "run again"
        ) from error


def _write_documents(engine: Path, target: Path, documents: Mapping[str, bytes]) -> None:
    """Copy what is beside the tensor files; only what differs is written."""
    for name, data in documents.items():
        _write(target / name, data)
    for name in (VERDICT_FILE, SIGNATURE_FILE):
        if os.path.lexists(engine / name):
            try:
                _write(target / name, read_bytes(engine / name, root=engine))
            except UnusableFileError as error:
                raise ArtifactError(f"{engine / name} {error}") from error
        else:
            with writing(target / name):
                (target / name).unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write a small file, unless it has this content."""
    with contextlib.suppress(UnusableFileError):
        if read_bytes(path, root=path.parent) == data:
            return
    write_atomic(path, data)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no such call for directories
            os.fsync(handle)
    finally:
        os.close(handle)

"""What a finished output has lost, and the records from which only that is made again.

A finished output has no `.job` any more, but its manifest records all that the job knew of each
published file. `finished` (`job.py`) asks here whether every file is still there; if not, the
driver takes the intact files as published, quantizes the lost layers once more, and compares what
it makes with the manifest, which stays as it is. A layer needs its inputs, so the driver carries
the calibration blocks through the published layers before it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import ValidationError

from deepseek import untrusted
from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE, InputMaxima
from deepseek.artifact.manifest import LayerKey, Manifest
from deepseek.artifact.tensors import layer_file
from deepseek.errors import ArtifactError
from deepseek.files import sha256_file
from deepseek.tensor_files import DamagedFileError, read_header
from deepseek.untrusted import UnusableFileError, open_regular
from quant_jobs.job.folder import PublishedFile
from quant_jobs.reports.job_report import REPORT_FILE

#: Artifacts up to this size are compared byte by byte on every rerun; larger ones where it is asked
#: for, because it takes a minute for each 100 GB.
SMALL_ARTIFACT_BYTES = 256 << 20


def lost_files(
    output: Path, manifest: Manifest, *, whole: bool, small_bytes: int = SMALL_ARTIFACT_BYTES
) -> list[str]:
    """Names of the files of a finished output that are missing or damaged, in the manifest's order.

    Tensor files are compared by size and header, and by their SHA-256 if `whole`, or if the
    artifact has at most `small_bytes`; the other files by their SHA-256.

    Raises:
        ArtifactError: a file cannot be read, or the manifest names a file outside the output.
    """
    whole = whole or manifest.num_bytes <= small_bytes
    lost: list[str] = []
    for record in manifest.layers:
        if record.file != layer_file(record.layer):
            raise _foreign(output, record.file)
        path = output / record.file
        intact = _size(path) == record.num_bytes and (
            _sha256(path) == record.sha256
            if whole
            else _header_sha256(path) == record.header_sha256
        )
        if not intact:
            lost.append(record.file)
    for name, sha256 in manifest.files.items():
        if Path(name).name != name:
            raise _foreign(output, name)
        if _size(output / name) is None or _sha256(output / name) != sha256:
            lost.append(name)
    return lost


def lost_maxima(output: Path, manifest: Manifest) -> bytes | None:
    """The bytes of input_maxima.json of a finished output that has lost it, from the copy in the
    job's report; None where it is not lost, or was never there. Only quantizing every layer again
    would make the values anew.

    Raises:
        ArtifactError: it is lost, and the report does not hold it.
    """
    path = output / INPUT_MAXIMA_FILE
    sha256 = manifest.files.get(INPUT_MAXIMA_FILE)
    if sha256 is None or (_size(path) is not None and _sha256(path) == sha256):
        return None
    content = _reported_maxima(output / REPORT_FILE)
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise ArtifactError(
            f"{path} is missing or damaged, and {REPORT_FILE} beside it does not hold its values; "
            "put it back from a copy, or measure it anew with `python -m quant_jobs measure "
            f"--checkpoint {output} --calibration FILE`, which gives the artifact another digest"
        )
    return content


def _reported_maxima(report: Path) -> bytes | None:
    """input_maxima.json as the job's report, which nothing vouches for, would have it."""
    try:
        layers = untrusted.read_json_object(report, root=report.parent).get("layers")
        maxima = {
            entry["layer"]: entry["input_maxima"]
            for entry in (layers if isinstance(layers, list) else ())
            if isinstance(entry, dict) and entry.get("input_maxima") is not None
        }
        return InputMaxima.model_validate({"layers": maxima}).to_bytes()
    except (UnusableFileError, ValidationError, KeyError, TypeError):
        return None


def published_files(manifest: Manifest) -> dict[LayerKey, PublishedFile]:
    """What the job recorded of each published file while it ran, from its manifest."""
    return {
        record.layer: PublishedFile(
            record=record,
            coverage=() if record.layer == "globals" else manifest.coverage.get(record.layer, ()),
            fallbacks=tuple(
                fallback
                for fallback in manifest.fallbacks
                if ("globals" if fallback.layer is None else fallback.layer) == record.layer
            ),
            kv_latent_amax=(
                None if record.layer == "globals" else manifest.kv_latent_amax.get(record.layer)
            ),
        )
        for record in manifest.layers
    }


def check_remade(output: Path, remade: PublishedFile, recorded: PublishedFile) -> None:
    """Check that a layer that was made again has the bytes that the manifest records. Its output
    errors are not compared: their last digit may depend on the CPU.

    Raises:
        ArtifactError: it has others.
    """
    if remade.record.sha256 == recorded.record.sha256:
        return
    theirs, ours = recorded.record.tensors, remade.record.tensors
    names = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    )
    raise ArtifactError(
        f"{output / remade.record.file} was lost, and made again it has other bytes than before "
        f"({f'tensor {names[0]}' if names else 'its header'} differs), so this machine computes "
        f"otherwise than the one that made it; restore that file from a copy, or delete {output} "
        "and run again"
    )


def _size(path: Path) -> int | None:
    """Size of a regular file in bytes; None where there is none."""
    try:
        descriptor = open_regular(path)
    except UnusableFileError as error:
        if path.exists() and path.is_file():
            raise ArtifactError(f"{path} {error}; correct that and run again") from error
        return None
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); run again") from error


def _header_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_header(path).raw).hexdigest()
    except DamagedFileError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); run again") from error


def _foreign(output: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{output}: the manifest names the file {name!r}, which no job writes; delete {output} "
        "and run again"
    )

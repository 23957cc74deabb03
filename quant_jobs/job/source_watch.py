"""Notices a source checkpoint that changes while a job runs, or between its runs.

The source's fingerprint covers headers, sizes and the edges of each shard, not 700 GB of values. A
job reads each value once, so nothing else is needed until something is read again: a layer redone
after a worker died, a layer quantized anew because its file is gone, the embedding's rows when a
job starts over. What was read first is recorded (`folder.py`), in the manifest of a finished output
too, and compared here. Called by `driver.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek.artifact.manifest import LayerKey
from deepseek.errors import CheckpointError
from deepseek.inventory import global_tensors
from deepseek.tensor_files import tensor_digest
from quant_jobs.job.folder import JobFolder, PublishedFile
from quant_jobs.job.job import Job

_EMBEDDING = "model.embed_tokens"


class SourceWatch:
    """`recorded` is what a finished output, whose lost files are being made again, says of each
    file. All methods raise CheckpointError where the source has changed; the sentence names the
    tensor, or the layer where no more is known."""

    def __init__(
        self, job: Job, folder: JobFolder, recorded: Mapping[LayerKey, PublishedFile]
    ) -> None:
        self._job, self._folder, self._recorded = job, folder, recorded

    def check_layer(self, layer: int, digests: Mapping[str, str], source_sha256: str) -> None:
        """Check a layer that was just read: `digests` by tensor, and their digest."""
        changed = self._folder.record_source(layer, digests)
        if changed is not None:
            raise self._changed(f"tensor {changed}")
        self.check_recorded(layer, source_sha256)

    def check_recorded(self, key: LayerKey, source_sha256: str) -> None:
        """Check the source tensors of one file against the finished output alone."""
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.record.source_sha256 != source_sha256:
            raise self._changed(
                "the tensors outside the layers" if key == "globals" else f"layer {key}"
            )

    def check_embedding(self, published: PublishedFile | None) -> None:
        """Read the whole embedding and check it against the published globals; where these are not
        published yet, against what it was first read as. Workers are about to read the rows of
        their tokens from it, and nothing else of it is read twice."""
        (spec,) = (s for s in global_tensors(self._job.source.config) if s.module == _EMBEDDING)
        digest = tensor_digest(self._job.source.load([spec])[spec.name].data)
        if published is None:
            self._compare_embedding(spec.name, digest)
        elif digest != published.record.tensors[spec.name]:
            raise self._changed(f"tensor {spec.name}")

    def check_globals(self, digests: Mapping[str, str], source_sha256: str) -> None:
        """Check the tensors outside the layers, which a worker has just read to quantize the head:
        `digests` by tensor, and their digest."""
        name = f"{_EMBEDDING}.weight"
        self._compare_embedding(name, digests[name])
        self.check_recorded("globals", source_sha256)

    def _compare_embedding(self, name: str, digest: str) -> None:
        if self._folder.record_source("embedding", {name: digest}) is not None:
            raise self._changed(f"tensor {name}")

    def _changed(self, what: str) -> CheckpointError:
        verb = "have" if what.startswith("the tensors") else "has"
        return CheckpointError(
            f"{what} of {self._job.source.directory} {verb} other bytes than when this job first "
            f"read it; restore the checkpoint, or delete {self._job.output} and quantize again"
        )

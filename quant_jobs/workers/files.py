"""What a worker writes: layers' files, and the boundaries that a killed job resumes from.

Both run beside the worker's other calls, one at a time (`actor.py`, `in_process.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from deepseek.artifact.manifest import LayerRecord
from deepseek.artifact.writer import ArtifactWriter
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.workers.boundary import save_blocks
from quant_jobs.workers.messages import Tensors, WorkerJob


class WorkerFiles:
    """`bytes_written` counts both kinds of file."""

    def __init__(self, job: WorkerJob, reader: CheckpointReader) -> None:
        self._job, self._reader = job, reader
        self._writer: ArtifactWriter | None = None
        self._unsaved: dict[tuple[int, int], Tensor] = {}  # by layer that it enters, and block
        self.bytes_written = 0

    def write_layer(
        self,
        layer: int,
        source_sha256: str,
        errors: Mapping[str, float],
        pieces: Sequence[Tensors],
    ) -> LayerRecord:
        """Publish a layer's file from what all workers solved."""
        if self._writer is None:
            self._writer = ArtifactWriter(
                self._job.output, source=self._reader, recipe=self._job.recipe
            )
        tensors: dict[str, Tensor] = {}
        for piece in pieces:
            assert not tensors.keys() & piece.keys(), "two workers solved the same tensor"
            tensors |= piece
        record = self._writer.publish_layer(
            layer, tensors, source_sha256=source_sha256, errors=errors
        )
        self.bytes_written += record.num_bytes
        return record

    def buffer(self, layer: int, blocks: Mapping[int, Tensor]) -> None:
        """Keep what goes into `layer`, f32 [T, D] by block, until `store` is called for it."""
        self._unsaved |= {(layer, block): x_TD for block, x_TD in blocks.items()}

    def store(self, layer: int, blocks: Sequence[int], file: Path) -> None:
        """Store what goes into `layer`, of some of this worker's blocks, and let go of it.

        The file's folder must exist: a worker whose driver is gone must not bring it back.
        """
        leaving = {block: self._unsaved.pop((layer, block)) for block in sorted(blocks)}
        self.bytes_written += save_blocks(file, leaving)

"""The files that a worker writes: layers, and the boundaries from which a killed job resumes.

Writing runs beside the worker's other calls, in one thread (`actor.py`, `in_process.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from deepseek.artifact.manifest import LayerKey, LayerRecord
from deepseek.artifact.writer import ArtifactWriter
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.workers.boundary import save_blocks
from quant_jobs.workers.messages import Tensors, WorkerJob


class WorkerFiles:
    """Writes the files of one job. `bytes_written` counts layers and boundaries."""

    def __init__(self, job: WorkerJob, reader: CheckpointReader) -> None:
        self._job, self._reader = job, reader
        self._writer: ArtifactWriter | None = None
        self._unsaved: dict[tuple[int, int], Tensor] = {}  # (layer, block) -> the layer's input
        self.bytes_written = 0

    def write_layer(
        self,
        layer: LayerKey,
        source_sha256: str,
        errors: Mapping[str, float],
        pieces: Sequence[Tensors],
    ) -> LayerRecord:
        """Publish a layer's file, or that of the globals, from the packed tensors of all
        workers."""
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
        """Keep inputs of `layer`, f32 [T, D] by block, in memory until `store` writes them."""
        self._unsaved |= {(layer, block): x_TD for block, x_TD in blocks.items()}

    def store(self, layer: int, blocks: Sequence[int], file: Path) -> None:
        """Write the buffered inputs of `layer` for these blocks, and free them.

        The folder of `file` must exist: a worker whose driver is dead must not create it again.
        """
        inputs = {block: self._unsaved.pop((layer, block)) for block in sorted(blocks)}
        self.bytes_written += save_blocks(file, inputs)

"""How much disk the rest of a job takes, known to the byte before it begins.

The size of a published file follows from config, recipe and the types of the source's tensors, that
of a boundary from the calibration blocks. Called by `driver.py`, so that a job that cannot end for
lack of space says so before its first hour, not after it. A job whose disk fills up all the same
ends with a sentence of `deepseek/outputs.py`, and goes on when the same command runs again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.tensors import expected_tensors
from deepseek.outputs import check_space
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import saved_bytes
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import Job

_F32_BYTES = 4


def published_bytes(
    source: CheckpointReader, schemes: Mapping[str, Scheme], layer: LayerKey
) -> int:
    """Size of the file of one layer, or of the globals."""
    layout = {
        name: (dtypes[0] if len(dtypes) == 1 else source.dtype_of(name), shape)
        for name, (shape, dtypes) in expected_tensors(source.config, schemes, layer).items()
    }
    return saved_bytes(layout, {"format": "pt"})


def boundary_bytes(job: Job) -> int:
    """Size of the values of one boundary, f32 [blocks, T, D]."""
    num_blocks, block_tokens = job.blocks.ids.shape
    return num_blocks * block_tokens * job.source.config.hidden_size * _F32_BYTES


def check_room(
    job: Job,
    folder: JobFolder,
    schemes: Mapping[str, Scheme],
    missing: Iterable[LayerKey],
    layers: range,
) -> None:
    """Check that there is room for the files of `missing` and for the boundaries while the job
    works on `layers`, of which at most two exist at a time. A file that takes the place of a
    damaged one needs room beside it.

    Raises:
        OutputError: there is not.
    """
    num_boundaries = min(2, (layers.start > 0) + len(layers) - 1) if layers else 0
    boundaries = max(0, num_boundaries * boundary_bytes(job) - folder.boundary_bytes)
    files = sum(published_bytes(job.source, schemes, key) for key in missing)
    check_space(job.output, files + boundaries, "choose another --output")

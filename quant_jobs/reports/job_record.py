"""The record of one quantize run: what `job_report.json` holds.

The driver fills it in at the end of a run. It holds times and memory, which differ from run to run,
so it lies beside the artifact and belongs to no digest. A resumed run knows errors, coverage and
fallbacks of every layer (the earlier runs published them), but times and bytes only of its own
work. Plain data: the plots and the words of the page are `job_page.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from deepseek.artifact.input_maxima import (
    InputMaxima,
    InputOutlier,
    LayerMaxima,
    find_outliers,
)
from deepseek.artifact.manifest import Fallback, LayerKey

Seconds = dict[str, float]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceAccount(_Record):
    """One file of calibration text: its path and weight as given, the calibration blocks and
    tokens that were taken from it, and the SHA-256 of its bytes."""

    name: str
    weight: float
    blocks: int
    tokens: int
    sha256: str


class CalibrationAccount(_Record):
    """The calibration blocks of the job; `digest` is the SHA-256 of their token ids."""

    num_tokens: int
    num_blocks: int
    block_tokens: int
    digest: str
    sources: tuple[SourceAccount, ...]


class LayerAccount(_Record):
    """One published file: a decoder layer, or the tensors outside the layers (`globals`).

    `num_bytes` is its size in the artifact, `source_bytes` the size of the same tensors in the
    source. `errors` maps a module to its relative output error ||y' - y|| / ||y||. `coverage` holds
    the calibration tokens of each routed expert; it is empty for a layer without experts.
    `input_maxima` are the largest inputs of its routed experts, None where they are not kept; a
    finished output that has lost input_maxima.json gets it back from here.

    `seconds` is the driver's wall time by step, of this run alone. It is empty for a layer that an
    earlier run published, and has no `write` where this run only carried activations through it.
    """

    layer: LayerKey
    seconds: Seconds
    errors: dict[str, float]
    coverage: tuple[int, ...]
    num_bytes: int
    source_bytes: int
    input_maxima: LayerMaxima | None = None

    @property
    def is_of_this_run(self) -> bool:
        """Whether this run published the file, and so read its tensors from the source."""
        return "write" in self.seconds


class WorkerAccount(_Record):
    """One worker that was alive at the end of the run; nothing is known of workers that died.

    `seconds` is the worker's own time by step, where `wait` is idle time. `bytes_read` counts
    source weights, `bytes_written` the layer and boundary files that the worker wrote.
    """

    index: int
    node: str
    pid: int
    seconds: Seconds
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int


class JobRecord(_Record):
    """The content of `job_report.json`.

    `started_at_layer` is the first layer that this run worked on. An expert that the router sent
    fewer than `floor_tokens` (the recipe's) is starved. The driver itself reads and writes the
    tensors outside the decoder layers. Bytes and `wall_s` (seconds) are of this run alone.
    """

    #: Version 1 had a field `object_store_bytes`, which was always null; version 2 had no
    #: `input_maxima`. Nothing reads them: a resumed job writes the record anew, and what looks for
    #: lost maxima (`job/restore.py`) finds none.
    format_version: Literal[3] = 3
    recipe: str
    model: str
    num_workers: int = Field(ge=1)
    num_nodes: int = Field(ge=1)
    started_at_layer: int = Field(ge=0)
    workers_lost: int = Field(ge=0)
    wall_s: float
    floor_tokens: int
    calibration: CalibrationAccount
    layers: tuple[LayerAccount, ...]
    workers: tuple[WorkerAccount, ...]
    driver_peak_rss_bytes: int
    driver_bytes_read: int
    driver_bytes_written: int
    fallbacks: tuple[Fallback, ...]

    @property
    def bytes_read(self) -> int:
        """Source bytes that this run read."""
        return self.driver_bytes_read + sum(worker.bytes_read for worker in self.workers)

    @property
    def bytes_written(self) -> int:
        """Bytes that this run wrote."""
        return self.driver_bytes_written + sum(worker.bytes_written for worker in self.workers)

    @property
    def errors(self) -> dict[str, float]:
        """Relative output error by module, over all layers."""
        return {name: error for layer in self.layers for name, error in layer.errors.items()}

    @property
    def coverage(self) -> dict[int, tuple[int, ...]]:
        """Calibration tokens by routed expert, of each MoE layer."""
        return {
            layer.layer: layer.coverage
            for layer in self.layers
            if layer.layer != "globals" and layer.coverage
        }

    @property
    def input_maxima(self) -> InputMaxima:
        """The largest inputs of the routed experts, of each MoE layer that has them."""
        return InputMaxima(
            layers={
                layer.layer: layer.input_maxima
                for layer in self.layers
                if layer.layer != "globals" and layer.input_maxima is not None
            }
        )

    @property
    def input_outliers(self) -> tuple[InputOutlier, ...]:
        """The experts whose inputs are far larger than those of the others in their layer."""
        return find_outliers(self.input_maxima)

    @property
    def starved(self) -> dict[int, dict[int, int]]:
        """layer -> expert -> tokens, of the experts below the floor."""
        below = {
            layer: {
                expert: tokens for expert, tokens in enumerate(counts) if tokens < self.floor_tokens
            }
            for layer, counts in self.coverage.items()
        }
        return {layer: experts for layer, experts in below.items() if experts}

"""The estimate of one quantize job for people (tables and sentences) and for machines (JSON).

The figures are `model.py`'s. The JSON keys are frozen by a test: scripts read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from deepseek.cli import make_console, print_line
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe
from quant_jobs.cost import BLOCK_TOKENS, CALIBRATION_TOKENS, STORAGE
from quant_jobs.cost.model import (
    COMPUTE,
    PHASES,
    JobTime,
    Use,
    bytes_read,
    bytes_written,
    job_time,
    largest_calibration,
    memory_use,
    peak_bytes,
)
from quant_jobs.cost.rates import GPU, Rates, expected_rates, inputs, peak_rates
from quant_jobs.cost.work import Job

#: What a phase waits for, for the sentence that names the limit.
MEANING = {
    "read": "reading the source and digesting it",
    "forward A": "attention and router of the original layer",
    "statistics": "gate and up of every expert, and the statistics of their inputs",
    "solve": "the algorithm itself",
    "forward B": "the quantized layer",
    "exchange": "activations and experts' rows through the object store, PCIe and the network",
    "boundary": "storing the activations that a resumed job starts from",
    "calls": "rounds of calls",
    "write": "one worker writing the layer's file and digesting it",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """One job: times under the hardware's peaks and as expected, memory, bytes."""

    job: Job
    storage: float
    floor: JobTime
    expected: JobTime
    uses: list[Use]

    @property
    def fits(self) -> bool:
        host, store, gpu = peak_bytes(self.uses)
        return gpu <= GPU.memory_bytes and host + store <= GPU.host_memory_bytes


def make_estimate(
    config: ModelConfig,
    recipe: Recipe,
    nodes: int,
    *,
    tokens: int = CALIBRATION_TOKENS,
    block_tokens: int | None = None,
    storage: float = STORAGE,
) -> Estimate:
    """Estimate one job. `storage` is bytes per second of one node, reads and writes together;
    `block_tokens` None takes BLOCK_TOKENS, or the model's dense context where that is less.

    Raises:
        DeployError: a number is out of range.
    """
    if not storage > 0:
        raise DeployError(f"--storage {storage / 1e9:g}: give GB/s of one node, above 0")
    if block_tokens is None:
        block_tokens = min(BLOCK_TOKENS, config.dense_context)
    floor = Job(config=config, recipe=recipe, nodes=nodes, tokens=tokens, block_tokens=block_tokens)
    expected = replace(floor, imbalance=inputs()["imbalance"].value)
    return Estimate(
        job=expected,
        storage=storage,
        floor=job_time(floor, peak_rates(storage)),
        expected=job_time(expected, expected_rates(storage)),
        uses=memory_use(expected),
    )


# --- what would make it faster ---

Change = Callable[[Job, Rates], tuple[Job, Rates]]

#: Changes in the order in which they are put on top of each other. None of them is built.
LEVERS: tuple[tuple[str, Change], ...] = (
    (
        "activations travel as BF16 (changes results: to be judged)",
        lambda job, rates: (replace(job, row_bytes=2), rates),
    ),
    (
        "pinned buffers for copies to the GPU, 50 GB/s",
        lambda job, rates: (job, replace(rates, pcie=50e9)),
    ),
    (
        "GPU to GPU over InfiniBand, half of its peak, past the object store",
        lambda job, rates: (
            job,
            replace(rates, network=inputs()["network peak"].value / 2, put=float("inf")),
        ),
    ),
    (
        "TF32 products (5x)",
        lambda job, rates: (
            job,
            replace(rates, matmul=5 * rates.matmul, gram=5 * rates.gram),
        ),
    ),
)


def with_levers(estimate: Estimate, count: int) -> JobTime:
    """The expected time with the first `count` levers."""
    job, rates = estimate.job, expected_rates(estimate.storage)
    for _, change in LEVERS[:count]:
        job, rates = change(job, rates)
    return job_time(job, rates)


# --- showing ---


def as_json(estimate: Estimate, model: str) -> dict[str, Any]:
    """The JSON object that `estimate --json` prints: seconds and bytes."""
    job = estimate.job
    host, store, gpu = peak_bytes(estimate.uses)
    written, boundaries = bytes_written(job)
    return {
        "model": model,
        "recipe": job.recipe.name,
        "nodes": job.nodes,
        "gpus": job.workers,
        "tokens": job.num_blocks * job.block_tokens,
        "storage_bytes_per_s": estimate.storage,
        "fits": estimate.fits,
        "floor_s": round(estimate.floor.total, 1),
        "expected_s": round(estimate.expected.total, 1),
        "limit": estimate.expected.limit,
        "phases": {
            name: {
                "floor_s": round(estimate.floor.phase(name), 1),
                "expected_s": round(estimate.expected.phase(name), 1),
            }
            for name in PHASES
        },
        "bytes_read": bytes_read(job),
        "bytes_written": written,
        "boundary_bytes_written": boundaries,
        "host_bytes_per_node": host,
        "object_store_bytes_per_node": store,
        "gpu_bytes": gpu,
        "largest_calibration_tokens": largest_calibration(job),
    }


def print_estimate(estimate: Estimate, model: str) -> None:
    """Print two tables, then one sentence per fact, on stdout."""
    console = make_console()
    job = estimate.job
    title = (
        f"{model}, recipe {job.recipe.name}, {job.num_blocks} x {job.block_tokens} tokens, on "
        f"{job.nodes} x 8 {GPU.name}, storage {estimate.storage / 1e9:g} GB/s a node"
    )
    print_line(console, title, style="bold")
    console.print(_times(estimate))
    console.print(_memory(estimate))
    for sentence in sentences(estimate):
        print_line(console, sentence)


def sentences(estimate: Estimate) -> list[str]:
    """Time, memory and status of an estimate, a sentence or two each."""
    host, store, gpu = peak_bytes(estimate.uses)
    limit = estimate.expected.limit
    most = largest_calibration(estimate.job)
    verdict = "Fits" if estimate.fits else "Does not fit"
    return [
        f"Expected: {minutes(estimate.expected.total)} minutes; no less than "
        f"{minutes(estimate.floor.total)} by this schedule at these GPUs' peaks. Most of it is "
        f"{limit}: {MEANING[limit]}.",
        f"{verdict}: {gb(gpu)} GB on each GPU of {gb(GPU.memory_bytes)}, {gb(host + store)} GB on "
        f"each host, {gb(store)} GB of them in the object store. A GPU holds what enters the MLP "
        f"of at most {most:,} calibration tokens.",
        "An estimate, not a measurement: docs/quantize-671b.md has its inputs and what is built.",
    ]


def _times(estimate: Estimate) -> Table:
    table = Table()
    for name in ("minutes", "floor", "expected"):
        table.add_column(name, justify="left" if name == "minutes" else "right")
    for name in PHASES:
        beside = "" if name in COMPUTE else " (beside)"
        floor, expected = estimate.floor.phase(name), estimate.expected.phase(name)
        table.add_row(name + beside, minutes(floor), minutes(expected))
    table.add_section()
    table.add_row(
        "the job", minutes(estimate.floor.total), minutes(estimate.expected.total), style="bold"
    )
    return table


def _memory(estimate: Estimate) -> Table:
    table = Table()
    for name in ("GB", "processes of a node", "its object store", "a GPU"):
        table.add_column(name, justify="left" if name == "GB" else "right")
    for use in estimate.uses:
        table.add_row(use.name, *(gb(size) if size else "" for size in sizes(use)))
    table.add_section()
    table.add_row("at most at once", *map(gb, peak_bytes(estimate.uses)), style="bold")
    return table


def sizes(use: Use) -> tuple[int, int, int]:
    """Bytes of (processes of a node, its object store, a GPU)."""
    return use.host, use.store, use.gpu


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"

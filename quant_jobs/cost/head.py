"""The work of quantizing the language model's head, where the recipe names it.

Behind the last layer; follows `job/layer_steps.py` (`solve_head`): wave by wave, every worker runs
its own blocks through the final norm and observes them, and one worker, the owner, accumulates what
they saw; then the owner reads the tensors outside of layers, quantizes the head and writes them.
Nothing runs meanwhile.

D hidden · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from deepseek.formats import stored_bytes
from deepseek.inventory import head_spec
from quant_jobs.calibration.statistics import SAMPLE_TOKENS
from quant_jobs.cost.shapes import F32, globals_source_bytes
from quant_jobs.cost.work import Job, Load, Step, column_loop, factor, observed, per_weight


def head_steps(job: Job) -> Iterator[Step]:
    """The steps in their order; none where the head is copied."""
    if job.head is None:
        return
    for blocks, repeat in job.waves:
        yield _observe(job, blocks, repeat)
    yield Step("solve", [{"solve": _solve(job)}])


def head_memory(job: Job) -> tuple[int, int]:
    """(bytes of the owner's process, of its GPU) while it solves: the tensors outside of layers as
    stored, and on the GPU the weight in float32 and once more, for the error of its outputs or for
    GPTQ, whose Gram matrix has a factor beside it."""
    assert job.head is not None
    spec = head_spec(job.config)
    rows, width = spec.shape
    grams = 2 * width**2 * F32 if job.head.algorithm == "gptq" else 0
    host = globals_source_bytes(job.config) + stored_bytes(job.head, rows, width)
    return host, 2 * spec.numel * F32 + grams


def _observe(job: Job, blocks: int, repeat: int) -> Step:
    """Work of one wave, of the owner, which is the busiest: its own blocks, and the Gram matrix of
    all of them."""
    assert job.head is not None
    width = job.config.hidden_size
    tokens, mine = blocks * job.block_tokens, math.ceil(blocks / job.workers) * job.block_tokens
    load = Load(moved=12 * mine * width, launches=12, pcie=mine * job.row)  # the norm
    load += observed(mine, width)
    if job.head.algorithm != "gptq":
        return Step("solve", [{"statistics": load}], 0.0, 2, repeat)
    load += Load(pcie=mine * width * F32, put=mine * width * F32)  # its rows on their way
    load += job.gram(tokens, width, blocks) + Load(pcie=tokens * width * F32)
    return Step("solve", [{"statistics": load}], tokens * width * F32 * job.remote, 2, repeat)


def _solve(job: Job) -> Load:
    """Work of the owner on the weight [V, D]."""
    scheme = job.head
    assert scheme is not None
    spec = head_spec(job.config)
    rows, width = spec.shape
    load = Load(
        matmul=4 * SAMPLE_TOKENS * spec.numel,
        launches=30,
        pcie=2 * spec.numel + stored_bytes(scheme, rows, width),
    )
    load += per_weight(f"compress_int{scheme.bits}", spec.numel)
    load += per_weight(f"decompress_int{scheme.bits}", spec.numel)
    if scheme.clip == "mse":
        load += per_weight("mse_clip", spec.numel)
    if scheme.algorithm == "gptq":
        searches = width // (scheme.group_size or width) if scheme.clip == "mse" else 0
        load += factor(width) + column_loop(rows, width, 1, searches)
    return load

"""Decode speed of two engines in one process, in turns, so that the ratio survives a noisy machine.

One run: prompts are prefilled, then only decode steps are timed. Runs alternate and swap who goes
first; the median is reported and every run is kept. Called by `evaluate`; not a load test (there
is no HTTP here, and every sequence has the same length).
"""

from __future__ import annotations

import time
from statistics import median

from torch import Tensor

from deepseek.cli import make_progress
from deepseek.engine.engine import LLMEngine
from quant_jobs.evaluation import DecodeSpeed

BATCH_SIZES = (1, 8)
NUM_RUNS = 5
PROMPT_TOKENS = 32


def measure_decode(
    source: LLMEngine,
    quantized: LLMEngine,
    ids_T: Tensor,
    decode_tokens: int,
    batch_sizes: tuple[int, ...],
) -> tuple[DecodeSpeed, ...]:
    """Median decode tokens/s by batch size; `ids_T` int64 gives the prompt, none are measured
    where `decode_tokens` is 0."""
    if not decode_tokens:
        return ()
    prompt = ids_T[:PROMPT_TOKENS].tolist()
    results = []
    with make_progress() as progress:
        task = progress.add_task("decode speed", total=len(batch_sizes) * (NUM_RUNS + 1))
        for batch_size in batch_sizes:
            runs: dict[str, list[float]] = {"quantized": [], "source": []}
            for turn in range(NUM_RUNS + 1):
                order = [("quantized", quantized), ("source", source)]
                for name, engine in order if turn % 2 else reversed(order):
                    speed = decode_speed(engine, prompt, decode_tokens, batch_size)
                    if turn:  # the first turn warms caches and kernels
                        runs[name].append(speed)
                progress.advance(task)
            results.append(
                DecodeSpeed(
                    batch_size=batch_size,
                    tokens_per_s=median(runs["quantized"]),
                    source_tokens_per_s=median(runs["source"]),
                    runs=tuple(runs["quantized"]),
                    source_runs=tuple(runs["source"]),
                )
            )
    return tuple(results)

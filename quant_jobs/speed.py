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
from deepseek.engine.request import Request, SamplingParams, StepOutput
from deepseek.errors import ArtifactError
from quant_jobs.evaluation import DecodeSpeed

BATCH_SIZES = (1, 8)
NUM_RUNS = 5
#: After this long on one batch size no further turn starts; the runs that were made are reported.
BUDGET_S = 20.0
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
            started = time.monotonic()
            for turn in range(NUM_RUNS + 1):
                order = [("quantized", quantized), ("source", source)]
                for name, engine in order if turn % 2 else reversed(order):
                    speed = decode_speed(engine, prompt, decode_tokens, batch_size)
                    if turn:  # the first turn warms caches and kernels
                        runs[name].append(speed)
                progress.advance(task)
                if turn and time.monotonic() - started > BUDGET_S:
                    break  # a machine this busy gives no better figure for more patience
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


def decode_speed(
    engine: LLMEngine, prompt: list[int], decode_tokens: int, batch_size: int
) -> float:
    """Generated tokens per second over all sequences, greedy, once every prompt is prefilled."""
    sampling = SamplingParams(max_tokens=decode_tokens + 1, temperature=0.0, ignore_eos=True)
    prefilling = {f"speed-{index}" for index in range(batch_size)}
    for request_id in sorted(prefilling):
        engine.add_request(
            Request(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling)
        )
    while prefilling:
        prefilling -= {output.request_id for output in _step(engine) if output.token_ids}
    generated = 0
    started = time.perf_counter()
    while engine.has_work:
        generated += sum(len(output.token_ids) for output in _step(engine))
    seconds = time.perf_counter() - started
    assert generated, "nothing was left to decode"
    return generated / seconds


def _step(engine: LLMEngine) -> list[StepOutput]:
    """One step; a failed one must not pass for a fast one."""
    outputs = engine.step()
    for output in outputs:
        if output.error is not None:
            raise ArtifactError(f"the engine could not decode: {output.error}")
    return outputs

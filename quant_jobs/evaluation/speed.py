"""Decode speed of two engines in one process, in turns, so that other load affects both alike.

In one run prompts are prefilled, then only decode steps are timed. The engines alternate, and the
one that goes first changes each turn; the median is reported and every run is recorded. Sequences
of a batch have different prompts, because equal ones would choose equal experts and make a batch
too cheap. Called by `evaluate`; this is no load test (no HTTP, and all sequences are equally long).
"""

from __future__ import annotations

import time
from statistics import median
from typing import Protocol

from torch import Tensor

from deepseek.cli import make_progress
from deepseek.engine.request import Request, SamplingParams, StepOutput
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.record import DecodeSpeed

BATCH_SIZES = (1, 8)
NUM_RUNS = 5
#: Seconds on one batch size after which no further turn starts.
BUDGET_S = 20.0
PROMPT_TOKENS = 32


class Decoder(Protocol):
    """The part of an engine that decoding uses; see `LLMEngine`."""

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def step(self) -> list[StepOutput]: ...


def measure_decode(
    source: Decoder,
    quantized: Decoder,
    ids_BT: Tensor,
    decode_tokens: int,
    batch_sizes: tuple[int, ...],
) -> tuple[DecodeSpeed, ...]:
    """Median decode tokens per second by batch size; the prompts are pieces of `ids_BT` int64.
    Nothing is measured where `decode_tokens` is 0.

    Raises:
        ArtifactError: an engine failed in a step.
    """
    if not decode_tokens:
        return ()
    prompts = cut_prompts(ids_BT, max(batch_sizes))
    results = []
    with make_progress() as progress:
        task = progress.add_task("decode speed", total=len(batch_sizes) * (NUM_RUNS + 1))
        for batch_size in batch_sizes:
            runs: dict[str, list[float]] = {"quantized": [], "source": []}
            started = time.monotonic()
            for turn in range(NUM_RUNS + 1):
                order = [("quantized", quantized), ("source", source)]
                for name, engine in order if turn % 2 else reversed(order):
                    speed = decode_speed(engine, prompts[:batch_size], decode_tokens)
                    if turn:  # turn 0 warms caches and kernels
                        runs[name].append(speed)
                progress.advance(task)
                if turn and time.monotonic() - started > BUDGET_S:
                    break  # on so slow a machine more turns give no better figure
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


def cut_prompts(ids_BT: Tensor, count: int) -> list[list[int]]:
    """`count` different pieces of the text, of PROMPT_TOKENS each or fewer where it is short."""
    length = min(PROMPT_TOKENS, ids_BT.numel() // count)
    assert length, "fewer tokens than sequences"
    return ids_BT.flatten()[: count * length].view(count, length).tolist()


def decode_speed(engine: Decoder, prompts: list[list[int]], decode_tokens: int) -> float:
    """Generated tokens per second over all sequences, greedy, after every prompt is prefilled."""
    sampling = SamplingParams(max_tokens=decode_tokens + 1, temperature=0.0, ignore_eos=True)
    prefilling = set()
    for index, prompt in enumerate(prompts):
        request = Request(request_id=f"speed-{index}", prompt_ids=tuple(prompt), sampling=sampling)
        engine.add_request(request)
        prefilling.add(request.request_id)
    while prefilling:
        prefilling -= {output.request_id for output in _step(engine) if output.token_ids}
    generated = 0
    started = time.perf_counter()
    while engine.has_work:
        generated += sum(len(output.token_ids) for output in _step(engine))
    seconds = time.perf_counter() - started
    assert generated, "nothing was left to decode"
    return generated / seconds


def _step(engine: Decoder) -> list[StepOutput]:
    """One step. A failed step raises, because it would count as a fast one."""
    outputs = engine.step()
    for output in outputs:
        if output.error is not None:
            raise ArtifactError(f"the engine could not decode: {output.error}")
    return outputs

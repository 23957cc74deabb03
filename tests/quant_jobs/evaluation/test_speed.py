"""Decode speed: what is counted, with what prompts, and that a failure is never fast."""

from __future__ import annotations

import time

import pytest
import torch

from deepseek.engine.request import Request, StepOutput
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.speed import PROMPT_TOKENS, cut_prompts, decode_speed, measure_decode


class Metronome:
    """An engine that prefills in one slow step per request, then gives each request one token per
    quick step."""

    def __init__(self, *, prefill_s: float, step_s: float, fails_at: int | None = None) -> None:
        self.prefill_s, self.step_s, self.fails_at = prefill_s, step_s, fails_at
        self.waiting: list[Request] = []
        self.left: dict[str, int] = {}
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.left)

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[StepOutput]:
        self.steps += 1
        if self.waiting:
            time.sleep(self.prefill_s)
            request = self.waiting.pop(0)
            self.left[request.request_id] = request.sampling.max_tokens - 1
            return [self._output(request.request_id)]
        time.sleep(self.step_s)
        names = list(self.left)
        for name in names:
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
        return [self._output(name) for name in names]

    def _output(self, name: str) -> StepOutput:
        failed = self.steps == self.fails_at
        return StepOutput(
            request_id=name,
            token_ids=() if failed else (1,),
            text="",
            logprobs=(),
            finish_reason="error" if failed else None,
            prompt_tokens=1,
            completion_tokens=1,
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=0.0,
            error="the output is not finite" if failed else None,
        )


def test_only_decode_steps_are_timed_and_all_sequences_count() -> None:
    engine = Metronome(prefill_s=0.2, step_s=0.01)
    speed = decode_speed(engine, [[1], [2], [3]], 6)
    # 6 steps of 3 tokens in 10 ms each is at most 300 tokens/s; with the prefills it would be 27.
    assert 27 < speed <= 300
    assert engine.steps == 3 + 6


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_step_that_fails_is_an_error_not_a_speed(fails_at: int) -> None:
    engine = Metronome(prefill_s=0.0, step_s=0.0, fails_at=fails_at)
    with pytest.raises(ArtifactError, match="could not decode: the output is not finite"):
        decode_speed(engine, [[1]], 6)


def test_the_faster_engine_is_the_faster_one() -> None:
    slow, quick = (Metronome(prefill_s=0.0, step_s=seconds) for seconds in (0.012, 0.002))
    results = measure_decode(slow, quick, torch.arange(256).view(4, 64), 4, (1, 2))
    assert [result.batch_size for result in results] == [1, 2]
    for result in results:
        assert result.tokens_per_s > result.source_tokens_per_s


def test_sequences_of_a_batch_have_different_prompts() -> None:
    prompts = cut_prompts(torch.arange(1000).view(10, 100), 8)
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert [len(prompt) for prompt in cut_prompts(torch.arange(16).view(2, 8), 8)] == [2] * 8


def test_no_tokens_means_no_measurement() -> None:
    engine = Metronome(prefill_s=0.0, step_s=0.0)
    assert measure_decode(engine, engine, torch.zeros(2, 8), 0, (1,)) == ()
    assert engine.steps == 0

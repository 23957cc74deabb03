"""IntServe's embedded engine as a worker (workers.py).

Decode runs `LLMEngine.step`: scheduling, sampling and text are in the time. The contexts stay in
the engine as prefixes of the requests that computed them, so that filling them once is enough; a
decode computes the last page of each again before the clock starts.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.decoding import traffic
from bench.decoding.lines import answer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import token_bytes
from deepseek.engine.request import Request, SamplingParams, StepOutput
from deepseek.kv_layout import kv_layout

#: Tokens of one step at most.
STEP_TOKENS = 512


class Ours:
    """`steps` is the largest number of tokens that a decode may take."""

    def open(
        self,
        directory: str,
        *,
        is_engine: bool,
        kv_cache: str | None,
        threads: int,
        batch: int,
        context: int,
        steps: int,
        huge_pages: bool = True,
    ) -> dict[str, Any]:
        opened = LLMEngine.load if is_engine else LLMEngine.from_checkpoint
        # Contexts, what a decode adds to them twice (the last is forgotten first), and a prompt.
        per_sequence = context + 2 * (steps + 64)
        options = EngineOptions(
            kv_cache=kv_cache,
            max_batch_size=batch,
            max_batched_tokens=max(STEP_TOKENS, batch),
            max_kv_tokens=batch * per_sequence + 2 * context,
            num_threads=threads,
            huge_pages=huge_pages,
        )
        self.engine = opened(Path(directory), options)
        self._names = (str(number) for number in itertools.count())
        config, identity = self.engine.config, self.engine.identity
        layout = kv_layout(identity.arithmetic, identity.kv_cache)  # type: ignore[arg-type]
        row = 2 * config.hidden_size  # the table keeps the source's BF16
        stored = traffic.of_groups(
            self.engine.allocated_bytes(),
            table=row * config.vocab_size,
            row=row,
            token=token_bytes(config, layout),
        )
        return {"stored": asdict(stored), "words": f"{identity.kernels}, KV {identity.kv_cache}"}

    def prefill(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        self._add(tokens, max_tokens=1)
        self._run()
        return time.perf_counter() - started

    def fill(self, prompts: list[list[int]], batches: list[int]) -> str:
        self._prompts = prompts
        for prompt in prompts:
            self._add(prompt, max_tokens=1)
            self._run()
        return ""

    def decode(self, batch: int, steps: int) -> list[float]:
        with self.decoding(batch, steps):
            seconds = []
            for _ in range(steps):
                started = time.perf_counter()
                outputs = self.engine.step()
                seconds.append(time.perf_counter() - started)
                assert sum(len(output.token_ids) for output in outputs) == batch, "not a whole step"
        return seconds

    @contextmanager
    def decoding(self, batch: int, steps: int) -> Iterator[None]:
        """Inside, a step of the engine is one decode of the first `batch` contexts, `steps` times
        and more."""
        names = [self._add(prompt, max_tokens=2 + 2 * steps) for prompt in self._prompts[:batch]]
        waiting = set(names)
        while waiting:  # until each has its first token, and so nothing but decodes is left
            waiting -= {out.request_id for out in self.engine.step() if out.token_ids}
        yield
        for name in names:
            self.engine.abort(name)
        self._run()

    def _add(self, prompt: list[int], *, max_tokens: int) -> str:
        name = next(self._names)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(
            Request(request_id=name, prompt_ids=tuple(prompt), sampling=sampling)
        )
        return name

    def _run(self) -> list[StepOutput]:
        outputs = []
        while self.engine.has_work:
            outputs += self.engine.step()
        errors = [output.error for output in outputs if output.error is not None]
        assert not errors, errors[0]
        return outputs


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ours = Ours()
    answer({"open": ours.open, "prefill": ours.prefill, "fill": ours.fill, "decode": ours.decode})

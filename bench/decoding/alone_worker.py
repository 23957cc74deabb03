"""The engine alone under a closed loop of requests: what bench/served_decode.py holds the service
against. Worker of workers.py with one call, `load`.

No text goes in and none comes out, nobody waits for anybody: as many requests as the concurrency
says are in the engine, and each that ends is followed by the next at once.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from bench.decoding.lines import answer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.request import Request, SamplingParams


class Alone:
    def open(self, directory: str, *, threads: int, batch: int, tokens: int) -> None:
        """`batch` requests of `tokens` with their answers fit at once."""
        options = EngineOptions(
            max_batch_size=batch,
            max_batched_tokens=512,
            max_kv_tokens=batch * (tokens + 64),
            max_model_len=tokens,
            num_threads=threads,
        )
        self._engine = LLMEngine.load(Path(directory), options)

    def load(self, prompts: list[list[int]], concurrency: int, tokens: int) -> float:
        """Seconds until all prompts have their answers of so many tokens."""
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        waiting = [
            Request(request_id=str(number), prompt_ids=tuple(prompt), sampling=sampling)
            for number, prompt in enumerate(prompts)
        ]
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        for request in waiting[:concurrency]:
            self._engine.add_request(request)
        del waiting[:concurrency]
        while self._engine.has_work:
            for output in self._engine.step():
                counts[output.request_id] += len(output.token_ids)
                if output.finish_reason is not None and waiting:
                    self._engine.add_request(waiting.pop(0))
        seconds = time.perf_counter() - started
        assert set(counts.values()) == {tokens}, "an answer is not whole"
        return seconds


if __name__ == "__main__":
    alone = Alone()
    answer({"open": alone.open, "load": alone.load})

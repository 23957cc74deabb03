"""What is judged is computed, every token of it: no engine of an evaluation keeps prefixes."""

from __future__ import annotations

import torch
from support.quantizing import SmallModel

from deepseek.engine.engine import LLMEngine
from quant_jobs.evaluate import Settings, _engine_options, _load_source
from quant_jobs.evaluation.speed import cut_prompts, decode_speed


def test_engines_of_an_evaluation_find_and_keep_nothing(small: SmallModel) -> None:
    settings = Settings(num_threads=1)
    prompts = cut_prompts(torch.arange(64) % 50, 2)
    engines = [
        _load_source(small.directory, settings),
        LLMEngine.from_checkpoint(small.directory, _engine_options(None, settings)),
    ]
    for engine in engines:
        for _ in range(2):  # as evaluation times the same prompts several times
            decode_speed(engine, prompts, 2)
        load = engine.current_load()
        assert (load.cached_prompt_tokens, load.computed_prompt_tokens) == (0, 4 * 32)
        assert load.kv_tokens_cached == 0

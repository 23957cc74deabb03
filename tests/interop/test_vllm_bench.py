"""`vllm bench serve` measures the service: every request succeeds, and its counts are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.environments import run_in
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

NUM_PROMPTS, INPUT_TOKENS, OUTPUT_TOKENS = 8, 32, 16
RANDOM = (
    *("--dataset-name", "random", "--random-input-len", INPUT_TOKENS),
    *("--random-output-len", OUTPUT_TOKENS, "--ignore-eos"),
)
BACKENDS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}


def bench(served: Served, tiny_model: Path, folder: Path, *options: object) -> dict[str, Any]:
    """Its result, with one entry per request in `errors`, `output_lens` and the like."""
    words = (
        *("--base-url", served.url, "--model", served.model, "--tokenizer", tiny_model),
        *("--num-prompts", NUM_PROMPTS, "--max-concurrency", 4, "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", folder),
        *("--result-filename", "result.json", *options),
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "VLLM_NO_USAGE_STATS": "1"}
    run_in("vllm_bench", "run_vllm_bench.py", *words, OPENAI_API_KEY=served.key, **offline)
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_request_of_a_random_load_succeeds(
    served: Served, tiny_model: Path, tmp_path: Path, backend: str
) -> None:
    goodput = ("--goodput", "ttft:60000", "tpot:60000")
    options = ("--backend", backend, "--endpoint", BACKENDS[backend], *RANDOM, *goodput)
    before = served.generated_tokens()
    result = bench(served, tiny_model, tmp_path, *options)
    assert result["errors"] == [""] * NUM_PROMPTS
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0)
    assert result["output_lens"] == [OUTPUT_TOKENS] * NUM_PROMPTS
    assert served.generated_tokens() - before == NUM_PROMPTS * OUTPUT_TOKENS
    assert all(len(gaps) > 0 for gaps in result["itls"])
    assert result["request_goodput"] > 0


def test_its_sampling_options_and_a_file_of_prompts_are_taken(
    served: Served, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"import module_{n}\n"}) for n in range(NUM_PROMPTS)]
    prompts.write_text("\n".join(lines) + "\n")
    result = bench(
        *(served, tiny_model, tmp_path, "--backend", "openai-chat"),
        *("--endpoint", "/v1/chat/completions", "--dataset-name", "custom"),
        *("--dataset-path", prompts, "--custom-output-len", OUTPUT_TOKENS),
        *("--temperature", 0.7, "--top-p", 0.9, "--top-k", 20, "--repetition-penalty", 1.0),
    )
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0), result["errors"]


def test_a_field_that_is_not_served_fails_every_request(
    served: Served, tiny_model: Path, tmp_path: Path
) -> None:
    """So that the test above can fail: the result does say what is refused."""
    options = ("--backend", "openai", "--endpoint", BACKENDS["openai"], *RANDOM)
    result = bench(served, tiny_model, tmp_path, *options, "--frequency-penalty", 0.5)
    assert (result["completed"], result["failed"]) == (0, NUM_PROMPTS)

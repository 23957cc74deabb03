"""guidellm measures the service: every request succeeds, and is as long as it was asked to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.environments import environment, run_checked
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

NUM_REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 8, 32, 16
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SYNCHRONOUS, CONCURRENT = "kind=synchronous", "kind=concurrent,streams=4"


def guide(
    served: Served,
    tiny_model: Path,
    folder: Path,
    profile: str,
    backend: str = "",
    data: str = f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}",
) -> dict[str, Any]:
    """Its one benchmark."""
    target = f"kind=openai_http,target={served.url},api_key={served.key}{backend}"
    words = (
        *("run", "--backend", target, "--profile", profile, "--data", data),
        *("--tokenizer", f"kind=hf_auto,model={tiny_model}", "--disable-progress"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--output", f"kind=json,path={folder / 'result.json'}"),
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    run_checked([environment("guidellm"), "-I", "-m", "guidellm", *words], **offline)
    [benchmark] = json.loads((folder / "result.json").read_text())["benchmarks"]
    return dict(benchmark)


def assert_all_succeeded(benchmark: dict[str, Any]) -> None:
    requests, state = benchmark["requests"], benchmark["scheduler_state"]
    failed = requests["errored"] + requests["incomplete"]
    assert [request["info"]["error"] for request in failed] == []
    ended = [state[f"{how}_requests"] for how in ("successful", "errored", "cancelled")]
    assert ended == [NUM_REQUESTS, 0, 0]


@pytest.mark.parametrize(
    ("profile", "path"),
    [(SYNCHRONOUS, CHAT), (CONCURRENT, CHAT), (CONCURRENT, TEXT)],
    ids=["one at a time, chat", "four at a time, chat", "four at a time, text"],
)
def test_every_request_succeeds_and_has_its_length(
    served: Served, tiny_model: Path, tmp_path: Path, profile: str, path: str
) -> None:
    backend = f",model={served.model},request_format={path}"
    before = served.generated_tokens()
    benchmark = guide(served, tiny_model, tmp_path, profile, backend)
    assert_all_succeeded(benchmark)
    successful = benchmark["requests"]["successful"]
    assert {request["output_metrics"]["text_tokens"] for request in successful} == {OUTPUT_TOKENS}
    assert served.generated_tokens() - before == NUM_REQUESTS * OUTPUT_TOKENS
    times = [request["info"]["timings"] for request in successful]
    assert all(t["token_iterations"] > 1 for t in times)  # they streamed


def test_the_model_is_asked_for_and_prompts_may_come_from_a_file(
    served: Served, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"import m{n}"}) + "\n" for n in range(8)))
    data = f"kind=json_file,path={prompts}"
    benchmark = guide(served, tiny_model, tmp_path, CONCURRENT, ",max_tokens=8", data)
    assert_all_succeeded(benchmark)
    successful = benchmark["requests"]["successful"]
    assert all(request["output_metrics"]["text_tokens"] <= 8 for request in successful)

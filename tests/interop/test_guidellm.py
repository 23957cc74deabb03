"""guidellm measures the service: every request succeeds, and is as long as it was asked to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.environments import environment, run_checked
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

INPUT_TOKENS, OUTPUT_TOKENS = 32, 16
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
    """The requests of its one benchmark, by how they ended."""
    target = f"kind=openai_http,target={served.url},api_key={served.key}{backend}"
    words = (
        *("run", "--backend", target, "--profile", profile, "--data", data),
        *("--tokenizer", f"kind=hf_auto,model={tiny_model}", "--disable-progress"),
        *("--constraint", "kind=max_requests,count=8"),
        *("--output", f"kind=json,path={folder / 'result.json'}"),
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    run_checked([environment("guidellm"), "-I", "-m", "guidellm", *words], **offline)
    [benchmark] = json.loads((folder / "result.json").read_text())["benchmarks"]
    return dict(benchmark["requests"])


@pytest.mark.parametrize(
    ("profile", "path"),
    [(SYNCHRONOUS, CHAT), (CONCURRENT, CHAT), (CONCURRENT, TEXT)],
    ids=["one at a time, chat", "four at a time, chat", "four at a time, text"],
)
def test_every_request_succeeds_and_has_its_length(
    served: Served, tiny_model: Path, tmp_path: Path, profile: str, path: str
) -> None:
    backend = f",model={served.model},request_format={path}"
    requests = guide(served, tiny_model, tmp_path, profile, backend)
    assert [request["info"]["error"] for request in requests["errored"]] == []
    lengths = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    assert lengths == [OUTPUT_TOKENS] * 8
    times = [request["info"]["timings"] for request in requests["successful"]]
    assert all(t["token_iterations"] > 1 for t in times)  # they streamed


def test_the_model_is_asked_for_and_prompts_may_come_from_a_file(
    served: Served, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"import m{n}"}) + "\n" for n in range(8)))
    data = f"kind=json_file,path={prompts}"
    requests = guide(served, tiny_model, tmp_path, CONCURRENT, ",max_tokens=8", data)
    assert [request["info"]["error"] for request in requests["errored"]] == []
    assert len(requests["successful"]) == 8
    assert all(r["output_metrics"]["text_tokens"] <= 8 for r in requests["successful"])

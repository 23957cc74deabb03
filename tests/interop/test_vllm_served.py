"""vLLM itself, served: HTTP ingress, adapter and worker on a real Serve, with two replicas, one of
which loses its engine in the middle of an answer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.processes import named
from support.served import Served, serving_command
from support.serving import metric, wait_for
from support.vllm_engines import bf16_directories, vllm_options
from transformers import AutoTokenizer

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

TOKENS = 600
#: Nats by which BF16 may put another token first.
NEAR_TIE = 0.1


@dataclass(frozen=True)
class Fleet:
    served: Served
    log: Path

    def running(self) -> dict[str, int]:
        return self.served.running()

    def cores(self) -> list[int]:
        """The engine cores of all replicas."""
        return named(self.served.pid, "VLLM::EngineCore")

    def core_of(self, replica: str) -> int:
        [core] = named(self.served.replica_process(replica), "VLLM::EngineCore")
        return core

    def wait_idle(self) -> None:
        wait_for(lambda: len(self.running()) >= 2 and not any(self.running().values()), 600)

    def last_line(self) -> dict[str, Any]:
        """Of the access log."""
        return dict(json.loads(self.log.read_text().splitlines()[-1]))

    def lines(self) -> int:
        return len(self.log.read_text().splitlines())

    def stream(self, body: dict[str, Any], begun: Any = None, after: int = 40) -> list[Any]:
        """The chunks of a streamed answer; `begun` is called after some of them, and ends it by
        returning True."""
        chunks = []
        headers = {"authorization": f"Bearer {self.served.key}"}
        with httpx.stream(
            "POST", f"{self.served.url}/v1/completions", json=body, headers=headers, timeout=600
        ) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == after and begun is not None and line and begun():
                    return chunks
        return chunks


@pytest.fixture(scope="module")
def directories(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return bf16_directories(tiny_model, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def fleet(
    directories: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings: dict[str, Any] = {
        "remote": vllm_options(directories[0]),
        "model_name": "tiny",
        "allow_ungated": True,
        "replicas": 2,
        "access_log": str(folder / "access.log"),
    }
    with serving_command(folder, settings) as served:
        yield Fleet(served, folder / "access.log")


def question(fleet: Fleet, prompt: list[int], tokens: int = TOKENS) -> dict[str, Any]:
    return {
        "model": fleet.served.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def text_of(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["text"] for c in chunks if c["choices"])


def test_an_answer_over_http_is_the_embedded_engines(
    fleet: Fleet, directories: tuple[Path, Path], tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = fleet.served.post(
        "/v1/completions", prompt="import json\n", max_tokens=24, temperature=0, logprobs=3
    )
    [choice] = answer["choices"]
    told = choice["logprobs"]
    assert answer["usage"]["completion_tokens"] == len(told["tokens"])
    ids = tokenizer("import json\n")["input_ids"]
    reference = LLMEngine.load(directories[1], EngineOptions(kv_cache="bf16"))
    for position, token in enumerate(told["tokens"]):
        rows = reference.score(torch.tensor(ids))[-1].log_softmax(-1)
        best = {tokenizer.decode([n]): float(rows[n]) for n in rows.topk(5).indices.tolist()}
        assert token in best
        assert max(best.values()) - best[token] < NEAR_TIE
        assert abs(told["token_logprobs"][position] - best[token]) < NEAR_TIE
        ids = [
            *ids,
            next(n for n in rows.topk(5).indices.tolist() if tokenizer.decode([n]) == token),
        ]


def test_an_answer_goes_on_where_its_engine_was_killed(fleet: Fleet, tiny_model: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(tiny_model)("def main():\n")["input_ids"]
    fleet.wait_idle()
    calm = fleet.stream(question(fleet, prompt))
    fleet.wait_idle()
    before, killed = fleet.lines(), []

    def kill() -> None:
        wait_for(lambda: sum(fleet.running().values()) == 1, 60)
        [busy] = [name for name, number in fleet.running().items() if number]
        killed.append(fleet.core_of(busy))
        os.kill(killed[0], signal.SIGKILL)

    disturbed = fleet.stream(question(fleet, prompt), kill)
    wait_for(lambda: fleet.lines() > before, 30)
    line = fleet.last_line()
    assert (line["resumes"], line["outcome"], len(set(line["replicas"]))) == (1, "ok", 2)
    for chunks in (calm, disturbed):
        usage = chunks[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), TOKENS)
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"
        assert len({chunk["id"] for chunk in chunks}) == 1
    seen = text_of(disturbed[:40])
    assert text_of(calm).startswith(seen)
    print(f"\nof {len(text_of(calm))} characters the first {shared(calm, disturbed)} are the same")
    assert shared(calm, disturbed) > len(seen) + 50  # it goes on with what comes next
    wait_for(lambda: len(fleet.cores()) == 2 and killed[0] not in fleet.cores(), 600)


def shared(first: list[Any], second: list[Any]) -> int:
    """Characters of the common beginning."""
    return len(os.path.commonprefix([text_of(first), text_of(second)]))


def test_a_client_that_leaves_ends_its_request(fleet: Fleet) -> None:
    fleet.wait_idle()
    before = fleet.served.generated_tokens()
    fleet.stream(question(fleet, [5, 6, 7], 1000), lambda: True, after=5)
    fleet.wait_idle()
    assert 5 <= fleet.served.generated_tokens() - before < 1000


def test_the_service_says_what_it_serves(fleet: Fleet) -> None:
    fleet.wait_idle()
    text = fleet.served.metrics()
    assert metric(text, "intserve_engine_kv_tokens_capacity") > 0
    headers = {"authorization": f"Bearer {fleet.served.key}"}
    models = httpx.get(f"{fleet.served.url}/v1/models", headers=headers).json()["data"]
    assert models[0]["max_model_len"] == 1024
    assert httpx.get(f"{fleet.served.url}/health").status_code == 200

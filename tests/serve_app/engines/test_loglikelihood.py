"""lm-evaluation-harness over HTTP: what it computes from our answers is what the engine scores.

Its `local-completions` model sends batches of token ids with `echo: true`, `logprobs: 1` and
`max_tokens: 1`, leaves the last token out (the generated one), sums the logprobs behind the context
and takes a continuation for greedy where each token's logprob is the largest of its alternatives.
`parse_logprobs` below is that code (lm_eval 0.4.13, models/openai_completions.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.configs import make_config
from support.serving import LocalEngines, client_of

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer, PromptText
from serve_app.telemetry.tracing import Telemetry

CONTEXT = "Python's list"
ENDINGS = [" is a sequence of items.", " 世界 🙂", " aardvark", "."]


def parse_logprobs(answer: dict[str, Any], ctxlens: list[int]) -> list[tuple[float, bool]]:
    res = []
    for choice, ctxlen in zip(
        sorted(answer["choices"], key=itemgetter("index")), ctxlens, strict=True
    ):
        logprobs = sum(choice["logprobs"]["token_logprobs"][ctxlen:-1])
        tokens_logprobs = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        top_logprobs = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        is_greedy = True
        for tok, top in zip(tokens_logprobs, top_logprobs, strict=True):
            if tok != max(top.values()):
                is_greedy = False
                break
        res.append((logprobs, is_greedy))
    return res


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loglikelihood") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    return directory


@pytest.fixture(scope="module")
def direct(engine_dir: Path) -> LLMEngine:
    options = EngineOptions(max_model_len=512, max_kv_tokens=2048, num_threads=1)
    return LLMEngine.load(engine_dir, options)


@pytest.fixture(scope="module")
def tokenizer(engine_dir: Path) -> HfTokenizer:
    return HfTokenizer(engine_dir, read_documents(engine_dir, read_engine_manifest(engine_dir)))


@pytest.fixture
async def client(engine_dir: Path, tokenizer: HfTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    config = make_config(
        engine=engine_dir,
        allow_ungated=True,
        model_name="tiny",
        max_model_len=512,
        kv_tokens=2048,
        max_batched_tokens=48,  # prompts are computed in several chunks, beside each other
        num_threads=1,
    )
    engine = EmbeddedEngine(config.pool.engine)
    try:
        service = Service(config, tokenizer, LocalEngines(engine), Telemetry(None))
        async with client_of(service) as client:
            yield client
    finally:
        await engine.shutdown()


def encode(tokenizer: HfTokenizer, text: str, *, special_tokens: bool = True) -> list[int]:
    return tokenizer.encode(PromptText(text, special_tokens))


def payload(prompts: Any, **fields: Any) -> dict[str, Any]:
    """As lm_eval's `_create_payload`."""
    return {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        **fields,
    }


def score(engine: LLMEngine, ids: list[int], ctxlen: int) -> tuple[float, bool]:
    """The loglikelihood of the tokens behind the context, and whether greedy decoding says them."""
    rows = engine.score(torch.tensor(ids)).log_softmax(-1)[ctxlen - 1 : -1]
    own = torch.tensor(ids[ctxlen:])
    logprobs = rows.gather(1, own[:, None])[:, 0]
    return float(logprobs.sum()), bool((logprobs == rows.max(dim=-1).values).all())


@pytest.mark.heavy
async def test_multiple_choice_is_scored_as_the_engine_scores_it(
    client: httpx.AsyncClient, direct: LLMEngine, tokenizer: HfTokenizer
) -> None:
    context = encode(tokenizer, CONTEXT)
    rows = direct.score(torch.tensor(context))
    greedy = [int(rows[-1].argmax())]
    endings = [encode(tokenizer, text, special_tokens=False) for text in ENDINGS]
    prompts = [context + ending for ending in [*endings, greedy]]
    ctxlens = [len(context)] * len(prompts)
    answer = await client.post("/v1/completions", json=payload(prompts))
    assert answer.status_code == 200, answer.text
    told = parse_logprobs(answer.json(), ctxlens)
    expected = [score(direct, ids, len(context)) for ids in prompts]
    assert [value for value, _ in told] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in told] == [is_greedy for _, is_greedy in expected]
    assert told[-1][1]
    assert not all(is_greedy for _, is_greedy in told)
    # The same prompts as text, which the service tokenizes; and without the generated token.
    texts = [CONTEXT + ending for ending in ENDINGS[:1]]
    [by_text] = (await client.post("/v1/completions", json=payload(texts))).json()["choices"]
    assert by_text["text"].startswith(texts[0])
    assert parse_logprobs({"choices": [by_text]}, ctxlens[:1]) == told[:1]
    none = (await client.post("/v1/completions", json=payload(prompts, max_tokens=0))).json()
    for whole, bare in zip(answer.json()["choices"], none["choices"], strict=True):
        assert bare["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:-1]
        assert bare["finish_reason"] == "length"
    assert none["usage"]["completion_tokens"] == 0


@pytest.mark.heavy
async def test_rolling_perplexity_is_scored_as_the_engine_scores_it(
    client: httpx.AsyncClient, direct: LLMEngine, tokenizer: HfTokenizer, tiny_model: Path
) -> None:
    """Windows of a text, each with one token of context: the prefix token, then the last one."""
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")[:900]
    ids = encode(tokenizer, text)
    size = 100
    windows = [(ids[at : at + size + 1]) for at in range(0, len(ids) - 1, size)]
    assert len(windows) > 1
    answer = await client.post("/v1/completions", json=payload(windows))
    assert answer.status_code == 200, answer.text
    told = [value for value, _ in parse_logprobs(answer.json(), [1] * len(windows))]
    expected = [score(direct, window, 1)[0] for window in windows]
    assert told == pytest.approx(expected, abs=1e-4)


@pytest.mark.heavy
async def test_bytes_and_texts_of_an_echo_are_the_prompts_own(
    client: httpx.AsyncClient, tokenizer: HfTokenizer
) -> None:
    text = "Résumé 世界 🙂 done"
    ids = encode(tokenizer, text)
    fields = {"max_tokens": 0, "logprobs": 3, "prompt_logprobs": 2}
    answer = (await client.post("/v1/completions", json=payload([text, text], **fields))).json()
    [choice, same] = answer["choices"]
    assert same == choice | {"index": 1}
    assert choice["text"] == text
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids)
    assert "".join(logprobs["tokens"][1:]) == text  # behind the begin-of-sentence token
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]:
        assert text[offset : offset + len(token)] == token
    for token_id, entry, own in zip(
        ids[1:], choice["prompt_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True
    ):
        assert entry[str(token_id)]["logprob"] == own
        best = [item for item in entry.values() if item["rank"] == 1]
        assert len(best) == 1
        assert best[0]["logprob"] == max(item["logprob"] for item in entry.values())
    for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert own <= max(top.values())
        assert 1 <= len(top) <= 4

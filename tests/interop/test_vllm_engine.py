"""vLLM itself as an engine behind the worker's boundary: what a client gets of it, how it ends.

The directory is one that `build --target vllm` made of the example model in BF16; the embedded
engine has the same tensors, and is the reference.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import request as request_of
from support.engines import run, tokens
from support.processes import tree
from support.serving import wait_for
from support.vllm_engines import MAX_MODEL_LEN, LoopThread, bf16_directories, vllm_options
from transformers import AutoTokenizer

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import SamplingParams
from deepseek.errors import DeployError, RequestError
from serve_app.engines.protocol import (
    Done,
    EngineInfo,
    Event,
    GenerateRequest,
    PromptLogprobs,
    Tokens,
)
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines
from serve_app.engines.remote.vllm import plan_vllm
from serve_app.errors import EngineUnavailable

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

#: Held-out texts and prompts behind them, and tokens of a greedy answer.
TEXTS, TEXT_TOKENS, PROMPTS, PROMPT_TOKENS, ANSWER = 4, 256, 8, 48, 32
#: Nats by which BF16 may put another token first.
NEAR_TIE = 0.1


@dataclass(frozen=True)
class Running:
    loop: LoopThread
    engine: RemoteEngine
    info: EngineInfo
    tokenizer: Any

    def events(self, request: GenerateRequest) -> list[Event]:
        async def read() -> list[Event]:
            return [event async for event in self.engine.generate(request)]

        return self.loop.run(read())

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def directories(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return bf16_directories(tiny_model, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reference(directories: tuple[Path, Path]) -> LLMEngine:
    return LLMEngine.load(directories[1], EngineOptions(kv_cache="bf16"))


@pytest.fixture(scope="module")
def running(directories: tuple[Path, Path], tiny_model: Path) -> Iterator[Running]:
    loop = LoopThread()
    engine = RemoteEngine(vllm_options(directories[0]))
    try:
        info = loop.run(engine.start())
        yield Running(loop, engine, info, AutoTokenizer.from_pretrained(tiny_model))
    finally:
        loop.run(engine.shutdown())
        loop.close()
    assert children() == []


@pytest.fixture(scope="module")
def held_out(tiny_model: Path, running: Running) -> tuple[list[list[int]], list[list[int]]]:
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(running.ids(text))
    num_text = TEXTS * TEXT_TOKENS
    prompts = ids[num_text:][: PROMPTS * PROMPT_TOKENS].view(PROMPTS, -1)
    return ids[:num_text].view(TEXTS, -1).tolist(), prompts.tolist()


def children() -> list[int]:
    """Processes below this one that are not the test environment's own."""
    return [pid for pid in tree(os.getpid())[1:] if "worker" in words(pid) or "VLLM" in words(pid)]


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


NOBODY = "0.0.0.0"


def sockets(pid: int) -> list[tuple[str, str]]:
    """Own and other address of each TCP socket of a process."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(entry))
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[9]}]" in own:
            here, there = (
                socket.inet_ntoa(bytes.fromhex(address.partition(":")[0])[::-1])
                for address in fields[1:3]
            )
            found.append((here, there))
    return found


def ask(name: str, prompt: Any, max_tokens: int = ANSWER, **more: Any) -> GenerateRequest:
    """Greedy and deaf to the end token unless told otherwise."""
    own = {key: more.pop(key) for key in ("output_ids", "num_shown", "cache_salt") if key in more}
    sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **more}
    return GenerateRequest(
        request_id=name, prompt_ids=tuple(prompt), sampling=SamplingParams(**sampling), **own
    )


def told(events: list[Event]) -> tuple[list[int], str, Done]:
    *rest, done = events
    assert isinstance(done, Done)
    some = [event for event in rest if isinstance(event, Tokens)]
    ids = [token for event in some for token in event.token_ids]
    return ids, "".join(event.text for event in some), done


def common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_it_says_what_it_is(running: Running, directories: tuple[Path, Path]) -> None:
    info = running.info
    assert (info.engine, info.max_model_len, info.kv_cache) == ("vllm", MAX_MODEL_LEN, "bf16")
    assert (info.page_tokens, info.max_running, info.continues) == (128, 8, True)
    assert info.kv_tokens_total >= 8 * MAX_MODEL_LEN
    assert info.engine_digest == plan_vllm(vllm_options(directories[0])).engine_digest


def test_every_token_of_its_greedy_answers_is_the_embedded_engines_best_or_a_near_tie(
    running: Running,
    reference: LLMEngine,
    held_out: tuple[list[list[int]], list[list[int]]],
    record_property: Any,
) -> None:
    prompts = held_out[1]
    outputs = run(reference, [request_of(str(n), row, ANSWER) for n, row in enumerate(prompts)])
    agreed, behind = [], []
    for number, prompt in enumerate(prompts):
        ids, text, done = told(running.events(ask(f"greedy-{number}", prompt)))
        assert (done.reason, done.completion_tokens, len(ids)) == ("length", ANSWER, ANSWER)
        assert running.tokenizer.decode(ids, skip_special_tokens=True).startswith(text.rstrip("�"))
        agreed.append(common(ids, tokens(outputs[str(number)])))
        rows = reference.score(torch.tensor(prompt + ids)).log_softmax(-1)[len(prompt) - 1 : -1]
        behind += (rows.max(-1).values - rows.gather(-1, torch.tensor(ids)[:, None])[:, 0]).tolist()
    record_property("greedy tokens that agree", agreed)
    print(f"\ngreedy: {agreed} of {ANSWER} tokens agree; furthest behind {max(behind):.4f} nats")
    assert sum(length == ANSWER for length in agreed) >= PROMPTS - 3
    assert max(behind) < NEAR_TIE


def test_its_logprobs_diverge_from_the_embedded_engine_by_no_more_than_bf16_does(
    running: Running,
    reference: LLMEngine,
    held_out: tuple[list[list[int]], list[list[int]]],
    record_property: Any,
) -> None:
    """KL in nats from the embedded engine's distribution, over the 20 best tokens that vLLM tells
    and one event for all others: at most the whole KL."""
    divergences, chosen = [], []
    for number, text in enumerate(held_out[0]):
        ours = reference.score(torch.tensor(text)).log_softmax(-1)
        events = running.events(ask(f"score-{number}", text, 1, prompt_logprobs=20))
        [scores] = [event for event in events if isinstance(event, PromptLogprobs)]
        assert len(scores.logprobs) == len(text)
        assert scores.logprobs[0] is None
        for position, item in enumerate(scores.logprobs[1:]):
            assert item is not None
            row = ours[position]
            top = [entry.token_id for entry in item.top]
            theirs = torch.tensor([entry.logprob for entry in item.top])
            divergences.append(coarse_kl(row[top], theirs))
            chosen.append(abs(item.logprob - float(row[item.token_id])))
            assert item.token_id == text[position + 1]
    kl = torch.tensor(divergences)
    found = {"median": kl.median().item(), "mean": kl.mean().item(), "tokens": len(kl)}
    record_property("KL", found)
    print(f"\nKL: {found}; of the text's own tokens {torch.tensor(chosen).mean():.4f} nats")
    assert found["median"] < 2e-4
    assert found["mean"] < 2e-3


def coarse_kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """KL of two distributions whose log probabilities of some events are given; the rest is one."""
    p, q = ours.double().exp(), theirs.double().exp()
    p = torch.cat((p, (1 - p.sum()).clamp_min(1e-9)[None]))
    q = torch.cat((q, (1 - q.sum()).clamp_min(1e-9)[None]))
    return float((p * (p / q).log()).sum())


def test_a_request_continues_what_another_replica_began(
    running: Running, held_out: tuple[list[list[int]], list[list[int]]]
) -> None:
    prompt = held_out[1][0]
    ids, text, done = told(running.events(ask("whole", prompt, 40)))
    begun, shown = ids[:13], running.tokenizer.decode(ids[:13])
    more = ask("rest", prompt, 40, output_ids=tuple(begun), num_shown=len(shown))
    rest, rest_text, rest_done = told(running.events(more))
    assert rest == ids[13:]
    assert shown + rest_text == text
    assert (rest_done.prompt_tokens, rest_done.completion_tokens) == (len(prompt), 40)
    assert done.completion_tokens == 40


def test_a_sample_is_the_same_for_a_seed_and_another_for_another(running: Running) -> None:
    prompt = running.ids("The ")

    def sample(name: str, seed: int) -> list[int]:
        sampling = {"temperature": 1.0, "seed": seed, "top_p": 0.95, "top_k": 50}
        return told(running.events(ask(name, prompt, 24, **sampling)))[0]

    first = sample("s1", 7)
    assert sample("s2", 7) == first
    assert sample("s3", 8) != first
    assert len(sample("s4", (1 << 63) - 1)) == 24


def test_stops_limits_and_counts_are_ours(running: Running) -> None:
    prompt = running.ids("import ")
    ids, text, done = told(running.events(ask("all", prompt, 48)))
    stop = text[11:14]
    cut_ids, cut, cut_done = told(running.events(ask("stop", prompt, 48, stop=(stop,))))
    assert cut == text[: text.index(stop)]
    assert (cut_done.reason, cut_done.completion_tokens) == ("stop", len(cut_ids))
    end_ids, _, end = told(running.events(ask("end", prompt, 48, stop_token_ids=(ids[5],))))
    first = ids.index(ids[5])
    assert (end_ids[:first], end.reason) == (ids[:first], "stop")
    assert end.completion_tokens == first + 1
    for wrong in ([5] * MAX_MODEL_LEN, [running.tokenizer.vocab_size + 5000]):
        with pytest.raises(RequestError):
            running.events(ask("wrong", wrong))
    assert done.queue_s >= 0.0
    assert told(running.events(ask("after", prompt, 48)))[0] == ids  # it is unharmed


def test_a_prefix_is_shared_among_equal_salts_only(
    running: Running, held_out: tuple[list[list[int]], list[list[int]]]
) -> None:
    prompt = held_out[0][1]  # two pages of 128 tokens

    def cached(name: str, salt: str) -> int:
        return told(running.events(ask(name, prompt, 2, cache_salt=salt)))[2].cached_tokens

    assert [cached("c1", "alice"), cached("c2", "alice"), cached("c3", "bob")] == [0, 128, 0]


def test_a_client_that_leaves_aborts_in_vllm(running: Running) -> None:
    async def leave() -> None:
        async with aclosing(running.engine.generate(ask("left", running.ids("def "), 900))) as it:
            async for event in it:
                if isinstance(event, Tokens):
                    return

    wait_for(lambda: running.engine.load().running == 0, 30)
    running.loop.run(leave())

    counts = running.engine._counts

    async def steps() -> int | None:
        return counts._told.steps

    async def rest() -> None:
        await asyncio.sleep(3)  # its figures come each second

    running.loop.run(rest())
    before = running.loop.run(steps())
    running.loop.run(rest())
    assert running.loop.run(steps()) == before
    assert before is not None
    load = running.engine.load()
    assert (load.running, load.waiting, load.kv_tokens_used) == (0, 0, 0)


def test_it_reports_to_nobody_and_talks_to_its_own_node_only(running: Running) -> None:
    engines = [pid for pid in children() if "VLLM" in words(pid)]
    assert len(engines) == 2  # the engine core and one rank
    helper = next(pid for pid in tree(os.getpid()) if "resource_tracker" in words(pid))
    variables = Path(f"/proc/{helper}/environ").read_bytes().split(b"\0")
    for wanted in (b"VLLM_NO_USAGE_STATS=1", b"DO_NOT_TRACK=1", b"HF_HUB_OFFLINE=1"):
        assert wanted in variables
    assert not [name for name in variables if name.startswith((b"OTEL_", b"RAY_"))]
    for pid in engines:
        assert not [peer for _, peer in sockets(pid) if peer not in (NOBODY, "127.0.0.1")]


@pytest.mark.parametrize(
    ("victim", "number"),
    [("core", signal.SIGKILL), ("rank", signal.SIGKILL), ("core", signal.SIGSTOP)],
)
def test_a_process_of_vllm_that_is_killed_or_hangs_ends_requests_so_that_others_go_on(
    directories: tuple[Path, Path], victim: str, number: signal.Signals
) -> None:
    loop = LoopThread()
    hurried = Deadlines(quiet_s=3.0, canary_s=8.0)
    engine = RemoteEngine(vllm_options(directories[0]), deadlines=hurried)
    before = set(children())

    async def read() -> list[Event]:
        events: list[Event] = []
        async for event in engine.generate(ask("killed", range(5, 60), 900)):
            events.append(event)
            if len(events) == 5:
                own = [pid for pid in children() if pid not in before and "VLLM" in words(pid)]
                os.kill(own[0 if victim == "core" else -1], number)
        return events

    try:
        loop.run(engine.start())
        ids, _, done = told(loop.run(read()))
        assert 5 <= len(ids) < 900
        assert (done.reason, done.retryable) == ("error", True)
        with pytest.raises(EngineUnavailable):
            loop.run(engine.check())
        wait_for(lambda: set(children()) <= before, 20)
    finally:
        loop.run(engine.shutdown())
        loop.close()


def test_memory_that_runs_out_is_tried_once_with_less_and_then_told_with_the_numbers(
    directories: tuple[Path, Path],
) -> None:
    loop = LoopThread()

    def greedy_plan(options: Any) -> Any:
        plan = plan_vllm(options)
        first = dict(plan.arguments) | {"kv_cache_memory_bytes": 1 << 50}
        second = first | {"kv_cache_memory_bytes": 1 << 49}
        memory = ("1048576 GiB of KV cache", "524288 GiB of KV cache")
        return replace(plan, arguments=first, less_memory=second, memory=memory)

    engine = RemoteEngine(vllm_options(directories[0]), plan=greedy_plan)
    try:
        with pytest.raises(DeployError) as refused:
            loop.run(engine.start())
    finally:
        loop.run(engine.shutdown())
        loop.close()
    assert "1048576 GiB of KV cache, and again with 524288 GiB" in str(refused.value)
    assert "requested memory for kv" in str(refused.value)

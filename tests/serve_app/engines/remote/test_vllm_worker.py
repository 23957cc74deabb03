"""vLLM's backend in a worker's process, against a double of vLLM."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.remote_engines import SUPPORT, answer_of, eventually, running, scripted_plan
from support.serving import make_request

from deepseek.errors import DeployError, RequestError
from serve_app.engine_sections import VllmOptions
from serve_app.engines.protocol import Tokens
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines, Launch
from serve_app.engines.worker.messages import Generate
from serve_app.engines.worker.said import Said
from serve_app.engines.worker.vllm import _priority, _prompt_scores, _queue_s, _scores
from serve_app.errors import EngineUnavailable

REFUSED, FAILED, DEAD = (bytes([byte]).decode("latin-1") for byte in (250, 251, 252))


def doubled(directory: Path, **changes: Any) -> RemoteEngine:
    """vLLM's worker with the double in place of vLLM; `changes` are of the plan."""
    directory.mkdir(exist_ok=True)
    python = Path(sys.executable)
    given = {"arguments": {}, "engine": "vllm", "engine_version": "0.32.0", **changes}
    plan = replace(scripted_plan(directory), **given)
    return RemoteEngine(
        VllmOptions(directory=directory, python=python),
        Launch(python=python, backend="vllm", module="vllm_double", path=(str(SUPPORT),)),
        plan=lambda _: plan,
        deadlines=Deadlines(kill_s=5.0),
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def ask(text: str, name: str = "r", **more: Any) -> Any:
    """A prompt of the bytes of `text` in latin-1."""
    return replace(make_request("", name, **more), prompt_ids=tuple(text.encode("latin-1")))


def said_by_double(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the double printed, of requests of clients and all others."""
    messages = [record.getMessage() for record in caplog.records]
    return [line.partition("double: ")[2] for line in messages if "double: " in line]


def test_a_request_says_all_of_its_sampling_and_its_answer_is_counted_here(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(doubled(tmp_path / "fine")) as engine:
            text, done = await answer_of(
                engine, ask("hello", max_tokens=5, temperature=0.5, seed=3)
            )
            assert (text, done.reason, done.completion_tokens) == ("hello", "length", 5)
            assert done.prompt_tokens == 5
            text, done = await answer_of(engine, ask("abc\x04d", max_tokens=9))
            assert (text, done.reason) == (
                "abc",
                "stop",
            )  # at the end token, which it knows from us
            known = replace(ask("hello", max_tokens=1), cache_salt="known")
            assert (await answer_of(engine, known))[1].cached_tokens == 3
            info = engine.load()
            assert info.kv_tokens_total == 64 * 16

    run(main())


def test_a_client_that_leaves_and_a_stop_string_abort_once_and_an_ended_request_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        caplog.set_level(logging.INFO, logger="ray.serve")
        async with running(doubled(tmp_path / "fine")) as engine:
            await answer_of(engine, ask("hello", max_tokens=5))
            async with aclosing(engine.generate(ask("gone", max_tokens=5000))) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        break
            text, done = await answer_of(engine, ask("abcdefgh", max_tokens=5000, stop=("de",)))
            assert (text, done.reason) == ("abc", "stop")
            await eventually(lambda: len(said_by_double(caplog)) >= 2)
            await asyncio.sleep(0.1)

    run(main())
    told = said_by_double(caplog)
    aborts = [line for line in told if line.startswith("abort")]
    assert len(aborts) == len(set(aborts)) == 2
    assert not [line for line in told if "does not run" in line or "was left" in line]
    assert told[-1] == "shut down"


def test_a_refused_or_failed_request_harms_no_other_and_a_dead_engine_ends_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        caplog.set_level(logging.INFO, logger="ray.serve")
        async with running(doubled(tmp_path / "fine")) as engine:
            with pytest.raises(RequestError, match="not to its taste"):
                await answer_of(engine, ask(REFUSED))
            _, done = await answer_of(engine, ask(FAILED))
            assert (done.reason, done.retryable) == ("error", False)
            assert done.error == "its own output is not finite"
            other = asyncio.create_task(answer_of(engine, ask("other", "o", max_tokens=5000)))
            await asyncio.sleep(0.05)
            _, done = await answer_of(engine, ask(DEAD))
            for end in (done, (await other)[1]):
                assert (end.reason, end.retryable) == ("error", True)
            with pytest.raises(EngineUnavailable):
                await engine.check()

    run(main())

    def told() -> bool:
        lines = [record.getMessage() for record in caplog.records]
        return any("the engine is dead: " in line and "has died" in line for line in lines)

    end = time.monotonic() + 10.0  # a thread reads what the process has said last
    while not told() and time.monotonic() < end:
        time.sleep(0.02)
    assert told()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("directory", "changes", "sentence"),
    [
        (
            "fine",
            {"engine_version": "0.31.0"},
            r"has vLLM 0.32.0\+double, but .* was built for 0.31.0",
        ),
        ("fine", {"arguments": {"swap_space": 4}}, "does not know the argument swap_space"),
        ("broken", {}, r"Worker_TP1 \(process 12\): KeyError: 'model.layers.1.mlp.gate.weight'"),
        (
            "full",
            {
                "arguments": {"kv_cache_memory_bytes": 1 << 31},
                "less_memory": {"kv_cache_memory_bytes": 1 << 30},
                "memory": ("2 GiB of KV cache", "1 GiB of KV cache"),
            },
            r"2 GiB of KV cache, and again with 1 GiB .*Tried to allocate 9.00 GiB",
        ),
    ],
)
def test_a_failed_load_is_one_sentence_that_names_the_version_argument_tensor_or_memory(
    tmp_path: Path, directory: str, changes: dict[str, Any], sentence: str
) -> None:
    async def main() -> None:
        async with running(doubled(tmp_path / directory, **changes)):
            pass

    with pytest.raises(DeployError, match=sentence) as refused:
        run(main())
    assert "\n" not in str(refused.value)


def test_memory_that_suffices_at_the_second_try_serves(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "arguments": {"kv_cache_memory_bytes": 1 << 30},
        "less_memory": {"kv_cache_memory_bytes": 1 << 29},
    }

    async def main() -> None:
        async with running(doubled(tmp_path / "full", **changes)) as engine:
            assert (await answer_of(engine, ask("abc", max_tokens=3)))[0] == "abc"

    run(main())


class Entry:
    def __init__(self, logprob: float, rank: int) -> None:
        self.logprob, self.rank = logprob, rank


def request_of(**changes: Any) -> Generate:
    given: dict[str, Any] = {
        "id": 1,
        "prompt_ids": [5, 6],
        "max_tokens": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "ignore_eos": True,
        "end_ids": [],
        "stop_token_ids": [],
        "cache_salt": "",
    }
    return Generate(**(given | changes))


def test_logprobs_are_the_chosen_tokens_and_the_best_ones_asked_for() -> None:
    entry = {7: Entry(-3.0, 9), 4: Entry(-0.5, 1), 2: Entry(float("-inf"), 2)}
    [score] = _scores([entry], [7], 2) or []
    assert (score.logprob, score.rank, score.top) == (-3.0, 9, [(4, -0.5), (7, -3.0)])
    assert _scores([entry], [7], None) is None
    [alone] = _scores([entry], [7], 0) or []
    assert alone.top == []
    told = _prompt_scores([None, {6: Entry(-1.0, 1)}], request_of(prompt_logprobs=1))
    assert told is not None
    assert (told[0], told[1] and told[1].logprob) == (None, -1.0)
    assert _prompt_scores([], request_of(prompt_logprobs=1)) is None  # after the first output


def test_a_health_check_goes_first_and_waiting_is_measured_by_one_clock() -> None:
    plain, canary = _priority(request_of()), _priority(request_of(priority=1.0))
    assert canary < plain == _priority(request_of(priority=0.5))
    assert _queue_s(None) is None
    assert _queue_s(type("M", (), {"queued_ts": 2.0, "scheduled_ts": 0.0})) is None
    assert _queue_s(type("M", (), {"queued_ts": 2.0, "scheduled_ts": 2.5})) == 0.5


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["INFO all is well", "Traceback (most recent call last):"], None),
        (
            [
                "(Worker pid=8532) ERROR 11-26 20:46:32 [m.py:953] Traceback (most recent call):",
                "(Worker pid=8532) ERROR 11-26 20:46:32 [m.py:953]     raise ValueError: inner",
                "(Worker pid=8532) ERROR 11-26 20:46:32 [m.py:953] ModuleNotFoundError: No module",
                "(EngineCore pid=8144) ERROR 11-26 20:46:37 [core.py:1510] Exception: WorkerProc "
                "initialization failed due to an exception. See stack trace for root cause.",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            ("Worker (process 8532): ModuleNotFoundError: No module", False),
        ),
        (
            ["(Worker_TP0 pid=1) ERROR 11-26 20:46:32 [m.py:9] torch.OutOfMemoryError: CUDA out"],
            ("Worker_TP0 (process 1): OutOfMemoryError: CUDA out", True),
        ),
        (
            ["ValueError: Available memory (1/2 GiB) is less than requested memory for kv (9 GiB)"],
            ("ValueError: Available memory (1/2 GiB) is less than requested memory for kv (9 GiB)",
             True),
        ),
    ],
)  # fmt: skip
def test_the_first_error_that_is_no_echo_of_another_is_the_cause(
    lines: list[str], cause: tuple[str, bool] | None
) -> None:
    said = Said(late_s=0.0)
    data = "".join(f"{line}\n" for line in lines).encode()
    for start in range(0, len(data), 37):  # pieces as a pipe gives them
        said.read(data[start : start + 37])
    assert said.cause() == cause
    said.forget()
    assert said.cause() is None

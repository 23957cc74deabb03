"""The double of tensorrt_llm says and refuses what the real one does, and more."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.trtllm_doubles import (
    DOUBLE_PATH,
    VERSIONS,
    Double,
    make_trtllm_engine,
)
from support.trtllm_running import PROMPT, Make, Running, arguments

pytestmark = pytest.mark.heavy


# What it is.


@pytest.mark.parametrize("version", VERSIONS)
def test_importing_it_says_its_version_and_brings_no_torch(version: str) -> None:
    code = "import sys, tensorrt_llm as t; print(t.__version__, 'torch' in sys.modules)"
    env = {"PYTHONPATH": DOUBLE_PATH[0], "TRTLLM_DOUBLE_VERSION": version}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{version} False"


def test_its_answers_are_those_of_the_embedded_engine(shared: Running, directory: Path) -> None:
    from support.engines import request, run, tokens

    from deepseek.target_engine import load_as_target

    engine = load_as_target(directory)
    expected = tokens(run(engine, [request("a", PROMPT, 12)], check=lambda _: None)["a"])
    assert shared.tokens(max_tokens=12) == expected


def test_members_differ_between_the_versions(shared: Running) -> None:
    is_new = shared.double.version == "1.3.0rc29"
    llm = shared.llm
    for owner, name in [
        (llm, "_check_health"),
        (llm, "get_kv_cache_capacity"),
        (llm._executor, "check_health"),
        (llm._executor, "_fatal_error"),
    ]:
        assert hasattr(owner, name) == is_new, name
    assert llm.args.max_seq_len == 4096
    assert llm.tokenizer is None
    if is_new:
        assert llm._check_health() is True
        capacity = llm.get_kv_cache_capacity()
        assert capacity["maxNumTokens"] == capacity["maxNumBlocks"] * capacity["tokensPerBlock"]
        assert capacity["tokensPerBlock"] == 64


def test_priority_is_an_argument_of_1_3_alone(shared: Running) -> None:
    async def ask() -> Any:
        output = shared.llm.generate_async(
            PROMPT, sampling_params=shared.sampling(), cache_salt="a", priority=1.0
        )
        return await output

    if shared.double.version == "1.3.0rc29":
        assert shared.run(ask()).finished
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument 'priority'"):
            shared.run(ask())
        shared.expected = ["unknown_keyword"]


# Iteration.


def test_a_step_mutates_one_object_whose_ids_are_cumulative(shared: Running) -> None:
    async def read() -> list[tuple[int, int, bool]]:
        output = shared.ask(max_tokens=4)
        kept = output.outputs[0].token_ids
        return [(len(kept), id(item), item.finished) async for item in output]

    rows = shared.run(read())
    assert [(count, done) for count, _, done in rows] == [
        (1, False),
        (2, False),
        (3, False),
        (4, True),
    ]
    assert len({identity for _, identity, _ in rows}) == 1


def test_stream_interval_gives_several_tokens_a_step(make: Make) -> None:
    running = make(arguments={"stream_interval": 4})

    async def read() -> list[int]:
        return [len(item.outputs[0].token_ids) async for item in running.ask(max_tokens=10)]

    assert running.run(read()) == [1, 4, 8, 10]


def test_a_text_ends_at_its_end_id_or_a_stop_token(shared: Running) -> None:
    free = shared.tokens(max_tokens=8)

    async def read(**given: Any) -> Any:
        output = shared.ask(max_tokens=8, ignore_eos=False, **given)
        async for _ in output:
            pass
        return output.outputs[0]

    third = free[2]
    cut = free.index(third)
    ended = shared.run(read(end_id=third))
    assert (ended.token_ids, ended.finish_reason) == (free[: cut + 1], "stop")
    assert ended.stop_reason is None
    stopped = shared.run(read(stop_token_ids=[third]))
    assert (stopped.token_ids, stopped.stop_reason) == (free[:cut], third)
    shared.double.switch(end_id_in_output=False)
    assert shared.run(read(end_id=third)).token_ids == free[:cut]


def test_logprobs_are_mappings_or_numbers(shared: Running) -> None:
    async def read() -> Any:
        output = shared.ask(max_tokens=3, logprobs=2)
        async for _ in output:
            pass
        return output.outputs[0]

    found = shared.run(read())
    for token, entry in zip(found.token_ids, found.logprobs, strict=True):
        assert entry[token].rank == 1
        assert entry[token].logprob == max(item.logprob for item in entry.values())
    shared.double.switch(logprobs_form="float")
    numbers = shared.run(read()).logprobs
    assert numbers == [e[t].logprob for t, e in zip(found.token_ids, found.logprobs, strict=True)]


def test_text_stays_empty_without_a_tokenizer(shared: Running) -> None:
    async def read() -> str:
        output = shared.ask()
        return str((await output).outputs[0].text)

    assert shared.run(read()) == ""


def test_text_of_its_own_is_never_right(make: Make) -> None:
    running = make(arguments={"skip_tokenizer_init": False})

    async def read() -> Any:
        return (await running.ask(end_id=None)).outputs[0]

    output = running.run(read())
    assert output.text.startswith("wrong")
    assert running.llm.tokenizer.tokenizer.decode(output.token_ids) != output.text


def test_leaving_the_loop_does_not_end_a_request(shared: Running) -> None:
    async def leave() -> None:
        output = shared.ask(max_tokens=40)
        async for _ in output:
            break
        while len(shared.double.events("end")) == before:
            assert not output.finished
            output._take(await output.aqueue.get())

    before = len(shared.double.events("end"))
    shared.run(leave())
    assert shared.double.events("end")[-1]["reason"] == "length"


def test_an_abort_ends_the_stream_some_steps_later_and_frees_its_blocks(shared: Running) -> None:
    async def abort() -> Any:
        output = shared.ask(max_tokens=500)
        async for _ in output:
            if not output.aborted():
                assert output.abort() is None
        return output

    output = shared.run(abort())
    assert output.outputs[0].finish_reason == "cancelled"
    assert 1 < len(output.outputs[0].token_ids) < 500
    assert shared.run(drain(shared))[-1]["kvCacheStats"]["usedNumBlocks"] == 0


async def drain(running: Running) -> list[dict[str, Any]]:
    found: list[Any] = []
    try:
        async for item in running.llm.get_stats_async(timeout=0.05):
            found.append(item)
    except (TimeoutError, asyncio.QueueEmpty, queue.Empty):
        pass
    return [json.loads(item) if isinstance(item, str) else item for item in found]


def test_statistics_are_drained_by_a_read_and_raise_when_idle(shared: Running) -> None:
    is_new = shared.double.version == "1.3.0rc29"

    async def first() -> Any:
        return await anext(shared.llm.get_stats_async(timeout=0.05))

    shared.run(drain(shared))
    with pytest.raises(TimeoutError if is_new else asyncio.QueueEmpty):
        shared.run(first())
    shared.tokens()
    assert isinstance(shared.run(first()), dict if is_new else str)
    rows = shared.run(drain(shared))
    assert [row["iter"] for row in rows] == list(range(rows[0]["iter"], rows[-1]["iter"] + 1))
    assert rows[0]["inflightBatchingStats"]["numGenRequests"] == 1
    shared.tokens()
    shared.double.switch(stats="partial", stats_form="dict")
    assert shared.run(first()).keys() == {"iter", "numActiveRequests"}
    shared.double.switch(stats="empty", stats_form="str")
    assert shared.run(first()) == "{}"
    shared.double.switch(stats="absent")
    with pytest.raises(RuntimeError, match="no iteration statistics"):
        shared.run(first())
    shared.double.switch(stats_idle="end")
    shared.run(drain(shared))
    with pytest.raises(StopAsyncIteration):
        shared.run(first())


def test_prefixes_are_reused_within_a_salt(shared: Running) -> None:
    prompt = [token % 2000 + 2 for token in range(7, 207)]

    async def cached(salt: str) -> int:
        return int((await shared.ask(prompt, salt=salt)).cached_tokens)

    assert shared.run(cached("one")) == 0
    assert shared.run(cached("two")) == 0
    assert shared.run(cached("one")) >= 128


def test_kv_events_tell_stored_blocks(make: Make) -> None:
    cache = {"event_buffer_max_size": 16, "tokens_per_block": 64}
    running = make(arguments={"kv_cache_config": cache})
    running.tokens(prompt=[5] * 130)
    created, stored = running.llm.get_kv_cache_events(timeout=0.05)
    assert created["data"]["type"] == "created"
    assert [len(block["tokens"]) for block in stored["data"]["blocks"]] == [64, 64]


# Refusals.


def test_a_keyword_that_it_has_not_is_a_value_error(shared: Running, directory: Path) -> None:
    with pytest.raises(ValueError, match="LLM got invalid argument: kv_cache_dtype"):
        shared.package.LLM(**arguments(directory, kv_cache_dtype="fp8"))
    with pytest.raises(ValidationError, match="free_gpu_fraction"):
        shared.package.LLM(**arguments(directory, kv_cache_config={"free_gpu_fraction": 0.5}))
    newer = {"kv_cache_config": {"use_kv_cache_manager_v2": False}}
    if shared.double.version == "1.2.1":
        with pytest.raises(ValidationError, match="use_kv_cache_manager_v2"):
            shared.package.LLM(**arguments(directory, **newer))
        with pytest.raises(ValueError, match="invalid argument: telemetry_config"):
            shared.package.LLM(**arguments(directory, telemetry_config={"disabled": True}))
        shared.expected += ["unknown_keyword"] * 2
    shared.expected += ["unknown_keyword"] * 2
    with pytest.raises(ValidationError, match="tensor_parallel_size"):
        shared.package.LLM(**arguments(directory, tensor_parallel_size="8"))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_argument_that_build_writes_is_taken(
    version: str, tiny_model: Path, double_folder: Path, make: Make
) -> None:
    built = make_trtllm_engine(tiny_model, double_folder / version, tp=1, version=version)
    written = yaml.safe_load((built / "llm_args.yaml").read_text())
    running = make(version, arguments=written | {"tensor_parallel_size": 1})
    assert not running.double.violations
    assert running.llm.args.stream_interval == written["stream_interval"]


def test_too_few_gpus_are_refused(
    shared: Running, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RuntimeError, match="Only 1 GPUs are available, but 2 are required"):
        shared.package.LLM(**arguments(directory))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        shared.package.LLM(**arguments(directory))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2, "best_of": 1}, "best_of"),
    ],
)
def test_sampling_outside_its_range_is_a_value_error(
    shared: Running, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shared.sampling(**given)


def test_max_tokens_is_32_where_nobody_says(shared: Running) -> None:
    assert shared.package.SamplingParams().max_tokens == 32


def test_a_prompt_that_does_not_fit_fails_alone(shared: Running) -> None:
    async def ask() -> None:
        await shared.ask([5] * 4096)

    with pytest.raises(shared.request_error, match="4096 tokens"):
        shared.run(ask())
    shared.expected = ["over_long_prompt"]
    assert len(shared.tokens()) == 6


def test_after_its_shutdown_it_takes_nothing(make: Make) -> None:
    running = make()
    running.tokens()
    running.llm.shutdown()
    running.llm.shutdown()

    async def ask() -> Any:
        return running.ask()

    with pytest.raises(RuntimeError, match="LLM is shutting down"):
        running.run(ask())
    assert not running.double.violations


# Violations.


def misuse_keyword(running: Running) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_tokens'"):
        running.package.SamplingParams(top_tokens=1)


def misuse_second_loop(running: Running) -> None:
    running.tokens()

    async def ask() -> None:
        running.ask(max_tokens=2)

    asyncio.run(ask())


def misuse_no_loop(running: Running) -> None:
    assert len(running.ask().result().outputs[0].token_ids) == 6


def misuse_late_abort(running: Running) -> None:
    async def ask() -> None:
        (await running.ask()).abort()

    running.run(ask())


def misuse_two_aborts(running: Running) -> None:
    async def ask() -> None:
        output = running.ask(max_tokens=400)
        output.abort()
        output.abort()
        assert (await output).outputs[0].finish_reason == "cancelled"

    running.run(ask())


def misuse_implicit(running: Running) -> None:
    async def ask() -> None:
        sampling = running.package.SamplingParams(max_tokens=2, top_p=1.0, top_k=0, end_id=1)
        await running.llm.generate_async(PROMPT, sampling_params=sampling)

    running.run(ask())


def misuse_end_id(running: Running) -> None:
    async def ask() -> None:
        running.ask(end_id=None)

    with pytest.raises(ValueError, match="end_id"):
        running.run(ask())


def misuse_canary(running: Running) -> None:
    async def ask() -> None:
        await running.ask([5], salt=None, max_tokens=1)

    running.run(ask())


def misuse_logprobs(running: Running) -> None:
    async def ask() -> None:
        assert not (await running.ask(logprobs=0)).outputs[0].logprobs

    running.run(ask())


MISUSES: list[tuple[Callable[[Running], None], str]] = [
    (misuse_keyword, "unknown_keyword"),
    (misuse_second_loop, "second_loop"),
    (misuse_no_loop, "no_running_loop"),
    (misuse_late_abort, "abort_after_finish"),
    (misuse_two_aborts, "aborted_twice"),
    (misuse_implicit, "implicit_sampling"),
    (misuse_end_id, "implicit_end_id"),
    (misuse_canary, "unsalted_canary"),
    (misuse_logprobs, "logprobs_0"),
]


@pytest.mark.parametrize(("misuse", "kind"), MISUSES, ids=[kind for _, kind in MISUSES])
def test_a_misuse_is_a_violation(
    misuse: Callable[[Running], None], kind: str, shared: Running
) -> None:
    shared.expected = [kind]
    misuse(shared)


def test_a_request_that_nobody_ends_is_a_violation_at_shutdown(make: Make) -> None:
    running = make(strict="raise")

    async def ask() -> None:
        running.ask(max_tokens=400)

    running.run(ask())
    with pytest.raises(BaseException, match=r"unreleased: requests \[1\]"):
        running.llm.shutdown()
    assert running.double.violations == ["unreleased"]


def test_workers_of_its_own_for_text_are_a_violation(make: Make, tmp_path: Path) -> None:
    running = make(arguments={"num_postprocess_workers": 4})
    assert running.double.violations == ["num_postprocess_workers"]


def test_a_violation_ends_the_process_of_a_worker(tmp_path: Path) -> None:
    double = Double(tmp_path)
    code = "import tensorrt_llm as t; t.SamplingParams(top_tokens=1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(DOUBLE_PATH), **double.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 86
    assert "SamplingParams has no top_tokens in 1.2.1" in done.stderr
    assert double.violations == ["unknown_keyword"]

"""The double of tensorrt_llm goes wrong by switch as the real one was seen to go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.trtllm_doubles import (
    DOUBLE_PATH,
    VERSIONS,
    Double,
)
from support.trtllm_running import Make, Running, in_thread, is_running, wait_until

pytestmark = pytest.mark.heavy


# Faults of requests.


def test_an_error_of_one_request_leaves_the_others(shared: Running) -> None:
    shared.double.switch(request_error_token=99)

    async def ask() -> list[Any]:
        return await asyncio.gather(
            shared.ask([99, 5]).aresult(), shared.ask().aresult(), return_exceptions=True
        )

    failed, other = shared.run(ask())
    assert isinstance(failed, shared.request_error)
    assert len(other.outputs[0].token_ids) == 6


def test_a_text_may_end_without_a_reason_and_be_too_long(shared: Running) -> None:
    shared.double.switch(finish_reason_none=True, tokens_too_many=3, empty_outputs=True)

    async def ask() -> tuple[list[int], Any]:
        output = shared.ask(max_tokens=4)
        counts = [len(item.outputs) async for item in output]
        return counts, output

    counts, output = shared.run(ask())
    assert counts[:2] == [0, 1]
    assert output.finished
    assert output.outputs[0].finish_reason is None
    assert len(output.outputs[0].token_ids) == 7


def test_steps_may_stop_while_it_says_that_it_is_well(shared: Running) -> None:
    shared.double.switch(tokens_stop=True)

    async def ask() -> int:
        output = shared.ask(max_tokens=3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(output), 0.3)
        if shared.double.version == "1.3.0rc29":
            assert shared.llm._check_health()
        shared.double.switch()
        return len((await output).outputs[0].token_ids)

    assert shared.run(ask()) == 3


def test_requests_may_get_tokens_of_others_with_a_host_cache(make: Make) -> None:
    cache = {"host_cache_size": 1 << 20, "tokens_per_block": 64}
    running = make(arguments={"kv_cache_config": cache})
    alone = [running.tokens(), running.tokens(prompt=[9, 8, 7])]

    async def both() -> list[list[int]]:
        outputs = [running.ask(), running.ask([9, 8, 7])]
        return [list((await output).outputs[0].token_ids) for output in outputs]

    assert running.run(both()) == alone
    running.double.switch(mixed_up_with_host_cache=True)
    assert running.run(both()) != alone


# Faults of the engine.


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fatal_flag_ends_every_stream(version: str, make: Make) -> None:
    running = make(version)

    async def ask() -> BaseException:
        output = running.ask(max_tokens=2000)
        await anext(output)
        running.double.switch(fatal_error="rank 1 is gone")
        try:
            await output
        except Exception as error:
            return error
        raise AssertionError("the stream went on")

    error = running.run(ask())
    assert not isinstance(error, running.request_error)
    assert "rank 1 is gone" in str(error)
    if version == "1.3.0rc29":
        assert running.llm._check_health() is False
        assert running.llm._executor._fatal_error is error

    async def late() -> Any:
        return running.ask()

    with pytest.raises(RuntimeError, match="dead"):
        running.run(late())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_hangs_it_in_good_health(number: int, make: Make) -> None:
    running = make()
    assert len(running.double.rank_pids) == 2

    async def ask() -> Any:
        output = running.ask(max_tokens=3000)
        await anext(output)
        os.kill(running.double.rank_pids[1], number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await output
        assert not output.finished
        assert running.llm._check_health()
        if number == signal.SIGSTOP:
            os.kill(running.double.rank_pids[1], signal.SIGCONT)
            await anext(output)
        return output

    output = running.run(ask())
    if number == signal.SIGKILL:
        output.released = True
        thread = in_thread(running.llm.shutdown)
        thread.join(0.3)
        assert thread.is_alive()


def test_a_rank_that_dies_may_be_noticed(make: Make) -> None:
    running = make(rank_death="fatal")
    os.kill(running.double.rank_pids[0], signal.SIGKILL)
    wait_until(lambda: not running.llm._check_health(), 10)
    assert "rank 0" in str(running.llm._executor._fatal_error)


@pytest.mark.parametrize(
    ("fault", "ask"),
    [
        ({"unsalted_canary_crash": True}, {"prompt": [5], "salt": None, "max_tokens": 2}),
        ({"cancel_logprobs_crash": True}, {"logprobs": 1, "max_tokens": 400}),
    ],
)
def test_some_requests_end_it(fault: dict[str, Any], ask: dict[str, Any], make: Make) -> None:
    running = make(**fault)

    async def send() -> None:
        output = running.ask(**ask)
        output.abort()
        with pytest.raises(RuntimeError):
            await output

    running.run(send())
    assert not running.llm._check_health()


def test_a_prompt_that_does_not_fit_may_hang_it(make: Make) -> None:
    running = make(too_long_hangs=True)

    async def ask() -> None:
        running.ask([5] * 4096)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(running.ask()), 0.5)

    running.run(ask())
    assert running.llm._check_health()


def test_its_health_check_may_block(make: Make) -> None:
    running = make(health_hangs=True)
    thread = in_thread(running.llm._check_health)
    thread.join(0.3)
    assert thread.is_alive()
    running.double.switch()
    thread.join(10)
    assert not thread.is_alive()


# The constructor and the end.


def test_memory_that_runs_out_is_the_cause_of_the_constructors_error(
    make: Make,
) -> None:
    with pytest.raises(RuntimeError, match="Executor worker returned error") as raised:
        make(oom_above_fraction=0.8)
    assert type(raised.value.__cause__).__name__ == "OutOfMemoryError"
    assert "CUDA out of memory" in str(raised.value.__cause__)
    cache = {"free_gpu_memory_fraction": 0.7, "tokens_per_block": 64}
    running = make(oom_above_fraction=0.8, arguments={"kv_cache_config": cache})
    assert len(running.tokens()) == 6


def test_a_directory_that_is_no_engine_is_the_cause_of_the_constructors_error(
    make: Make, directory: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(directory, tmp_path / "broken")
    (broken / "hf_quant_config.json").unlink()
    with pytest.raises(RuntimeError, match="Executor worker returned error") as raised:
        make(arguments={"model": broken})
    assert "hf_quant_config.json" in str(raised.value.__cause__)


def test_two_that_take_one_port_collide(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.ports import free_port

    port = free_port()
    make(fixed_port=port)
    with pytest.raises(RuntimeError, match=f"port: {port}.*EADDRINUSE"):
        make(fixed_port=port)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    make(fixed_port=port)


@pytest.mark.parametrize("fault", [{"construct": "hang"}, {"die_before_ready": 1}])
def test_its_constructor_may_never_return(
    fault: dict[str, Any], directory: Path, make: Make, tmp_path: Path
) -> None:
    """The process of a rank that dies early is waited for."""
    thread = in_thread(lambda: make(**fault))
    double = Double(tmp_path)
    wait_until(lambda: bool(double.events("construct")), 20)
    if "die_before_ready" in fault:
        wait_until(lambda: bool(double.events("ranks")), 20)
        wait_until(lambda: not is_running(double.rank_pids[1]), 20)
    thread.join(0.3)
    assert thread.is_alive()
    assert not double.events("ready")


def test_an_early_death_may_be_noticed(make: Make) -> None:
    with pytest.raises(RuntimeError, match="died during initialization"):
        make(die_before_ready=0, notices_early_death=True)


def test_a_slow_load_ends_when_the_switch_says_so(make: Make, tmp_path: Path) -> None:
    made: list[Running] = []
    thread = in_thread(lambda: made.append(make(construct="later")))
    double = Double(tmp_path)
    wait_until(lambda: bool(double.events("ranks")), 20)
    assert not made
    double.switch()
    thread.join(30)
    assert made[0].double.events("ready")


def test_shutdown_may_block(make: Make) -> None:
    running = make(shutdown="hang")
    thread = in_thread(running.llm.shutdown)
    thread.join(0.3)
    assert thread.is_alive()
    assert running.double.events("shutdown")
    assert not running.double.events("stopped")


PROGRAM = """
import sys, yaml, tensorrt_llm
if __name__ == "__main__":
    directory = sys.argv[1]
    given = yaml.safe_load(open(f"{directory}/llm_args.yaml"))
    llm = tensorrt_llm.LLM(directory, skip_tokenizer_init=True, **given)
    sys.stdin.read()
    llm.shutdown()
"""


def start_program(directory: Path, double: Double) -> subprocess.Popen[bytes]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(DOUBLE_PATH), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory)],
        env=env | double.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def test_shutdown_may_end_in_sigabrt(directory: Path, tmp_path: Path) -> None:
    double = Double(tmp_path)
    double.switch(shutdown="sigabrt")
    process = start_program(directory, double)
    process.communicate()
    assert process.returncode == -signal.SIGABRT
    assert not [pid for pid in double.rank_pids if is_running(pid)]


def test_a_rank_ends_with_its_parent() -> None:
    """Its input ends when the process that started it does."""
    program = Path(DOUBLE_PATH[0]) / "tensorrt_llm" / "rank.py"
    task = {"rank": 0, "files": [str(program)], "load_s": 0.0, "orphan": False, "die": False}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(program), json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"r"
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_orphan_ranks_outlive_a_killed_process(directory: Path, tmp_path: Path) -> None:
    double = Double(tmp_path)
    double.switch(orphan_ranks=True)
    process = start_program(directory, double)
    try:
        wait_until(lambda: bool(double.events("ready")))
        process.kill()
        process.communicate()
        time.sleep(0.3)  # a rank that was no orphan would have ended
        assert all(map(is_running, double.rank_pids))
        assert not {os.getsid(pid) for pid in double.rank_pids} & {os.getsid(0)}
    finally:
        for pid in double.rank_pids:
            os.kill(pid, signal.SIGKILL)

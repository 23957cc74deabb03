"""Bugs that users met in TensorRT-LLM, each against the double of it: what becomes of them here.

The worker, its backend and the adapter are the real ones; the double computes with the embedded
engine, has processes as ranks, and goes wrong by switch. Numbers are issues of NVIDIA/TensorRT-LLM.
Faults that end no engine are switched on in one that serves all of these tests.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.remote_engines import answer_of, doubled, eventually, running
from support.trtllm_doubles import Double, make_trtllm_engine

from deepseek.engine.request import SamplingParams
from deepseek.errors import DeployError, RequestError
from serve_app.engines.protocol import Done, GenerateRequest, Tokens
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines
from serve_app.engines.remote.options import plan_of
from serve_app.engines.remote.process import free_ports
from serve_app.engines.worker import processes
from serve_app.errors import EngineUnavailable

pytestmark = [pytest.mark.heavy]
shared = pytest.mark.asyncio(loop_scope="module")

LENGTH = 24


@pytest.fixture(scope="module")
def directory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trtllm_engine(tiny_model, tmp_path_factory.getbasetemp() / "trtllm", tp=2)


@dataclass
class Serving:
    engine: RemoteEngine
    double: Double

    def violations(self) -> list[str]:
        return self.double.violations


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Serving]:
    """An engine on the double that every test finds well, and leaves well."""
    double = Double(tmp_path_factory.mktemp("double"))
    deadlines = Deadlines(load_every_s=0.05, canary_every_s=1.0)
    async with running(doubled(directory, double, deadlines=deadlines)) as engine:
        yield Serving(engine, double)
        assert double.violations == []


def prompt(seed: int, length: int = LENGTH) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(5, 900), k=length))


def greedy(name: str, max_tokens: int = 12, *, seed: int = 0, **sampling: Any) -> GenerateRequest:
    settings = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **sampling)
    return GenerateRequest(request_id=name, prompt_ids=prompt(seed), sampling=settings)


async def idle(engine: RemoteEngine) -> None:
    """Nothing is left in the engine, by its own figures too."""
    await eventually(lambda: not engine._requests)
    await eventually(lambda: engine._counts._told.kv_blocks_used in (0, None))


@shared
async def test_14312_text_is_decoded_from_ids_and_stops_hold_over_chunks(serving: Serving) -> None:
    text, done = await answer_of(serving.engine, greedy("plain", 30))
    assert text
    assert "wrong" not in text  # what the double says for text
    assert done.completion_tokens == 30
    stop = text[10:14]
    cut, done = await answer_of(serving.engine, greedy("stop", 30, stop=(stop,)))
    assert cut == text[: text.index(stop)]
    assert done.reason == "stop"
    await idle(serving.engine)


@shared
async def test_10824_ends_without_a_reason_and_limits_overrun(serving: Serving) -> None:
    serving.double.switch(finish_reason_none=True, tokens_too_many=3)
    text, done = await answer_of(serving.engine, greedy("many", 12))
    assert (done.reason, done.completion_tokens) == ("length", 12)
    serving.double.switch()
    assert (await answer_of(serving.engine, greedy("same", 12)))[0] == text
    await idle(serving.engine)


@shared
@pytest.mark.parametrize("leave", ["prefill", "decode"])
async def test_6298_10879_a_client_that_leaves_frees_its_blocks(
    serving: Serving, leave: str
) -> None:
    before = len(serving.double.events("abort"))
    serving.double.switch(step_s=0.05)
    request = greedy(leave, 400)
    if leave == "prefill":  # long enough to be under way when the client leaves
        request = replace(request, prompt_ids=request.prompt_ids * 8)
    stream = serving.engine.generate(request)
    if leave == "decode":
        await anext(stream)
        await eventually(lambda: serving.engine._counts._told.kv_blocks_used)
        await stream.aclose()
    else:
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: serving.engine._requests)
        await asyncio.sleep(0.02)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    serving.double.switch()
    await idle(serving.engine)
    assert len(serving.double.events("abort")) == before + 1


@shared
async def test_10810_a_cancel_with_logprobs_harms_no_neighbor(serving: Serving) -> None:
    alone, _ = await answer_of(serving.engine, greedy("alone", 40, seed=1))
    neighbor = asyncio.create_task(answer_of(serving.engine, greedy("neighbor", 40, seed=1)))
    stream = serving.engine.generate(greedy("leaves", 400, seed=2, logprobs=2))
    first = await anext(stream)
    assert isinstance(first, Tokens)
    assert len(first.logprobs) == len(first.token_ids)
    await stream.aclose()
    assert (await neighbor)[0] == alone
    await idle(serving.engine)


@shared
async def test_4441_a_prompt_that_does_not_fit_never_reaches_the_engine(serving: Serving) -> None:
    serving.double.switch(too_long_hangs=True)
    asked = len(serving.double.events("request"))
    long = GenerateRequest(
        request_id="long", prompt_ids=prompt(0, 4096), sampling=SamplingParams(max_tokens=1)
    )
    with pytest.raises(RequestError, match="at most 4095"):
        await answer_of(serving.engine, long)
    assert len([e for e in serving.double.events("request") if e["prompt_tokens"] > 600]) == 0
    assert len(serving.double.events("request")) - asked <= 1  # a canary may have come
    serving.double.switch()


@shared
@pytest.mark.parametrize("form", ["dict", "str"])
@pytest.mark.parametrize("stats", ["full", "partial", "empty", "absent"])
async def test_6364_figures_of_every_shape_leave_the_load_right(
    serving: Serving, stats: str, form: str
) -> None:
    serving.double.switch(stats=stats, stats_form=form, step_s=0.03)
    stream = serving.engine.generate(greedy(f"{stats}-{form}", 200))
    await anext(stream)
    await asyncio.sleep(0.1)
    load = serving.engine.load()
    assert (load.running, load.waiting) == (1, 0)
    assert 0 < load.kv_tokens_used <= load.kv_tokens_total
    serving.double.switch()
    await stream.aclose()
    await idle(serving.engine)


@shared
async def test_an_item_without_outputs_and_logprobs_as_floats_are_taken(serving: Serving) -> None:
    serving.double.switch(empty_outputs=True, logprobs_form="float")
    events = [e async for e in serving.engine.generate(greedy("floats", 5, logprobs=0))]
    named = [item for e in events if isinstance(e, Tokens) for item in e.logprobs]
    assert len(named) == 5
    assert all(item.logprob <= 0.0 for item in named)
    serving.double.switch()


@shared
async def test_a_request_error_of_the_engine_is_one_of_that_request(serving: Serving) -> None:
    serving.double.switch(request_error_token=prompt(7)[0])
    neighbor = asyncio.create_task(answer_of(serving.engine, greedy("fine", 20, seed=1)))
    _, done = await answer_of(serving.engine, greedy("bad", 20, seed=7))
    assert (done.reason, done.retryable) == ("error", False)
    assert (await neighbor)[1].reason == "length"
    serving.double.switch()
    await serving.engine.check()


@shared
async def test_canaries_have_a_salt_of_their_own(serving: Serving) -> None:
    """An unsalted one of one token has killed a rank (a comment in dynamo's worker)."""
    serving.double.switch(unsalted_canary_crash=True)

    def canaries() -> list[str]:
        salts = [str(event["cache_salt"]) for event in serving.double.events("request")]
        return [salt for salt in salts if salt.startswith("intserve-canary")]

    await eventually(lambda: len(canaries()) >= 1)
    await serving.engine.check()
    assert len(set(canaries())) == len(canaries())
    serving.double.switch()


@shared
async def test_sampling_is_explicit_and_no_option_of_its_own_is_left_on(serving: Serving) -> None:
    arguments = serving.double.events("construct")[0]["arguments"]
    assert arguments["skip_tokenizer_init"] is True
    assert arguments["num_postprocess_workers"] == 0  # 4 of them leak (#13777)
    assert arguments["enable_iter_perf_stats"] is True
    assert "otlp_traces_endpoint" not in arguments
    assert "host_cache_size" not in arguments["kv_cache_config"]  # other prompts' tokens (#8813)
    names = {"temperature", "top_p", "top_k", "seed", "max_tokens", "end_id", "pad_id"}
    for event in serving.double.events("request"):
        assert names <= event.keys()
        assert event["detokenize"] is False
        assert event["cache_salt"]


# Faults in the arguments, before any process.


def test_5267_attention_dp_with_chunked_prefill_is_refused_before_it_starts(
    directory: Path, tmp_path: Path
) -> None:
    copy = with_arguments(directory, tmp_path, "enable_attention_dp: true\n")
    with pytest.raises(DeployError, match="#5267|chunked prefill"):
        doubled_plan(copy)


def test_an_argument_of_another_version_is_refused_before_it_starts(
    directory: Path, tmp_path: Path
) -> None:
    copy = with_arguments(directory, tmp_path, "model_kwargs: {}\n")
    with pytest.raises(DeployError, match="model_kwargs"):
        doubled_plan(copy)


def test_the_second_try_has_less_of_the_memory(directory: Path) -> None:
    plan = doubled_plan(directory)
    assert plan.arguments["kv_cache_config"]["free_gpu_memory_fraction"] == 0.85
    assert plan.less_memory is not None
    assert plan.less_memory["kv_cache_config"]["free_gpu_memory_fraction"] == 0.68
    assert plan.engine_version == "1.2.1"


def with_arguments(directory: Path, base: Path, more: str) -> Path:
    """A copy of the engine directory whose arguments are edited, and its manifest with them."""
    import hashlib
    import shutil

    from deepseek.artifact.engine_manifest import read_engine_manifest, write_engine_manifest

    copy = shutil.copytree(directory, base / "edited")
    path = copy / "llm_args.yaml"
    path.write_text(path.read_text() + more)
    manifest = read_engine_manifest(copy)
    files = manifest.files | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    write_engine_manifest(copy, manifest.model_copy(update={"files": files}))
    return copy


def doubled_plan(directory: Path) -> Any:
    from serve_app.engine_sections import TrtllmOptions

    return plan_of(TrtllmOptions(directory=directory, python=Path(os.__file__)))


def test_9780_10035_each_engine_gets_a_port_of_its_own() -> None:
    ports = [free_ports(("MASTER_PORT", "OTHER")) for _ in range(8)]
    for pair in ports:
        assert pair["MASTER_PORT"] != pair["OTHER"]
    assert len({pair["MASTER_PORT"] for pair in ports}) > 1


# Constructors that fail; none gets as far as loading the model.


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"die_before_ready": 1}, "ended with exit code 1 while the engine loaded"),  # 17578
        (
            {"die_before_ready": 1, "notices_early_death": True},
            "Executor worker died during initialization",
        ),
        ({"construct": "hang"}, "(MPI)"),  # dynamo #15060
    ],
)
async def test_17578_a_constructor_that_fails_or_hangs_is_told_in_time(
    directory: Path, tmp_path: Path, faults: dict[str, Any], words: str
) -> None:
    double = Double(tmp_path)
    double.switch(**faults)
    engine = doubled(directory, double, deadlines=Deadlines(load_stall_s=4.0))
    with pytest.raises(DeployError) as caught:
        await engine.start()
    await engine.shutdown()
    assert words in str(caught.value)
    if double.events("ranks"):
        assert not any(processes.is_alive(pid) for pid in double.rank_pids)


# Deaths and hangs of an engine that serves: each needs one of its own.

QUICK = Deadlines(
    ping_every_s=0.5, health_s=0.5, quiet_s=0.5, canary_every_s=1.0, canary_s=1.5, shutdown_s=1.0
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "faults", "words"),
    [
        ("18663 a fatal flag", {"fatal_error": "CUDA error: an illegal memory access"}, "illegal"),
        ("16338 a rank that is killed", {}, "SIGKILL"),
        ("a rank that is stopped", {}, "not even the one token"),
        ("9628 no free slots", {"tokens_stop": True}, "not even the one token"),
        ("a health check that blocks", {"health_hangs": True}, "has not returned"),
        ("10810 a cancel that ends it", {"cancel_logprobs_crash": True}, ""),
    ],
)
async def test_a_death_or_hang_ends_every_stream_and_every_process(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    name: str,
    faults: dict[str, Any],
    words: str,
) -> None:
    base = tmp_path_factory.getbasetemp() / "trtllm"
    directory = make_trtllm_engine(tiny_model, base, tp=2, version="1.3.0rc29")
    double = Double(tmp_path, version="1.3.0rc29")
    async with running(doubled(directory, double, deadlines=QUICK)) as engine:
        pids = [*double.rank_pids, *engine._pids]
        stream = engine.generate(greedy("stream", 900))
        first = await anext(stream)
        double.switch(**faults)
        if "killed" in name:
            os.kill(double.rank_pids[1], signal.SIGKILL)
        elif "stopped" in name:
            os.kill(double.rank_pids[1], signal.SIGSTOP)
        elif "cancel" in name:
            leaving = engine.generate(greedy("leaving", 900, logprobs=1))
            await anext(leaving)
            await leaving.aclose()
        events = [first, *[event async for event in stream]]
        assert isinstance(events[-1], Done)
        assert (events[-1].reason, events[-1].retryable) == ("error", True)
        counted = sum(len(event.token_ids) for event in events if isinstance(event, Tokens))
        assert events[-1].completion_tokens == counted
        with pytest.raises(EngineUnavailable):
            await engine.check()
        await eventually(lambda: words in str(engine._failure), 3.0)
        await eventually(lambda: not any(processes.is_alive(pid) for pid in pids), 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ok", "hang", "sigabrt"])
async def test_16312_13076_shutdown_ends_in_time_and_is_clean(
    directory: Path, tmp_path: Path, how: str
) -> None:
    double = Double(tmp_path)
    double.switch(shutdown=how)
    engine = doubled(directory, double, deadlines=QUICK)
    await engine.start()
    pids = [*double.rank_pids, *engine._pids]
    await answer_of(engine, greedy("once"))
    await engine.shutdown()
    assert not any(processes.is_alive(pid) for pid in pids)
    assert len(double.events("shutdown")) == 1
    assert double.violations == []


@pytest.mark.slow
async def test_16404_ranks_that_left_their_session_end_too(directory: Path, tmp_path: Path) -> None:
    double = Double(tmp_path)
    double.switch(orphan_ranks=True)
    async with running(doubled(directory, double)) as engine:
        ranks = double.rank_pids
        assert set(ranks) <= set(engine._pids)
        assert engine._worker is not None
        os.kill(engine._worker.process.pid, signal.SIGKILL)  # even without the guardian
        await eventually(lambda: not any(processes.is_alive(pid) for pid in ranks), 5.0)


_REPLICA = """
import asyncio, os, sys
from pathlib import Path
from support.remote_engines import doubled
from support.trtllm_doubles import Double

async def main():
    engine = doubled(Path(sys.argv[1]), Double(Path(sys.argv[2])))
    await engine.start()
    print(engine._worker.process.pid, *engine._pids, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.slow
def test_16404_no_rank_survives_the_replica_that_is_killed(
    directory: Path, tmp_path: Path, root: Path
) -> None:
    double = Double(tmp_path)
    double.switch(orphan_ranks=True)
    replica = subprocess.Popen(
        [sys.executable, "-c", _REPLICA, str(directory), str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"},
    )
    with replica:
        assert replica.stdout is not None
        pids = [int(pid) for pid in replica.stdout.readline().split()]
        assert set(double.rank_pids) < set(pids)
        replica.kill()
    deadline = time.monotonic() + 5.0
    while any(processes.is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("above", [0.7, 0.5])
async def test_3486_out_of_memory_is_tried_once_more_with_less(
    directory: Path, tmp_path: Path, above: float
) -> None:
    double = Double(tmp_path)
    double.switch(oom_above_fraction=above)
    engine = doubled(directory, double)
    try:
        if above == 0.7:
            await engine.start()
            assert (await answer_of(engine, greedy("once")))[1].reason == "length"
        else:
            with pytest.raises(DeployError, match=r"0\.85, and again with .* 0\.68"):
                await engine.start()
    finally:
        await engine.shutdown()
    fractions = [
        event["arguments"]["kv_cache_config"]["free_gpu_memory_fraction"]
        for event in double.events("construct")
    ]
    assert fractions == [0.85, 0.68]


@pytest.mark.slow
async def test_10035_two_engines_of_one_node_start_at_once(directory: Path, tmp_path: Path) -> None:
    port = int(free_ports(("P",))["P"])
    engines = []
    for name in "ab":
        (tmp_path / name).mkdir()
        double = Double(tmp_path / name)
        double.switch(fixed_port=port)
        engines.append(doubled(directory, double))
    try:
        await asyncio.gather(*(engine.start() for engine in engines))
    finally:
        await asyncio.gather(*(engine.shutdown() for engine in engines))


@pytest.mark.slow
async def test_13777_ten_thousand_requests_leave_the_worker_as_it_was(
    directory: Path, tmp_path: Path
) -> None:
    double = Double(tmp_path)
    async with running(doubled(directory, double)) as engine:
        worker = next(
            p.pid
            for p in processes.descendants(engine._worker.process.pid)  # type: ignore[union-attr]
            if "__main__.py" in processes.command(p.pid)
        )

        async def some(first: int, count: int) -> None:
            for number in range(first, first + count):
                await answer_of(engine, greedy(f"{number}", 1, seed=number % 7))

        async def many(first: int) -> None:
            await asyncio.gather(*(some(first + 1000 * i, 320) for i in range(16)))

        await many(0)
        before = memory_kb(worker)
        await many(20_000)
        assert memory_kb(worker) < before * 1.05
        assert not engine._requests
    assert double.violations == []


def memory_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError(pid)

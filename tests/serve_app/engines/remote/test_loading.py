"""A remote engine that does not load: one sentence, in time, and no process is left."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.remote_engines import eventually, journal, running, scripted, scripted_plan

from deepseek.errors import DeployError
from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines
from serve_app.engines.remote.process import worker_environment
from serve_app.engines.worker import processes


async def fails(engine: RemoteEngine) -> str:
    """Why it does not start; nothing of it is left then."""
    try:
        with pytest.raises(DeployError) as caught:
            await engine.start()
    finally:
        await engine.shutdown()
    below = [process.pid for process in processes.descendants(os.getpid())]
    assert not [pid for pid in below if "__main__.py" in processes.command(pid)]
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"constructor": "raise"}, "ValueError: LLM got invalid argument: tensor_paralel_size"),
        (
            {"constructor": "rank_fails"},
            "RuntimeError: Executor worker returned error, because of AttributeError: 'Linear' "
            "object has no attribute 'weight_scale'",
        ),
        ({"constructor": "refuse"}, "the environment has version 2, not 1; make it anew"),
        ({"constructor": "die"}, "its process was killed by SIGKILL while it loaded, which the"),
        (
            {"constructor": "exit"},
            "exit code 1 while it loaded; it said: ValueError: tensor model.norm.weight is missing",
        ),
        (
            {"constructor": "rank_dies", "ranks": 2},
            " was killed by SIGKILL while the engine loaded",
        ),
    ],
)
async def test_a_constructor_that_fails_is_told_in_its_words(
    tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    message = await fails(scripted(tmp_path, **arguments))
    assert message.startswith(f"{tmp_path} did not load in trtllm: ")
    assert words in message


@pytest.mark.parametrize(
    ("deadlines", "words"),
    [
        (Deadlines(load_stall_s=0.6), "no sign of work for"),
        (Deadlines(load_s=0.6), "has not returned in 0.6 s, while reading the weights"),
    ],
)
async def test_a_constructor_that_never_returns_is_given_up_and_mpi_named(
    tmp_path: Path, deadlines: Deadlines, words: str
) -> None:
    message = await fails(scripted(tmp_path, deadlines=deadlines, constructor="hang", ranks=1))
    assert words in message
    if "sign" in words:
        assert "(MPI)" in message


async def test_out_of_memory_is_tried_once_more_with_less(tmp_path: Path) -> None:
    arguments = {"constructor": "oom", "free_fraction": 0.85, "oom_above": 0.7}
    plan = scripted_plan(tmp_path, **arguments)
    less = {**plan.arguments, "free_fraction": 0.68}
    plan = replace(plan, less_memory=less, memory=("fraction 0.85", "fraction 0.68"))
    async with running(scripted(tmp_path, plan=plan)) as engine:
        await engine.check()
    tried = [line["arguments"]["free_fraction"] for line in journal(tmp_path, "start")]
    assert tried == [0.85, 0.68]

    (tmp_path / "journal").unlink()
    never = replace(plan, arguments={**plan.arguments, "oom_above": 0.5},
                    less_memory={**less, "oom_above": 0.5})  # fmt: skip
    message = await fails(scripted(tmp_path, plan=never))
    assert "ran out of GPU memory with fraction 0.85, and again with fraction 0.68" in message
    assert len(journal(tmp_path, "start")) == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "cannot be started (No such file or directory)"),
        (f'exec {sys.executable} -S "$@"', "No module named 'msgspec'"),
        (f'exec {sys.executable} "$@"', "No module named 'tensorrt_llm'"),
    ],
)
async def test_a_python_that_is_none_of_the_engines_is_named(
    tmp_path: Path, script: str | None, words: str
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o700)
    engine = RemoteEngine(
        TrtllmOptions(directory=tmp_path, python=python),
        plan=lambda _: scripted_plan(tmp_path),
    )
    message = await fails(engine)
    assert words in message
    assert "make engine-env TARGET=trtllm" in message
    assert str(python) in message


async def test_progress_is_told_while_it_loads_and_after(tmp_path: Path) -> None:
    engine = scripted(tmp_path, constructor="slow", slow_s=0.6)
    assert engine.loading() is None
    starting = asyncio.create_task(engine.start())
    phases = []

    def phase() -> str:
        progress = engine.loading()
        if progress is not None:
            phases.append(progress.phase)
        return phases[-1] if phases else ""

    await eventually(lambda: phase() == "reading the weights")
    progress = engine.loading()
    assert progress is not None
    assert progress.total_bytes == 1000
    await starting
    assert phases[0] == "starting the engine's process"
    await engine.shutdown()


async def test_a_replica_that_stops_while_its_engine_loads_leaves_no_process(
    tmp_path: Path,
) -> None:
    engine = scripted(tmp_path, constructor="hang", ranks=2)
    starting = asyncio.create_task(engine.start())
    await eventually(lambda: journal(tmp_path, "ranks"))
    pids = journal(tmp_path, "ranks")[0]["pids"]
    await engine.shutdown()
    assert not any(processes.is_alive(pid) for pid in pids)
    with pytest.raises(DeployError, match="did not load"):
        await starting


async def test_two_engines_start_at_once_on_one_node(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    engines = [scripted(folder, ranks=1) for folder in folders]
    try:
        infos = await asyncio.gather(*(engine.start() for engine in engines))
        assert len(infos) == 2
    finally:
        await asyncio.gather(*(engine.shutdown() for engine in engines))


def test_a_worker_inherits_nothing_of_this_environments_python_or_of_ray() -> None:
    own = {
        "PYTHONPATH": "/ours",
        "RAY_ADDRESS": "x",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x",
        "OMPI_COMM_WORLD_RANK": "0",
        "VIRTUAL_ENV": "/ours",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PATH": "/bin",
    }
    kept = worker_environment(own)
    assert {"CUDA_VISIBLE_DEVICES", "PATH"} <= kept.keys()
    assert "PYTHONPATH" not in kept
    assert not {"RAY_ADDRESS", "OTEL_EXPORTER_OTLP_ENDPOINT", "VIRTUAL_ENV"} & kept.keys()

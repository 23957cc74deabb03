"""Remote engines on a real Ray Serve: killed at every level, replaced, and no process is left.

The engine is a script whose next token depends on the last one, so that every answer is known.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from ray import cloudpickle, serve
from support import remote_engines, trtllm_doubles
from support.configs import make_config
from support.remote_engines import eventually, journal, scripted, walk
from support.serving import read_sse

from serve_app.app import build_with
from serve_app.engine_sections import EchoOptions
from serve_app.engines.remote.launch import Deadlines
from serve_app.engines.worker import processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

APP = "remote"
PROMPT = "any prompt"
LENGTH = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def url(serve_url: str, folder: Path) -> Iterator[str]:
    config = make_config(
        echo=EchoOptions(max_model_len=1024), replicas=2, drain_s=1.0, health_check_period_s=1.0
    )
    deadlines = Deadlines(quiet_s=2.0, canary_every_s=2.0, canary_s=2.0)
    modules = [remote_engines, trtllm_doubles]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        engine = partial(
            scripted, folder, deadlines=deadlines, walk=True, step_s=0.02, per_step=1, ranks=2
        )
        serve.run(build_with(config, engine), name=APP, route_prefix=f"/{APP}")
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
    yield f"{serve_url}/{APP}/v1/completions"
    serve.delete(APP)


def expected() -> str:
    said, last = "", PROMPT.encode()[-1]
    for _ in range(LENGTH):
        last = walk(last)
        said += chr(last)
    return said


async def stream(client: httpx.AsyncClient, url: str) -> tuple[str, int]:
    """Text and token count of one streamed answer."""
    body = {
        "model": "echo",
        "prompt": PROMPT,
        "max_tokens": LENGTH,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = []
    async with client.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line:
                lines.append(line)
    payloads = read_sse("".join(f"{line}\n\n" for line in lines))
    assert payloads[-1] == "[DONE]", payloads[-1]
    chunks = [item for item in payloads if item != "[DONE]"]
    text = "".join(choice["text"] for item in chunks for choice in item["choices"])
    return text, chunks[-1]["usage"]["completion_tokens"]


def busy_worker(folder: Path, known: int) -> int:
    """The pid of a worker that has one of the newest requests."""
    return int(journal(folder, "request")[known:][0]["pid"])


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("victim", ["worker", "rank", "guardian", "replica", "stopped worker"])
async def test_streams_outlive_it_and_nothing_of_it_is_left(
    url: str, folder: Path, victim: str
) -> None:
    before = len(journal(folder, "request"))
    starts = len(journal(folder, "ranks"))
    async with httpx.AsyncClient(timeout=120) as client:
        streams = [asyncio.create_task(stream(client, url)) for _ in range(6)]
        await eventually(lambda: len(journal(folder, "request")) >= before + 6, 60.0)
        worker = busy_worker(folder, before)
        ranks = next(line["pids"] for line in journal(folder, "ranks") if line["pid"] == worker)
        inner = parent(worker)
        guardian = parent(inner)
        replica = parent(guardian)
        await asyncio.sleep(0.5)
        pid = {"rank": ranks[0], "guardian": guardian, "replica": replica}.get(victim, worker)
        os.kill(pid, signal.SIGSTOP if victim.startswith("stopped") else signal.SIGKILL)
        for answer in await asyncio.gather(*streams):
            assert answer == (expected(), LENGTH)
    left = [worker, inner, guardian, replica, *ranks]
    await eventually(lambda: not any(processes.is_alive(pid) for pid in left), 15.0)
    # Serve starts another in its place.
    await eventually(lambda: len(journal(folder, "ranks")) > starts, 60.0)

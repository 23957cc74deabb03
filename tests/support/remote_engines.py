"""Remote engines for tests: a plan and a worker of a script, and what it wrote down."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.trtllm_doubles import DOUBLE_PATH, Double

from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.options import launch_of

SUPPORT = Path(__file__).parent
END = 4  # a byte that no text has


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


def scripted_plan(directory: Path, **arguments: Any) -> Plan:
    return Plan(
        directory=directory,
        engine="trtllm",
        recipe="script",
        artifact_digest="a" * 64,
        engine_digest="e" * 64,
        kv_cache="bf16",
        weight_bytes=1000,
        arguments={"journal": str(directory / "journal"), **arguments},
        max_model_len=1024,
        vocab_size=256,
        end_token_ids=frozenset({END}),
        tokenizer=Bytes(),
        page_tokens=16,
    )


def scripted(
    directory: Path,
    *,
    deadlines: Deadlines | None = None,
    plan: Plan | None = None,
    **arguments: Any,
) -> RemoteEngine:
    """An engine whose worker runs scripted_backend.py with these arguments."""
    plan = plan or scripted_plan(directory, **arguments)
    python = Path(sys.executable)
    return RemoteEngine(
        TrtllmOptions(directory=directory, python=python),
        Launch(python=python, backend="scripted_backend", path=(str(SUPPORT),)),
        plan=lambda _: plan,
        deadlines=deadlines or Deadlines(kill_s=5.0),
    )


def doubled(
    directory: Path, double: Double, *, deadlines: Deadlines | None = None, **options: Any
) -> RemoteEngine:
    """TensorRT-LLM's adapter and worker with the double in place of `tensorrt_llm`."""
    settings = TrtllmOptions(directory=directory, python=Path(sys.executable), **options)
    launch = replace(
        launch_of(settings), path=DOUBLE_PATH, env=double.env | {"OMP_NUM_THREADS": "1"}
    )
    return RemoteEngine(settings, launch, deadlines=deadlines)


@asynccontextmanager
async def running(engine: RemoteEngine) -> AsyncIterator[RemoteEngine]:
    try:
        await engine.start()
        yield engine
    finally:
        await engine.shutdown()


def journal(directory: Path, what: str | None = None) -> list[dict[str, Any]]:
    """What the script wrote down of requests of clients; warm-ups and canaries are left out."""
    path = directory / "journal"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    own = {
        (line["pid"], line["id"])
        for line in lines
        if line["what"] == "request" and line["cache_salt"].startswith("intserve-")
    }
    return [
        line
        for line in lines
        if (line["pid"], line.get("id")) not in own and what in (None, line["what"])
    ]


async def answer_of(engine: RemoteEngine, request: GenerateRequest) -> tuple[str, Done]:
    """Text and end of a request."""
    events: list[Event] = [event async for event in engine.generate(request)]
    done = events[-1]
    assert isinstance(done, Done)
    return "".join(event.text for event in events if isinstance(event, Tokens)), done


async def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Poll a condition on this loop until it holds."""
    async with asyncio.timeout(timeout_s):
        while not (value := condition()):
            await asyncio.sleep(0.01)
    return value


def walk(token: int) -> int:
    """The byte after a byte in answers of a script that walks (scripted_backend.py)."""
    return 97 + (token * 7 + 3) % 26

"""Streams of remote engines that die go on in another: every token once and in order."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from support.fleets import LocalFleet, LocalReplica, LocalStream, read
from support.remote_engines import journal, scripted, walk
from support.serving import make_request

from serve_app.engines.protocol import Done, Event, Tokens
from serve_app.engines.worker import processes


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGABRT"])
async def test_a_worker_killed_amid_streams_loses_and_repeats_no_token(
    tmp_path: Path, signal_name: str
) -> None:
    engines = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        engines[name] = scripted(tmp_path / name, walk=True, step_s=0.005, per_step=2, ranks=1)
    fleet = LocalFleet(engines)
    await fleet.start()
    worker = journal(tmp_path / "a", "start")[0]["pid"]
    killed = []

    def kill(replica: LocalReplica, stream: LocalStream, event: Event) -> None:
        if replica.replica_id == "a" and not killed and stream.num_tokens >= 20:
            killed.append(replica.replica_id)
            replica.listed = False  # as Serve does when the replica's process has ended
            os.kill(worker, getattr(signal, signal_name))

    fleet.before_message = kill
    prompts = [f"prompt {number}" for number in range(6)]
    streams = [
        read(fleet.fleet, make_request(text, f"r{number}", max_tokens=60, temperature=0.0))
        for number, text in enumerate(prompts)
    ]
    try:
        for text, events in zip(prompts, await asyncio.gather(*streams), strict=True):
            expected = []
            last = text.encode()[-1]
            for _ in range(60):
                last = walk(last)
                expected.append(last)
            tokens = [t for e in events if isinstance(e, Tokens) for t in e.token_ids]
            said = "".join(e.text for e in events if isinstance(e, Tokens))
            assert tokens == expected
            assert said == bytes(expected).decode()
            done = events[-1]
            assert isinstance(done, Done)
            assert (done.reason, done.completion_tokens) == ("length", 60)
        assert killed
        resumed = [line for line in journal(tmp_path / "b", "request") if line["max_tokens"] < 60]
        assert resumed
    finally:
        for engine in engines.values():
            await engine.shutdown()
    below = [process.pid for process in processes.descendants(os.getpid())]
    assert not [pid for pid in below if "__main__.py" in processes.command(pid)]

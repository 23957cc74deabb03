"""Processes of the service that are there and answer nobody: they are killed, and replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from support.foreground import running, write_echo
from support.ports import free_port
from support.processes import named
from support.serving import wait_for


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_replica_is_killed_though_others_may_drain_for_long(
    root: Path, tmp_path: Path
) -> None:
    """Its successor needs the room that it holds, as a replica on GPUs does."""
    settings = tmp_path / "serve.yaml"
    write_echo(settings, http={"port": free_port()})
    with running(root, "--config", str(settings), "--replicas", "3") as (process, url):
        (victim, *_) = named(process.pid, "ServeReplica:intserve:engine")
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: victim not in named(process.pid, "ServeReplica:intserve:engine"), 120)
        wait_for(lambda: len(named(process.pid, "ServeReplica:intserve:engine")) == 3, 60)
        body = {"model": "echo", "prompt": "up"}
        assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 200

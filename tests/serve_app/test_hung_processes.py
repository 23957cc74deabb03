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
    pools = {"default": {"engine": {"kind": "echo"}, "replicas": 3}}
    write_echo(settings, http={"port": free_port()}, pools=pools)
    with running(root, "--config", str(settings)) as (process, url):
        (victim, *_) = named(process.pid, "ServeReplica:intserve:engine")
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: victim not in named(process.pid, "ServeReplica:intserve:engine"), 120)
        wait_for(lambda: len(named(process.pid, "ServeReplica:intserve:engine")) == 3, 60)
        body = {"model": "echo", "prompt": "up"}
        assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 200


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_owner_of_admission_that_is_stopped_is_replaced_and_streams_go_on(
    root: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "serve.yaml"
    write_echo(settings, itl_s=0.1, http={"port": free_port()})
    body = {"model": "echo", "prompt": "up", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with (
        running(root, "--config", str(settings)) as (process, url),
        httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        (victim,) = named(process.pid, "AdmissionActor")
        os.kill(victim, signal.SIGSTOP)
        asked = {"model": "echo", "prompt": "up"}
        wait_for(
            lambda: httpx.post(f"{url}/completions", json=asked, timeout=60).status_code == 200, 90
        )
        wait_for(lambda: victim not in named(process.pid, "AdmissionActor"), 60)
        assert list(lines)[-2] == "data: [DONE]"

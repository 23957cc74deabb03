"""`python -m serve_app` as a process of its own, and what it opens and leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
from support.serving import wait_for

from cluster.access import private_folder
from serve_app.routing.keys import is_loopback

#: What a replica does for others, each on a port of its own. Serve unpickles what it is sent there,
#: and Ray runs it: a port that asked for no token would run anybody's code.
_METHODS = ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.CoreWorkerService/PushTask")


def answers_without_a_token(port: int) -> list[str]:
    """What a port of a replica says to requests that send nothing: gRPC statuses in order."""
    found = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=10)
                found.append("OK")
            except grpc.RpcError as error:
                found.append(str(error.code().name))
    return sorted(found)


def run_cli(root: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve_app", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout_s)


def assert_mistake(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


def write_echo(path: Path, *, itl_s: float = 0.0, http: dict[str, Any], **settings: Any) -> None:
    """A configuration of an echo engine, with any further top-level settings."""
    engine = {"kind": "echo", "itl_s": itl_s}
    pools = {"default": {"engine": engine}}
    path.write_text(json.dumps({"pools": pools, "http": http, **settings}))


def processes_of_session(session: int) -> list[str]:
    """Commands of live processes that belong to a session, its leader excepted."""
    commands = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if os.getsid(int(entry.name)) == session and int(entry.name) != session:
                commands.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (ProcessLookupError, FileNotFoundError):
            continue  # it ended while we looked
    return [command for command in commands if command]


@contextlib.contextmanager
def running(root: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The foreground command in a session of its own, and the URL that it printed."""
    command = [sys.executable, "-m", "serve_app", *arguments]
    with subprocess.Popen(
        command,
        cwd=root,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip().rpartition(" ")[2]
        finally:
            process.kill()


def listening(session: int) -> dict[int, set[tuple[str, int]]]:
    """Address and port of each listener, by process, of a session."""
    found: dict[int, set[tuple[str, int]]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session:
                found[process.pid] = {
                    (place.laddr.ip, place.laddr.port)
                    for place in process.net_connections("tcp")
                    if place.status == psutil.CONN_LISTEN
                }
    return found


def assert_closed_but(open_place: tuple[str, int], session: int) -> None:
    """The network reaches nothing else without Ray's token."""

    def opened() -> dict[int, set[tuple[str, int]]] | None:
        """What listens; a HAProxy that hands its place to its next is in neither for a moment."""
        found = listening(session)
        return found if any(open_place in each for each in found.values()) else None

    found = wait_for(opened)
    places = {place for each in found.values() for place in each}
    outside = {place for place in places if not is_loopback(place[0])} - {open_place}
    for _, port in outside:
        (holder,) = (pid for pid, each in found.items() if port in {p for _, p in each})
        assert psutil.Process(holder).cmdline()[0].startswith("ray::ServeReplica")
        assert answers_without_a_token(port) == ["UNAUTHENTICATED", "UNIMPLEMENTED"]


def haproxy_folders() -> set[Path]:
    """Folders of HAProxy: each is named after a Ray node."""
    return {path for path in private_folder().iterdir() if len(path.name) == 56}

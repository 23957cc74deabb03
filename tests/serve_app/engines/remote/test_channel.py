"""Frames and messages between a replica and its worker, and what is made of bad ones."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from support.remote_engines import scripted_plan

from deepseek.errors import DeployError
from serve_app.engines.remote.channel import AdapterChannel
from serve_app.engines.remote.launch import Deadlines, Launch
from serve_app.engines.remote.loading import Loader
from serve_app.engines.remote.process import WORKER, WorkerProcess
from serve_app.engines.worker.channel import ChannelError, FrameReader, WorkerChannel, encode
from serve_app.engines.worker.messages import (
    PROTOCOL,
    End,
    Failed,
    FromWorker,
    Generate,
    Hello,
    Output,
    Ping,
    Score,
    Start,
    Stop,
    ToWorker,
)


def test_messages_cross_in_any_pieces() -> None:
    sent = [
        Output(7, [1, 2], scores=[Score(-0.5, 1, [(3, -1.0)]), Score(-2.0)], cached_tokens=0),
        End(7, finish_reason="stop"),
        Hello(protocol=PROTOCOL, pid=3, python="3.12"),
    ]
    data = b"".join(encode(message) for message in sent)
    for size in (1, 3, len(data)):
        reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [message for piece in pieces for message in reader.feed(piece)] == sent


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 1 << 31),
        struct.pack("<I", 3) + b"abc",
        encode(Ping(1)),  # of the other side
        struct.pack("<I", 0),
    ],
)
def test_what_is_no_message_of_the_other_side_is_refused(data: bytes) -> None:
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    with pytest.raises(ChannelError):
        list(reader.feed(data))


def test_the_protocol_is_in_both_first_messages_whatever_its_value() -> None:
    for message in (
        Hello(protocol=PROTOCOL, pid=1, python="3"),
        Start(protocol=PROTOCOL, backend="x", directory="d", arguments={}),
    ):
        assert b"protocol" in encode(message)
        raw = msgspec.msgpack.decode(encode(message)[4:])
        del raw["protocol"]
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(raw, type(message))


async def test_an_adapter_hears_of_the_end_once_and_of_nonsense() -> None:
    for nonsense in (False, True):
        ours, theirs = socket.socketpair()
        heard: list[object] = []
        channel = await AdapterChannel.connect(ours, heard.append, heard.append)
        theirs.sendall(encode(End(1)) + (b"\xff" * 8 if nonsense else b""))
        if not nonsense:
            theirs.close()
        async with asyncio.timeout(5.0):
            while len(heard) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        assert heard[0] == End(1)
        assert len(heard) == 2
        assert ("frame" if nonsense else "closed") in str(heard[1])
        channel.send(Stop())  # goes nowhere
        channel.close()
        theirs.close()


def start_worker(*first: msgspec.Struct) -> tuple[int, list[FromWorker]]:
    """Start the worker's file alone and send it messages; its exit code, and what it said."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(theirs.fileno()), str(os.getpid())],
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    for message in first:
        ours.sendall(encode(message))
    ours.shutdown(socket.SHUT_WR)
    channel: WorkerChannel[FromWorker] = WorkerChannel(ours, FromWorker)
    said = list(channel.receive())
    ours.close()
    return process.wait(10.0), said


def test_a_worker_of_another_protocol_says_so_in_one_sentence() -> None:
    code, said = start_worker(
        Start(protocol=PROTOCOL + 1, backend="x", directory="d", arguments={})
    )
    assert code != 0
    assert isinstance(said[0], Hello)
    assert isinstance(said[-1], Failed)
    assert f"speaks protocol {PROTOCOL}, not {PROTOCOL + 1}" in said[-1].error


@pytest.mark.parametrize("first", [(), (Ping(1),)])
def test_a_worker_whose_replica_leaves_or_says_nonsense_ends(first: tuple[Ping, ...]) -> None:
    code, said = start_worker(*first)
    assert code != 0
    assert isinstance(said[0], Hello)


async def test_an_adapter_refuses_a_worker_of_another_protocol(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(
        f"#!{sys.executable}\n"
        "import socket, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[4])!r})\n"
        "from serve_app.engines.worker.channel import encode\n"
        "from serve_app.engines.worker.messages import Hello\n"
        "socket.socket(fileno=int(sys.argv[2])).sendall("
        "encode(Hello(protocol=99, pid=1, python='3')))\n"
        "time.sleep(600)\n"
    )
    other.chmod(0o700)
    loader = Loader(scripted_plan(tmp_path), Launch(python=other, backend="x"), Deadlines())
    with pytest.raises(DeployError, match=f"speaks protocol 99, not {PROTOCOL}"):
        await loader.load()


def test_an_engines_launcher_may_import_the_workers_file_again() -> None:
    """As mpi4py does in each rank: it starts nothing, and leaves its folder off the path."""
    script = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(WORKER.parent)!r}\n"
        f"runpy.run_path({str(WORKER)!r}, run_name='__worker__')\n"
        "import importlib.util\n"
        "print([name for name in ('messages', 'guardian') if importlib.util.find_spec(name)])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


async def test_a_flood_of_output_is_bounded_and_its_last_lines_are_kept(tmp_path: Path) -> None:
    flood = tmp_path / "python"
    flood.write_text(
        "#!/bin/sh\n"
        "head -c 300000 /dev/zero | tr '\\0' x; printf '\\n'\n"
        "printf 'loading 10%%\\rloading 90%%\\r\\n\\033[31mred\\033[0m\\n'\n"
    )
    flood.chmod(0o700)
    ended: list[str] = []
    process = WorkerProcess(Launch(python=flood, backend="x"), ended.append)
    assert await process.wait(10.0)
    process.socket.close()
    assert ended == ["ended with exit code 0"]
    assert all(len(line) <= 500 for line in process.last_lines)
    assert process.last_lines[-3:-1] == ["loading 10%", "loading 90%"]
    assert "\x1b" not in process.last_lines[-1]


def test_generate_has_no_default_for_what_an_engine_would_choose_itself() -> None:
    optional = {f.name for f in msgspec.structs.fields(Generate) if not f.required}
    assert optional == {"logprobs", "prompt_logprobs", "trace_headers", "priority"}
    assert set(ToWorker.__args__) & set(FromWorker.__args__) == set()

"""The access log: a line for each request, which no request waits for and no text of it reaches."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from support.serving import FaultyEngine, client_of, make_service, metric, wait_for

from deepseek.errors import ConfigError
from serve_app.config import EchoOptions
from serve_app.openai.service import Service
from serve_app.telemetry import access_log
from serve_app.telemetry.access_log import MAX_LINE_BYTES, AccessLog, check_target, make_line
from serve_app.telemetry.tracing import Telemetry

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
FIELDS = {
    *("time", "request_id", "ingress", "key", "address", "method", "route", "model", "status"),
    *("outcome", "error", "stream", "choices", "prompt_tokens", "completion_tokens"),
    *("cached_tokens", "queue_s", "ttft_s", "duration_s", "replicas", "resumes", "trace_id"),
    "pool",
}


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def logged(service: Service, path: Path) -> list[dict[str, Any]]:
    service.close()
    return read(path)


async def test_every_request_has_one_line_with_who_how_much_and_how_long(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    service = make_service(telemetry=Telemetry(TracerProvider()), access_log=path)
    async with client_of(service) as client:
        body = {"model": "echo", "prompt": "hello CANARY", "max_tokens": 4, "n": 2}
        whole = (await client.post(TEXT, json=body)).json()
        await client.post(TEXT, json=body | {"stream": True})
        await client.post(TEXT, json=body | {"temperature": "CANARY"})
        await client.post(TEXT, json=body | {"model": "CANARY"})
        await client.post(TEXT, content=b"CANARY", headers={"content-type": "application/json"})
        message = {"role": "user", "content": "CANARY"}
        await client.post(CHAT, json={"model": "echo", "messages": [message]})
    lines = logged(service, path)
    assert "CANARY" not in path.read_text(encoding="utf-8")
    assert [set(line) for line in lines] == [FIELDS] * 6
    assert [(line["status"], line["outcome"], line["error"]) for line in lines] == [
        (200, "ok", None),
        (200, "ok", None),
        (400, "invalid_value", "invalid_value"),
        (404, "model_not_found", "model_not_found"),
        (400, "invalid_json", "invalid_json"),
        (200, "ok", None),
    ]
    first, streamed, refused, *_, chat = lines
    assert whole["id"] == f"cmpl-{first['request_id']}"
    expected = {
        "key": None,
        "method": "POST",
        "route": TEXT,
        "model": "echo",
        "stream": False,
        "choices": 2,
        "prompt_tokens": 12,
        "completion_tokens": 8,
        "cached_tokens": 0,
        "resumes": 0,
        "ingress": "0",
        "address": "127.0.0.1",
    }
    assert {name: first[name] for name in expected} == expected
    assert (streamed["stream"], streamed["completion_tokens"]) == (True, 8)
    assert (refused["model"], refused["ttft_s"], refused["choices"]) == (None, None, None)
    assert chat["route"] == CHAT
    assert 0.0 <= first["ttft_s"] <= first["duration_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert re.fullmatch(r"[0-9a-f]{32}", first["trace_id"])
    assert len({line["request_id"] for line in lines}) == 6


async def test_a_refused_key_has_a_line_without_a_word_of_the_client(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    service = make_service(api_keys=("secret-key",), access_log=path)
    async with client_of(service) as client:
        for headers in ({}, {"authorization": "Bearer CANARY"}):
            headers |= {"user-agent": "CANARY", "x-request-id": "CANARY"}
            await client.post(f"{TEXT}?CANARY", json={"prompt": "CANARY"}, headers=headers)
        await client.get("/v1/models/CANARY")
        key = {"authorization": "Bearer secret-key"}
        await client.post(TEXT, json={"model": "echo", "prompt": "x"}, headers=key)
    *refused, answered = logged(service, path)
    text = path.read_text(encoding="utf-8")
    assert "CANARY" not in text
    assert "secret-key" not in text
    told = [(line["method"], line["route"], line["status"], line["key"]) for line in refused]
    assert told == [
        ("POST", TEXT, 401, None),
        ("POST", TEXT, 401, None),
        ("GET", "/v1/models/{model:path}", 401, None),
    ]
    assert refused[0]["address"] == "127.0.0.1"
    assert answered["key"] == service.keys.tenants[0].name


@pytest.mark.parametrize(
    ("prompt", "status", "outcome", "completion"),
    [
        ("overloaded", 429, "overloaded", 0),
        ("bug", 500, "internal_error", 0),
        ("late-failed", 200, "engine_failed", 2),
        ("silent", 200, "internal_error", 2),
    ],
)
async def test_a_failure_has_its_line_too(
    tmp_path: Path, prompt: str, status: int, outcome: str, completion: int
) -> None:
    path = tmp_path / "access.jsonl"
    service = make_service(FaultyEngine(EchoOptions()), access_log=path)
    async with client_of(service) as client:
        await client.post(TEXT, json={"model": "echo", "prompt": prompt, "stream": True})
    (line,) = logged(service, path)
    told = (line["status"], line["outcome"], line["error"], line["completion_tokens"])
    assert told == (status, outcome, outcome, completion)


def test_a_rotated_log_goes_on_in_a_new_file_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "REOPEN_S", 0.0)
    path, old = tmp_path / "access.jsonl", tmp_path / "access.jsonl.1"
    log = AccessLog(path)
    log.write({"n": 1})
    wait_for(lambda: path.stat().st_size)
    path.rename(old)
    log.write({"n": 2})
    wait_for(lambda: path.exists() and path.stat().st_size)
    path.unlink()
    log.write({"n": 3})
    log.close()
    assert (read(old), read(path)) == ([{"n": 1}], [{"n": 3}])
    assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0, "names of keys are not for everybody"


WRITER = """
import sys
from pathlib import Path
from serve_app.telemetry.access_log import AccessLog
log = AccessLog(Path(sys.argv[1]), max_waiting=10**6)
print("ready", flush=True)
sys.stdin.readline()  # so that neither has ended when the other begins
for number in range(3000):
    log.write({"writer": sys.argv[2], "number": number, "filler": "x" * (number % 3000)})
log.close()
log._thread.join()
"""


@pytest.mark.heavy
def test_two_processes_share_a_file_and_every_line_stays_whole(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, name],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        with writer.stdout:
            assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        with writer.stdin:
            writer.stdin.write("go\n")
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = read(path)
    assert len(lines) == 6000
    for name in "ab":
        own = [line["number"] for line in lines if line["writer"] == name]
        assert own == [*range(3000)]
    assert [line["writer"] for line in lines] != sorted(line["writer"] for line in lines)


async def test_a_full_disk_loses_lines_and_counts_them_and_no_request_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(access_log=Path("/dev/full"))
    async with client_of(service) as client:
        for _ in range(3):
            answer = await client.post(TEXT, json={"model": "echo", "prompt": "hello"})
            assert answer.status_code == 200
    service.close()
    text = service.metrics.snapshot()
    assert metric(text, "intserve_access_log_dropped_total") == 3
    assert caplog.text.count("the access log has lost") == 1, "told, and not for every line"


def test_a_line_that_was_cut_short_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lost = tmp_path / "access.jsonl", list[int]()
    write, cut = os.write, [True]

    def short_once(file: int, data: bytes) -> int:
        return write(file, data[:5] if cut and cut.pop() else data)

    log = AccessLog(path, lost.append)
    monkeypatch.setattr(os, "write", short_once)
    log.write({"n": 1})
    log.write({"n": 2})
    log.close()
    assert path.read_text(encoding="utf-8").splitlines()[1:] == ['{"n":2}']
    assert lost == [1]


async def test_a_writer_that_hangs_holds_up_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(AccessLog, "_append", lambda self, line: go_on.wait(60))
    monkeypatch.setattr(access_log, "MAX_WAITING", 2)
    service = make_service(access_log=tmp_path / "access.jsonl")
    lines: list[int] = []
    log = AccessLog(tmp_path / "other.jsonl", lines.append, max_waiting=2)
    async with client_of(service) as client, asyncio.timeout(20):
        for number in range(6):
            log.write({"n": number})
            answer = await client.post(TEXT, json={"model": "echo", "prompt": "hello"})
            assert answer.status_code == 200
    assert 3 <= sum(lines) <= 4
    go_on.set()
    log.close()
    service.close()


@pytest.mark.parametrize("kind", ["directory", "missing", "pipe", "closed"])
def test_a_log_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "missing":
        path = path / "access.jsonl"
    elif kind == "pipe":
        os.mkfifo(path)
    elif os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:
        path = Path("/proc/access.jsonl")
    with pytest.raises(ConfigError, match=r"telemetry.access_log: \S+ cannot be appended to \(.+"):
        check_target(path)


def test_lines_go_to_stderr_where_that_is_asked_for(root: Path) -> None:
    script = (
        "from serve_app.telemetry.access_log import AccessLog;"
        "log = AccessLog('stderr'); log.write({'n': 1}); log.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", '{"n":1}\n')


def test_a_line_is_short_and_one_line_whatever_is_in_it() -> None:
    replicas = [f"engine#{number:0>40}" for number in range(500)]
    line = make_line({"key": "ü\n\u2028" * 2000, "replicas": replicas, "status": 200})
    assert len(line) <= MAX_LINE_BYTES
    assert line.count(b"\n") == 1
    told = json.loads(line)
    assert (told["status"], told["replicas"], told["cut"]) == (200, replicas[:4], True)
    assert len(line.decode("ascii").splitlines()) == 1

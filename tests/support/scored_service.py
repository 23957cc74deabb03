"""A small HTTP service that answers from `LLMEngine.score`: echo with logprobs as vLLM shapes it.

Real HTTP and real numbers without our own service, so that `evaluate --url` is tested against
vLLM's shapes, and against servers that refuse, stumble or answer something else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from deepseek.engine.engine import LLMEngine

#: Called with the parsed body of a completion: an answer of its own, or None for the real one.
#: (status, headers, bytes); status 0 closes the connection without an answer.
Fault = Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes] | None]


def refuse(status: int, message: str = "no", **headers: str) -> Fault:
    body = json.dumps({"error": {"message": message, "type": "x", "code": "y"}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: (status, named, body)


@dataclass
class ScoredService:
    """What it serves and how it fails. `faults` are used up, one per completion; `change` rewrites
    every answer with logprobs. `bodies` are the completions that were asked for."""

    engine: LLMEngine
    model: str = "tiny"
    key: str | None = None
    max_model_len: int | None = None
    health: dict[str, Any] = field(default_factory=dict)
    models: list[str] | None = None
    top: int = 20
    faults: list[Fault] = field(default_factory=list)
    change: Callable[[dict[str, Any]], Any] = lambda answer: answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def score(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to echo with logprobs; with max_tokens 1 the likeliest token follows."""
        ids = list(body["prompt"])
        with self.lock:
            logprobs = self.engine.score(torch.tensor(ids)).log_softmax(-1)
        values: list[float | None] = [None]
        tops: list[dict[str, float] | None] = [None]
        if body["max_tokens"]:
            ids.append(int(logprobs[-1].argmax()))
        for row, following in zip(logprobs, ids[1:], strict=False):
            best = row.topk(min(self.top, body["logprobs"]))
            named = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            # vLLM puts the prompt's own token first.
            named = {following: float(row[following])} | named
            values.append(float(row[following]))
            tops.append({f"token_id:{token}": value for token, value in named.items()})
        tokens = [f"token_id:{token}" for token in ids]
        text = "".join(tokens)
        shown = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
        choice = {"index": 0, "text": text, "logprobs": shown, "finish_reason": "length"}
        return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ids = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            with self.lock:
                ids.append(int(self.engine.score(torch.tensor(ids))[-1].argmax()))
            yield {"choices": [{"index": 0, "text": f"{ids[-1]}"}]}
        yield {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}


@contextmanager
def running(service: ScoredService) -> Iterator[str]:
    """The address of the service, which listens until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def may_not(self) -> bool:
            if service.key is None or self.headers["authorization"] == f"Bearer {service.key}":
                return False
            said = f"no such key: {self.headers['authorization']}"
            self.respond(401, json.dumps({"error": {"message": said}}).encode(), {})
            return True

        def do_GET(self) -> None:
            if self.may_not():
                return
            if self.path == "/v1/models":
                card = {"object": "model", "max_model_len": service.max_model_len}
                names = [service.model] if service.models is None else service.models
                found: Any = {"data": [card | {"id": name} for name in names]}
            elif self.path == "/health":
                found = service.health
            else:
                self.respond(404, b"{}", {})
                return
            self.respond(200, json.dumps(found).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.may_not():
                return
            with service.lock:
                service.bodies.append(body)
                fault = service.faults.pop(0) if service.faults else None
            answer = fault(body) if fault is not None else None
            if answer is not None:
                status, headers, data = answer
                if status:
                    self.respond(status, data, headers)
                else:
                    self.close_connection = True
                return
            if body.get("stream"):
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for event in service.stream(body):
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")
                return
            changed = service.change(service.score(body))
            data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
            self.respond(200, data, {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Clients that leave: whatever their request waits for, it leaves the queue with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message
from support.configs import make_config
from support.serving import LocalEngines, client_of, make_service, metric, wait_for
from support.sockets import Raw, head, listening

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.errors import Overloaded
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.routing.admission_client import OpenAdmission
from serve_app.routing.fleet import Fleet
from serve_app.routing.tickets import Enter, Leave
from serve_app.telemetry.tracing import Telemetry

TEXT = "/v1/completions"


class Queue(OpenAdmission):
    """An admission with a door and places: each waits until its event is set."""

    def __init__(self) -> None:
        self.door, self.places = asyncio.Event(), asyncio.Event()
        self.asked: set[str] = set()
        self.inside: set[str] = set()
        self.left: list[Leave] = []
        self.refusal: Exception | None = None

    async def enter(self, visit: Enter) -> None:
        self.asked |= {ask.sequence_id for ask in visit.asks}
        # As the owner does it: they are in, and the answer is still on its way.
        self.inside |= {ask.sequence_id for ask in visit.asks}
        await self.door.wait()
        if self.refusal is not None:
            self.inside.clear()
            raise self.refusal

    async def place(self, sequence_id: str) -> str | None:
        await self.places.wait()
        return None

    def leave(self, leave: Leave) -> None:
        if leave.sequence_id in self.inside:
            self.inside.discard(leave.sequence_id)
            self.left.append(leave)


def queued_service(queue: Queue, **options: Any) -> Service:
    config = make_config(echo=EchoOptions(**options))
    engines = LocalEngines(EchoEngine(EchoOptions(**options)))
    fleet = Fleet(engines, queue, config.resume)
    return Service(config, ByteTokenizer(), fleet, Telemetry(None), admission=queue)


def post(**body: Any) -> bytes:
    text = json.dumps({"model": "echo", "prompt": "hello", **body}).encode()
    return head(TEXT, length=len(text)) + text


def outcomes(service: Service, outcome: str) -> float:
    return metric(service.metrics.snapshot(), "intserve_requests_total", outcome=outcome)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("open_doors", [0, 1, 2])
def test_a_request_whose_client_has_gone_waits_no_longer(stream: bool, open_doors: int) -> None:
    """At the door of the queue, inside, and for its first token."""
    queue = Queue()
    for event in [queue.door, queue.places][:open_doors]:
        event.set()
    service = queued_service(queue, ttft_s=600.0)
    with listening(make_app(service)) as port:
        with Raw(port, post(stream=stream, n=3)):
            wait_for(lambda: len(queue.inside) == 3)
            if open_doors == 2:
                wait_for(lambda: service.engines._replicas.engine.load().running == 3)
        wait_for(lambda: not queue.inside)
        wait_for(lambda: outcomes(service, "disconnected") == 1)
        wait_for(lambda: service.engines._replicas.engine.load().running == 0)
    assert len(queue.left) == 3
    assert metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0


def test_one_that_leaves_in_the_middle_is_charged_for_what_it_got() -> None:
    queue = Queue()
    queue.door.set(), queue.places.set()
    service = queued_service(queue, itl_s=0.02)
    with listening(make_app(service)) as port:
        with Raw(port, post(stream=True, max_tokens=1000, ignore_eos=True)) as client:
            seen = b""
            while seen.count(b"data:") < 5:
                seen += client.read()
        wait_for(lambda: queue.left)
    (leave,) = queue.left
    assert not leave.failed
    assert 5 + 5 <= leave.used_tokens < 5 + 1000


async def test_a_refusal_at_the_door_leaves_nothing_behind() -> None:
    queue = Queue()
    queue.door.set()
    queue.refusal = Overloaded("the queue is full", code="queue_full", retry_after_s=9)
    service = queued_service(queue)
    async with client_of(service) as client:
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "x", "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "9")
    assert answer.json()["error"]["code"] == "queue_full"
    assert (queue.inside, queue.left) == (set(), [])
    assert service.unread.open == set()
    assert outcomes(service, "queue_full") == 1


async def call(service: Service, body: dict[str, Any], receive_more: Callable[[], Any]) -> None:
    """One request as a server makes it; `receive_more` is what comes after its body."""
    text = json.dumps({"model": "echo", "prompt": "hello", **body}).encode()
    messages = [{"type": "http.request", "body": text, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await receive_more()

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": TEXT,
        "raw_path": TEXT.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "http_version": "1.1",
    }
    await make_app(service)(scope, receive, send)


@pytest.mark.parametrize("num_steps", range(0, 40, 3))
@pytest.mark.parametrize("stream", [True, False])
async def test_at_whatever_moment_a_client_leaves_its_request_ends(
    stream: bool, num_steps: int
) -> None:
    """Also between the first token and the start of the answer."""
    queue = Queue()
    queue.door.set(), queue.places.set()
    service = queued_service(queue, itl_s=0.001)

    async def leave_soon() -> Message:
        for _ in range(num_steps):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    body = {"stream": stream, "max_tokens": 1000, "ignore_eos": True}
    await call(service, body, leave_soon)
    await asyncio.sleep(0.01)
    assert queue.inside == set()
    assert service.engines._replicas.engine.load().running == 0
    assert metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0
    assert outcomes(service, "disconnected") == 1
    assert service.unread.open == set()
    assert service.unread.num_bytes == 0


@pytest.mark.parametrize("num_steps", range(0, 60, 4))
async def test_a_request_that_its_server_cancels_leaves_nothing_behind(num_steps: int) -> None:
    """As Serve does when a client leaves: at any moment, also before the stream has begun."""
    queue = Queue()
    queue.door.set(), queue.places.set()
    service = queued_service(queue, itl_s=0.001)

    async def stay() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    body = {"stream": True, "max_tokens": 1000, "ignore_eos": True}
    task = asyncio.create_task(call(service, body, stay))
    for _ in range(num_steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert queue.inside == set()
    assert service.engines._replicas.engine.load().running == 0
    assert metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0
    assert service.unread.open == set()


async def test_a_client_that_stays_gets_its_answer_and_no_listener_is_left() -> None:
    service = make_service()
    before = asyncio.all_tasks()
    async with client_of(service) as client:
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "hello"})
    assert answer.json()["choices"][0]["text"] == "hello"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before

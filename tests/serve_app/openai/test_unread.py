"""Clients that read slowly, or nothing: they hold up nobody, and cost bounded memory and time.

A real server and sockets that do not read: what waits where is otherwise not to be seen.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from starlette.types import Message
from support.serving import client_of, make_request, make_service, metric, wait_for
from support.sockets import head, listening

from deepseek.engine.request import TokenLogprob
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, PromptLogprobs, Tokens
from serve_app.errors import ClientTooSlow
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.stream import MergedStream
from serve_app.openai.unread import SLICE, UnreadAnswers

TEXT = "/v1/completions"
#: Says a lot in few steps, so that a test needs no minutes to fill what a kernel holds unread.
PIECE = "word " * 20_000


class Talkative(EchoEngine):
    """Says PIECE again and again until `max_tokens`."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self._running[request.request_id] = 1
        try:
            for number in range(request.sampling.max_tokens):
                yield Tokens((number,), PIECE)
                await asyncio.sleep(0.001)
            yield Done("length", len(request.prompt_ids), request.sampling.max_tokens)
        finally:
            del self._running[request.request_id]


@contextmanager
def asking(port: int, body: dict[str, object]) -> Iterator[socket.socket]:
    """A client that sends a request and does not read."""
    text = json.dumps({"model": "echo", "prompt": "x", **body}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(30)
        client.connect(("127.0.0.1", port))
        client.sendall(head(TEXT, length=len(text)) + text)
        yield client


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    try:
        while more := client.recv(1 << 20):
            data += more
    except ConnectionError:
        pass
    return data


def limited(service: Service, *, max_bytes: int = 1 << 30, timeout_s: float = 600.0) -> Service:
    service.unread = UnreadAnswers(max_bytes=max_bytes, timeout_s=timeout_s, stalled_s=0.2)
    return service


def outcomes(service: Service, outcome: str) -> float:
    return metric(service.metrics.snapshot(), "intserve_requests_total", outcome=outcome)


@pytest.mark.heavy
def test_a_client_that_does_not_read_holds_up_nobody_and_is_ended_when_memory_runs_out() -> None:
    engine = Talkative(EchoOptions(max_model_len=1 << 20))
    service = limited(make_service(engine), max_bytes=8 << 20)
    largest = 0
    with listening(make_app(service)) as port:
        endless = {"stream": True, "max_tokens": 10**5}
        with asking(port, endless) as client:
            for _ in range(4):  # others flow meanwhile, to their ends
                body = {"model": "echo", "prompt": "x", "max_tokens": 5, "stream": True}
                answer = httpx.post(f"http://127.0.0.1:{port}{TEXT}", json=body, timeout=30)
                assert answer.text.endswith("data: [DONE]\n\n")
                assert answer.text.count("word") == 5 * 20_000
                largest = max(largest, service.unread.num_bytes)
            wait_for(lambda: outcomes(service, "client_too_slow") == 1)
            wait_for(lambda: engine.load().running == 0)  # the engine does not work for nobody
            seen = read_all(client)
    assert not seen.endswith(b"0\r\n\r\n"), "an answer that was cut must not look complete"
    assert b"[DONE]" not in seen
    assert outcomes(service, "ok") == 4
    assert service.unread.num_bytes == 0
    assert metric(service.metrics.snapshot(), "intserve_unread_bytes") == 0


@pytest.mark.heavy
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_nothing_for_long_is_cut_off(stream: bool) -> None:
    engine = Talkative(EchoOptions(max_model_len=1 << 20))
    service = limited(make_service(engine), timeout_s=0.5)
    with listening(make_app(service)) as port:
        asked = {"stream": stream, "max_tokens": 200}  # 20 MB, more than kernels hold
        with asking(port, asked) as client:
            wait_for(lambda: outcomes(service, "client_too_slow") == 1)
            seen = read_all(client)
    assert service.unread.num_bytes == 0
    wait_for(lambda: engine.load().running == 0)
    assert len(seen) < 200 * len(PIECE)


@pytest.mark.heavy
def test_the_stream_with_the_most_unread_bytes_is_ended_and_the_others_stay() -> None:
    engine = Talkative(EchoOptions(max_model_len=1 << 20))
    service = limited(make_service(engine), max_bytes=24 << 20)
    with listening(make_app(service)) as port:
        small = {"stream": True, "max_tokens": 120}  # 12 MB
        with asking(port, small) as patient, asking(port, small | {"max_tokens": 10**5}):
            wait_for(lambda: outcomes(service, "client_too_slow") == 1)
            text = read_chunks(patient)
    assert text.count("word") == 120 * 20_000
    assert text.endswith("data: [DONE]\n\n")
    assert outcomes(service, "client_too_slow") == 1


def read_chunks(client: socket.socket) -> str:
    """The body of a chunked response, which must be complete."""
    with client.makefile("rb") as file:
        while file.readline().strip():
            pass
        body = b""
        while size := int(file.readline(), 16):
            body += file.read(size)
            file.readline()
        return body.decode()


async def test_what_is_unread_is_joined_and_nothing_of_it_is_lost() -> None:
    class Burst(EchoEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            for number in range(3000):
                yield Tokens((number,), f"{number},", (TokenLogprob(number, f"{number},", -1.0),))
            yield Done("length", 5, 3000)

    unread: list[int] = []
    requests = [make_request(name=f"r-{i}") for i in range(2)]
    deadline = asyncio.get_running_loop().time() + 30
    merged = MergedStream(Burst(EchoOptions()), requests, deadline, note_unread=unread.append)
    await asyncio.sleep(0.05)
    assert sum(unread) > 6000 * 300, "logprobs are counted"
    events = [item async for item in merged]
    assert len(events) < 1500
    for index in range(2):
        own = [event for at, event in events if at == index and isinstance(event, Tokens)]
        assert "".join(event.text for event in own) == "".join(f"{n}," for n in range(3000))
        assert [t for event in own for t in event.token_ids] == [*range(3000)]
        assert [p.token_id for event in own for p in event.logprobs] == [*range(3000)]
        assert max(len(event.token_ids) for event in own) <= 64, "a message stays small"
    assert sum(unread) == 0
    merged.close()
    assert sum(unread) == 0


async def test_what_a_request_holds_is_no_longer_counted_once_it_is_closed() -> None:
    class Prompting(EchoEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            yield PromptLogprobs((None, *[TokenLogprob(1, "a", -1.0)] * 1000))
            await asyncio.sleep(60)

    unread: list[int] = []
    deadline = asyncio.get_running_loop().time() + 30
    merged = MergedStream(
        Prompting(EchoOptions()), [make_request()], deadline, note_unread=unread.append
    )
    await merged.open()
    assert sum(unread) > 1000 * 100
    merged.close()
    await asyncio.sleep(0)
    assert sum(unread) == 0


async def test_a_large_part_goes_out_in_slices_and_counts_until_it_is_taken() -> None:
    answers = UnreadAnswers(max_bytes=1 << 20, timeout_s=60.0)
    unread = answers.open_one()
    sent: list[Message] = []
    counted: list[int] = []

    async def send(message: Message) -> None:
        sent.append(message)
        counted.append(answers.num_bytes)

    body = bytes(range(256)) * 1024
    await unread.send(send, body)
    await unread.send(send, b"end", last=True)
    await unread.send(send, b"", last=True)
    assert b"".join(message["body"] for message in sent) == body + b"end"
    assert max(len(message["body"]) for message in sent) == SLICE
    assert [message["more_body"] for message in sent] == [True] * 4 + [False] * 2
    assert counted == [4 * SLICE, 3 * SLICE, 2 * SLICE, SLICE, 3, 0]
    assert answers.num_bytes == 0


async def test_an_answer_that_moves_is_left_alone_whatever_waits() -> None:
    """Two answers over the limit: the larger one moves, and the one that stands still is ended."""
    answers = UnreadAnswers(max_bytes=SLICE, timeout_s=60.0, stalled_s=0.05)
    moving, standing = answers.open_one(), answers.open_one()
    moving.add(10 * SLICE)

    async def slowly(message: Message) -> None:
        await asyncio.sleep(0.005)

    async def never(message: Message) -> None:
        await asyncio.sleep(60)

    stuck = asyncio.create_task(standing.send(never, b"x" * SLICE))
    while not stuck.done():
        await moving.send(slowly, b"y")
    with pytest.raises(ClientTooSlow, match="65536 bytes wait"):
        await stuck
    standing.end()
    await moving.send(slowly, b"y")
    assert answers.num_bytes == 10 * SLICE
    moving.end()
    assert answers.num_bytes == 0


@pytest.mark.parametrize(
    ("path", "stream"), [(TEXT, True), (TEXT, False), ("/v1/chat/completions", False)]
)
async def test_nothing_is_counted_any_more_once_an_answer_is_read(
    path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()
    added: list[int] = []
    count = service.unread.count
    monkeypatch.setattr(service.unread, "count", lambda n: (added.append(n), count(n)))
    body: dict[str, object] = {"model": "echo", "stream": stream, "max_tokens": 3}
    if path == TEXT:
        body |= {"prompt": "hello", "echo": True, "logprobs": 1}
    else:
        body |= {"messages": [{"role": "user", "content": "hello"}], "prompt_logprobs": 1}
    async with client_of(service) as client:
        assert (await client.post(path, json=body)).status_code == 200
    # The prompt's logprobs: while they wait, and in a stream until they are written.
    assert sum(num_bytes > 4 * 300 for num_bytes in added) == (2 if stream else 1)
    assert (service.unread.num_bytes, service.unread.open) == (0, set())

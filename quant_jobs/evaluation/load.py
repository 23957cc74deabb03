"""Latency and throughput of a running service: short closed loops of streamed completions.

`concurrency` clients each send the next prompt when their last has ended. Prompts are different
pieces of the reference's text where it has enough, and each request has a `cache_salt` of its own
where the service takes one, so that no cache of prompts helps; generation is greedy and ignores the
end token, so that every request generates the same number. One request per client comes first and
is not counted. This is no load test: it says how fast the service is when nobody else asks, and
`Served.on_loopback` whether client and server shared a machine.
"""

from __future__ import annotations

import ipaddress
import itertools
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import httpx

from deepseek import untrusted
from deepseek.cli import make_progress
from deepseek.errors import ServiceError
from deepseek.untrusted import UnusableFileError
from quant_jobs.evaluation.event_loop import together
from quant_jobs.evaluation.reference import Reference
from quant_jobs.evaluation.served import Identity, LoadPoint
from quant_jobs.evaluation.service_client import RefusedError, ServiceClient

CONCURRENCIES = (1, 4)
#: Requests of each client that are counted.
ROUNDS = 4
PROMPT_TOKENS = 32
#: One event of a stream: a token, its text and what surrounds them.
_MAX_EVENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one request: seconds to its first token, from that to its last, and how many they are."""

    ttft_s: float
    decode_s: float
    generated: int


async def measure_load(
    client: ServiceClient,
    identity: Identity,
    reference: Reference,
    generated: int,
    concurrencies: Sequence[int] = CONCURRENCIES,
) -> tuple[LoadPoint, ...]:
    """One point per concurrency, `generated` tokens per request; none where that is 0.

    Raises:
        ServiceError: the service refuses, or streams something else than completions.
    """
    if not generated:
        return ()
    prompts = _prompts(reference)
    asker = _Asker(client, identity, generated)
    points = []
    with make_progress() as progress:
        task = progress.add_task("load", total=sum(concurrencies) * (ROUNDS + 1))

        async def one(rounds: int) -> list[Timing]:
            timings = []
            for _ in range(rounds):
                timings.append(await asker.complete(next(prompts)))
                progress.advance(task)
            return timings

        for concurrency in concurrencies:
            await together(one(1) for _ in range(concurrency))
            retries, started_s = client.retries, time.perf_counter()
            timed = await together(one(ROUNDS) for _ in range(concurrency))
            seconds = time.perf_counter() - started_s
            timings = [timing for timings in timed for timing in timings]
            points.append(_point(concurrency, timings, seconds, client.retries - retries))
    return tuple(points)


def is_loopback(url: str) -> bool:
    """Whether an address leads back to this machine without a network."""
    host = httpx.URL(url).host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _prompts(reference: Reference) -> Iterator[list[int]]:
    """Pieces of the text, in turn: of PROMPT_TOKENS, or of what a short block has."""
    length = min(PROMPT_TOKENS, reference.ids.shape[1])
    pieces = reference.ids[:, : reference.ids.shape[1] // length * length].reshape(-1, length)
    return itertools.cycle(pieces.tolist())


class _Asker:
    """Asks a service for completions that share no prefix with any other."""

    def __init__(self, client: ServiceClient, identity: Identity, generated: int) -> None:
        self._client = client
        self._identity = identity
        self._generated = generated
        self._takes_salts = True

    async def complete(self, prompt: list[int]) -> Timing:
        """Raises:
        ServiceError: see `measure_load`.
        """
        if self._takes_salts:
            try:
                return await self._stream(prompt, {"cache_salt": secrets.token_hex(16)})
            except RefusedError as error:
                if error.status not in (400, 422):
                    raise
                self._takes_salts = False  # seen before anything is counted
        try:
            return await self._stream(prompt, {})
        except RefusedError as error:
            if error.status not in (400, 422):
                raise
            raise ServiceError(
                f"{self._client.url} refuses to stream {self._generated} tokens ({error.status}: "
                f"{error.reason}); measure no speed with --decode-tokens 0"
            ) from error

    async def _stream(self, prompt: list[int], salt: dict[str, str]) -> Timing:
        body = {
            "model": self._identity.model,
            "prompt": prompt,
            "max_tokens": self._generated,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **salt,
        }
        sent_s = time.perf_counter()

        async def read(response: httpx.Response) -> Timing:
            return await _read_stream(self._client.url, response, sent_s)

        return await self._client.ask("POST", "/v1/completions", body, read)


async def _read_stream(url: str, response: httpx.Response, sent_s: float) -> Timing:
    """Time the events of a stream (server-sent events, one JSON object each)."""
    first_s = last_s = 0.0
    generated = 0
    async for line in _lines(url, response):
        if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
            continue
        try:
            event = untrusted.parse_json_object(data)
        except UnusableFileError as error:
            raise ServiceError(f"{url} streams what {error}; see its log") from error
        if "error" in event:
            shown = untrusted.show(event["error"])
            raise ServiceError(f"{url} failed in a stream ({shown}); see its log, then run again")
        if event.get("choices"):
            last_s = time.perf_counter()
            first_s = first_s or last_s
        usage = event.get("usage")
        if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
            generated = usage["completion_tokens"]
    if not first_s or generated < 1:
        raise ServiceError(
            f"{url} ended a stream without tokens and their number (usage); measure no speed with "
            "--decode-tokens 0"
        )
    return Timing(first_s - sent_s, last_s - first_s, generated)


async def _lines(url: str, response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a body, each bounded."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > _MAX_EVENT_BYTES:
            raise ServiceError(f"{url} streams a line of more than {_MAX_EVENT_BYTES} bytes")


def _point(concurrency: int, timings: list[Timing], seconds: float, retries: int) -> LoadPoint:
    ttft = [timing.ttft_s for timing in timings]
    tpot = [t.decode_s / (t.generated - 1) for t in timings if t.generated > 1]
    generated = sum(timing.generated for timing in timings)
    return LoadPoint(
        concurrency=concurrency,
        requests=len(timings),
        generated_tokens=generated,
        retries=retries,
        seconds=seconds,
        ttft_p50_s=median(ttft),
        ttft_p99_s=_p99(ttft),
        tpot_p50_s=median(tpot) if tpot else None,
        tpot_p99_s=_p99(tpot) if tpot else None,
        tokens_per_s=generated / seconds,
    )


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]

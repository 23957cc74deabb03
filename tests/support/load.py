"""A lean client of streamed completions, for load: raw HTTP/1.1 on asyncio, one connection each.

A general client costs more CPU per event than the service that it measures, on the same cores. This
one reads bytes, notes when they came, and looks into them when the answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class Outcome:
    """One request. Seconds are from its start; `first_s` is None where no token came. `cut` says
    that the connection ended before the answer did."""

    status: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    retry_after_s: float | None = None
    cut: bool = False
    started: float = 0.0
    #: When each piece of the stream arrived, seconds from the start.
    arrivals: list[float] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finish_reason is not None and self.error is None


async def complete(
    url: str,
    body: dict[str, Any],
    *,
    key: str | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Outcome:
    """POST `body` to URL/v1/completions, streamed. A refusal, an error in the stream and a cut
    connection are outcomes."""
    outcome = Outcome(started=time.time())
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            raw = await _exchange(url, body, key, headers or {}, outcome, began)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        outcome.cut = True
        outcome.error = outcome.error or {"code": type(error).__name__}
        raw = b""
    outcome.total_s = time.perf_counter() - began
    if raw:
        _read(raw, outcome)
    return outcome


async def _exchange(
    url: str,
    body: dict[str, Any],
    key: str | None,
    headers: dict[str, str],
    outcome: Outcome,
    began: float,
) -> bytes:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
    try:
        content = json.dumps({"stream": True, **body}).encode()
        lines = [
            f"POST {parts.path}/v1/completions HTTP/1.1",
            f"host: {parts.netloc}",
            "content-type: application/json",
            f"content-length: {len(content)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if key is not None:
            lines.append(f"authorization: Bearer {key}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        outcome.status = int(head.split(" ", 2)[1])
        fields = dict(
            line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line
        )
        if "retry-after" in fields:
            outcome.retry_after_s = float(fields["retry-after"])
        pieces: list[bytes] = []
        while piece := await reader.read(1 << 20):
            now = time.perf_counter() - began
            if outcome.first_s is None and outcome.status == 200:
                outcome.first_s = now
            outcome.arrivals.append(now)
            pieces.append(piece)
        raw = b"".join(pieces)
        return _dechunked(raw, outcome) if "chunked" in fields.get("transfer-encoding", "") else raw
    finally:
        writer.close()


def _dechunked(raw: bytes, outcome: Outcome) -> bytes:
    content, at = bytearray(), 0
    while True:
        end = raw.find(b"\r\n", at)
        if end < 0:
            outcome.cut = True
            return bytes(content)
        size = int(raw[at:end] or b"0", 16)
        if size == 0:
            return bytes(content)
        content += raw[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


def _read(raw: bytes, outcome: Outcome) -> None:
    if outcome.status != 200:
        try:
            outcome.error = json.loads(raw)["error"]
        except (ValueError, KeyError, TypeError):
            outcome.error = {"code": "unreadable", "message": raw[:200].decode("latin-1")}
        return
    text, ended = [], False
    for frame in raw.split(b"\n\n"):
        if not frame.startswith(b"data: "):
            continue
        if frame == b"data: [DONE]":
            ended = True
            continue
        payload = json.loads(frame[6:])
        if "error" in payload:
            outcome.error = payload["error"]
            continue
        outcome.usage = payload.get("usage") or outcome.usage
        for choice in payload["choices"]:
            text.append(choice.get("text") or "")
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
    outcome.text = "".join(text)
    outcome.tokens = (outcome.usage or {}).get("completion_tokens", 0)
    outcome.cut = outcome.cut or not (ended or outcome.error)

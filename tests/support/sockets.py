"""The HTTP API behind a real server in this process, and requests that are written byte by byte."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp
from support.ports import free_port


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """Serve an application, as Serve's proxy does; gives the port."""
    port = free_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, lifespan="off", access_log=False, log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class RawAnswer:
    """`headers` by lower-case name; `body` as it came."""

    status: int
    headers: dict[str, str]
    body: bytes


class Raw:
    """One connection."""

    def __init__(self, port: int, data: bytes = b"") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        #: Bytes that the kernel has taken.
        self.sent = 0
        self.send(data)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)
        self.sent += len(data)

    def answer(self) -> RawAnswer:
        """Read one response that has a Content-Length, or none."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", "0")):
            body += self._more()
        return RawAnswer(int(first.split()[1]), headers, body)

    def has_answer(self, wait_s: float) -> bool:
        """Whether something has arrived, or does within `wait_s`."""
        return bool(select.select([self._socket], [], [], wait_s)[0])

    def read(self) -> bytes:
        """Something of what has arrived, or arrives; the connection must be open."""
        return self._more()

    def is_closed(self) -> bool:
        """Whether the server closes the connection now, or has; waits for it."""
        try:
            return not self._socket.recv(1)
        except ConnectionError:
            return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 16)
        assert data, "the server closed the connection"
        return data


def head(
    path: str, *lines: str, method: str = "POST", length: int | None = None, json: bool = True
) -> bytes:
    """The head of a request, with `Content-Length: length` if one is given."""
    wanted = [f"{method} {path} HTTP/1.1", "Host: localhost", *lines]
    if json:
        wanted.append("Content-Type: application/json")
    if length is not None:
        wanted.append(f"Content-Length: {length}")
    return "\r\n".join([*wanted, "", ""]).encode("latin-1")

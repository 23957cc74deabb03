"""The adapter's end of the socket to a worker, on the event loop.

A worker that does not read fills the kernel's buffer; what is sent then waits in this process. That
is a few hundred bytes a request, and such a worker misses its pings and is replaced.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import msgspec

from serve_app.engines.worker.channel import ChannelError, FrameReader, encode
from serve_app.engines.worker.messages import FromWorker


class AdapterChannel(asyncio.Protocol):
    """Calls `received` with every message, and `lost` once, with a reason, at the end."""

    def __init__(self, received: Callable[[FromWorker], None], lost: Callable[[str], None]) -> None:
        self._received = received
        self._lost = lost
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls,
        sock: socket.socket,
        received: Callable[[FromWorker], None],
        lost: Callable[[str], None],
    ) -> AdapterChannel:
        """Take over the connected socket `sock`."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(received, lost), sock=sock)
        return channel

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; after the end it goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def close(self) -> None:
        """Close without a word to `lost`."""
        self._lost = lambda _: None
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._received(message)
        except ChannelError as error:
            lost, self._lost = self._lost, lambda _: None
            lost(f"it sent {error}")
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost("its socket is closed")

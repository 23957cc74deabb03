"""Frames on a connected Unix socket: four bytes of length, little-endian, and one message each.

The worker's end is blocking, because its event loop is not there yet while an engine loads: any
thread may send, one thread receives. The other end of the adapter is in `remote/channel.py`; both
use `encode` and `FrameReader`.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

#: Most bytes of one message; the logprobs of a long prompt are the largest.
MAX_FRAME = 64 << 20
_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()


class ChannelError(Exception):
    """The other side sent what is no message, in one sentence."""


def encode(message: msgspec.Struct) -> bytes:
    """One frame.

    Raises:
        ChannelError: it is larger than `MAX_FRAME`.
    """
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME:
        raise ChannelError(
            f"a {type(message).__name__} of {len(body)} bytes exceeds the {MAX_FRAME} of a frame"
        )
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[T]):
    """Cuts what a socket brings into messages of the types `kinds`, a union."""

    def __init__(self, kinds: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that are complete now.

        Raises:
            ChannelError: a frame is too long or is no message.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._buffer, start)
                if size > MAX_FRAME:
                    raise ChannelError(f"a frame of {size} bytes, more than the {MAX_FRAME}")
                end = start + _LENGTH.size + size
                if len(self._buffer) < end:
                    break
                with memoryview(self._buffer) as view:
                    body = bytes(view[start + _LENGTH.size : end])
                start = end
                try:
                    yield self._decoder.decode(body)
                except msgspec.MsgspecError as error:
                    raise ChannelError(f"a frame that is no message ({error})") from error
        finally:
            del self._buffer[:start]


class WorkerChannel(Generic[T]):
    """The worker's end. `send` may be called by every thread, `receive` by one."""

    def __init__(self, sock: socket.socket, kinds: Any) -> None:
        self._socket = sock
        self._reader: FrameReader[T] = FrameReader(kinds)
        self._lock = threading.Lock()

    def send(self, messages: Iterable[msgspec.Struct], *, within_s: float | None = None) -> None:
        """Send messages in one write; blocks while the adapter does not read, for `within_s`
        seconds if that is given, and nothing can be sent after that.

        Raises:
            OSError: the adapter has gone, or did not read in time.
            ChannelError: a message is too large.
        """
        data = b"".join([encode(message) for message in messages])
        if not self._lock.acquire(timeout=-1 if within_s is None else within_s):
            raise TimeoutError("another thread has been sending all the time")
        try:
            if within_s is not None:
                self._socket.settimeout(within_s)
            self._socket.sendall(data)
        finally:
            self._lock.release()

    def receive(self) -> Iterator[T]:
        """The messages as they come, until the adapter closes its end or has gone.

        Raises:
            ChannelError: the adapter sent what is no message.
        """
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            yield from self._reader.feed(data)

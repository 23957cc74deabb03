"""Hides how long the pieces of a streamed answer are (`stream_options.include_obfuscation`).

Encryption hides what a chunk says and not its length, from which a listener can guess text. A field
of random letters fills every chunk up to a multiple of `BLOCK` bytes. service.py wraps a stream.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

BLOCK = 256

_EMPTY = b',"obfuscation":""'
_END = b"}\n\n"


async def obfuscate(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same server-sent events, each JSON object with one more field; errors and the end mark
    stay as they are."""
    async for chunk in chunks:
        if chunk.endswith(_END) and not chunk.startswith(b'data: {"error"'):
            missing = -(len(chunk) + len(_EMPTY)) % BLOCK
            letters = secrets.token_hex(BLOCK // 2)[:missing].encode()
            chunk = chunk.removesuffix(_END) + _EMPTY[:-1] + letters + b'"' + _END
        yield chunk

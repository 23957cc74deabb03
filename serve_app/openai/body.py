"""Reads the body of a request: bounded, and refused as soon as it is known to be too long."""

from __future__ import annotations

from fastapi import Request

from serve_app.errors import BodyTooLarge


async def read_body(request: Request, limit: int) -> bytes:
    """The body, or BodyTooLarge as soon as it is known to exceed `limit` bytes."""
    refusal = BodyTooLarge(f"the body is over the limit of {limit} bytes; shorten the request")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)

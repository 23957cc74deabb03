"""Errors of requests."""

from __future__ import annotations


class RequestError(RuntimeError):
    """This request failed; the engine lives. Anything else that an iteration raises is its end."""

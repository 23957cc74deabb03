"""Ports of this machine for servers that tests start."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_port() -> int:
    """One that nobody holds just now."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Several, all different."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]

"""Ports of this machine for servers that tests start.

They lie below the range from which the kernel assigns ports and above the ports of Ray's workers.
Each process begins at a port of its own, so two processes that ask at the same moment, as two
workers of pytest-xdist do, do not get the same port.
"""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import ExitStack

FIRST, PORTS_PER_PROCESS, NUM_PROCESSES = 20_000, 40, 300

_ports = itertools.cycle(
    range(
        FIRST + os.getpid() % NUM_PROCESSES * PORTS_PER_PROCESS,
        FIRST + (os.getpid() % NUM_PROCESSES + 1) * PORTS_PER_PROCESS,
    )
)


def free_port() -> int:
    """One that nobody holds just now."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Several, all different.

    Raises:
        OSError: this process's ports are all taken.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        for port in itertools.islice(_ports, PORTS_PER_PROCESS):
            server = stack.enter_context(socket.socket())
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == number:
                return ports
    raise OSError(f"of {PORTS_PER_PROCESS} ports only {len(ports)} are free")

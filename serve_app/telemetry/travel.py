"""What of OpenTelemetry's configuration goes to replicas, and what never does.

Replicas on other nodes do not inherit the environment of the process that deploys. What they need
of it is put into their runtime environment, which Ray writes to its logs, shows in its dashboard
and gives to whoever may ask: so only settings that hold no secret go there, by a closed list.

Headers of the exporter, which authenticate it, lie in a file on each node. Its path goes along:

    telemetry.otlp_headers_file of the configuration, else $INTSERVE_OTLP_HEADERS_FILE

The file has one header per line, `name=value`, the value as it is sent; blank lines and lines that
begin with `#` are skipped. OTEL_EXPORTER_OTLP_HEADERS works in a process that has it in its own
environment, as the workers of a Ray that this process started have.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError, decode_text, read_bytes

log = logging.getLogger(__name__)

#: Names the file of headers, in this process and in its replicas.
HEADERS_FILE = "INTSERVE_OTLP_HEADERS_FILE"

#: Settings that hold no secret. Paths of certificates and keys are not among them: those are files
#: of one node, which its own environment names.
_HARMLESS = frozenset(
    {
        *("OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_LOG_LEVEL"),
        *("OTEL_TRACES_EXPORTER", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"),
        *("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        *("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"),
        *("OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION"),
        *("OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_EXPORT_TIMEOUT"),
        *("OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        *("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_COUNT_LIMIT"),
        *("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        *("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT"),
        *("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT"),
    }
)
#: These go along unless the URL holds a user, a password or a query.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

#: What HTTP allows in a header's name and in its value (RFC 9110), in ASCII.
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t -~]*")
_MAX_BYTES = 64 << 10


def traveling_variables(
    headers_file: Path | None = None,
    *,
    inherited: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """The variables that replicas get in their runtime environment: names and values.

    A variable that stays behind is warned of by its name, in one sentence for all; not where
    `inherited`, because workers of this process's own Ray have its whole environment.
    """
    given = {name: value for name, value in environ.items() if name.startswith("OTEL_") and value}
    travel = {
        name: value
        for name, value in given.items()
        if name in _HARMLESS or (name in _ENDPOINTS and not _holds_secret(value))
    }
    file = str(headers_file) if headers_file is not None else environ.get(HEADERS_FILE)
    if file:
        travel[HEADERS_FILE] = os.path.abspath(file)
    left = sorted(given.keys() - travel.keys())
    if left and not inherited:
        log.warning(
            "%s not sent to replicas, whose environment Ray's logs show: put headers into a file "
            "on each node and name it by otlp_headers_file, and set other variables on the nodes",
            f"{', '.join(left)} {'is' if len(left) == 1 else 'are'}",
        )
    return travel


def read_headers(environ: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The exporter's headers from the file that INTSERVE_OTLP_HEADERS_FILE names; None without it.

    Raises:
        ConfigError: the file cannot be read, everybody may read it, or a line is no header. The
            message names the line and never its content.
    """
    path = environ.get(HEADERS_FILE)
    if not path:
        return None
    try:
        text = decode_text(read_bytes(Path(path), max_bytes=_MAX_BYTES))
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except (OSError, UnusableFileError) as error:
        raise ConfigError(f"the headers of OTLP: {path} {error}") from error
    if mode & 0o007:  # a group may read it: a mounted Secret has the group of the pod
        raise ConfigError(f"everybody can read the headers of OTLP in {path}; chmod 600 {path}")
    headers: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ConfigError(
                f"the headers of OTLP: line {number} of {path} is no name=value with a header's "
                "name and a value of printable ASCII; correct it"
            )
        headers[name.lower()] = value
    return headers


def _holds_secret(url: str) -> bool:
    """Whether a URL may hold one; one that cannot be parsed may."""
    try:
        parts = urlsplit(url)
        return bool("@" in parts.netloc or parts.query or parts.fragment)
    except ValueError:
        return True

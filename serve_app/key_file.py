"""Reads the API keys from a file: one key a line, closed to others.

A file is how keys reach a replica without standing in Serve's configuration, which its dashboard
and `serve status` show. config.py names the file, routing/keys.py and the command line read it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from pydantic import SecretStr

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError, decode_text, open_regular

#: Bytes of a key file: far more keys than a service has.
MAX_KEY_FILE_BYTES = 1 << 20

#: What a client can send after `Bearer`: visible ASCII without spaces (RFC 6750 allows less).
_SENDABLE = re.compile(r"[\x21-\x7e]+")


def is_sendable(key: str) -> bool:
    """Whether an `Authorization` header can carry this key."""
    return _SENDABLE.fullmatch(key) is not None


def read_key_file(path: Path) -> tuple[SecretStr, ...]:
    """The keys of a file, one a line; empty lines and lines that begin with `#` are skipped.

    A message names lines by number and never shows one.

    Raises:
        ConfigError: not a readable file, open to others, no key in it, or a key that no header
            carries.
    """
    try:
        descriptor = open_regular(path)
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            data = os.read(descriptor, MAX_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise UnusableFileError(f"cannot be read ({error.strerror})") from error
        finally:
            os.close(descriptor)
        # A group may read it: that is how Kubernetes mounts a Secret for a user that is not root.
        if mode & (stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP):
            raise UnusableFileError(f"has mode {mode:04o}: others can use it; chmod 600 it")
        if len(data) > MAX_KEY_FILE_BYTES:
            raise UnusableFileError(f"has over {MAX_KEY_FILE_BYTES} bytes; give one key a line")
        keys: list[SecretStr] = []
        for number, line in enumerate(decode_text(data).split("\n"), start=1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if not is_sendable(key):
                raise UnusableFileError(
                    f"holds in line {number} what no header carries; keys are visible ASCII "
                    "without spaces"
                )
            keys.append(SecretStr(key))
        if not keys:
            raise UnusableFileError("holds no key; write one a line")
    except UnusableFileError as error:
        raise ConfigError(f"{path} {error}") from error
    return tuple(keys)

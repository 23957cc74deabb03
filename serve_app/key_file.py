"""Reads the bytes of a file of API keys, which must be closed to others.

A file is how keys reach a replica without standing in Serve's configuration, which its dashboard
and `serve status` show. What the bytes may say is in key_forms.py.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from deepseek.untrusted import UnusableFileError, open_regular

#: Bytes of a key file: far more keys than a service has.
MAX_KEY_FILE_BYTES = 1 << 20

#: What a client can send after `Bearer`: visible ASCII without spaces (RFC 6750 allows less).
_SENDABLE = re.compile(r"[\x21-\x7e]+")


def is_sendable(key: str) -> bool:
    """Whether an `Authorization` header can carry this key."""
    return _SENDABLE.fullmatch(key) is not None


def read_key_bytes(path: Path) -> bytes:
    """The content of a key file.

    Raises:
        UnusableFileError: not a readable file, too large, or open to others.
    """
    descriptor = open_regular(path)
    try:
        # The mode of what is read, whatever the name stands for by now.
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        # A group may read it: that is how Kubernetes mounts a Secret for a user that is not root.
        if mode & (stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP):
            raise UnusableFileError(f"has mode {mode:04o}: others can use it; chmod 600 it")
        data = b""
        while len(data) <= MAX_KEY_FILE_BYTES:
            chunk = os.read(descriptor, MAX_KEY_FILE_BYTES + 1 - len(data))
            if not chunk:
                return data
            data += chunk
    except OSError as error:
        raise UnusableFileError(f"cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    raise UnusableFileError(f"has over {MAX_KEY_FILE_BYTES} bytes; keep only keys in it")

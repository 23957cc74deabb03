"""Which release the double is."""

from __future__ import annotations

import os

VERSIONS = ("1.2.1", "1.3.0rc29")

__version__ = os.environ.get("TRTLLM_DOUBLE_VERSION", VERSIONS[0])
if __version__ not in VERSIONS:
    raise ImportError(f"TRTLLM_DOUBLE_VERSION {__version__!r}: the double is {VERSIONS}")

IS_1_3 = __version__.startswith("1.3")

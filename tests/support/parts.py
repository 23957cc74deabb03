"""Programs of other projects that some tests run for real; `.ci/run` installs their packages.

On a developer's machine a test whose program is missing is skipped. In CI it fails, for there a
skip would go unnoticed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

import pytest

#: Program -> Debian package.
PACKAGES = {"promtool": "prometheus", "chromium": "chromium", "openssl": "openssl"}


def require(program: str, environ: Mapping[str, str] = os.environ) -> str:
    """The path of a program of `PACKAGES`. Without it the test that asks is skipped; it fails where
    CI=true."""
    if path := shutil.which(program, path=environ.get("PATH")):
        return path
    reason = f"{program} is not installed: apt-get install {PACKAGES[program]}"
    if environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)

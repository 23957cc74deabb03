"""Each test starts and ends with the instruction set of the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def chosen_isa() -> Iterator[None]:
    native = pytest.importorskip("deepseek._native", reason="the extension was not built")
    yield
    native.use_isa("")

"""The generated page of docs/ is what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_jobs.cost.pages import PAGE, quantize_page


@pytest.mark.heavy
def test_the_page_is_up_to_date(root: Path) -> None:
    found = (root / "docs" / PAGE).read_text(encoding="utf-8")
    assert found == quantize_page(), "run `python -m quant_jobs.cost.pages docs`"

"""The generated pages of docs/ are what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.pages import PAGES


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_up_to_date(page: str, root: Path) -> None:
    found = (root / "docs" / page).read_text(encoding="utf-8")
    assert found == PAGES[page](), "run `python -m cluster.pages docs`"


@pytest.mark.heavy
def test_the_plan_in_the_readme_is_the_one_that_is_printed(root: Path) -> None:
    """Each line of a plan that the README shows is printed by the command it names."""
    from typer.testing import CliRunner

    from cluster.__main__ import app

    readme = (root / "README.md").read_text(encoding="utf-8")
    words = "plan --model deepseek-v3 --recipe int4 --hardware 8xH800-80GB"
    assert f"python -m cluster {words}" in readme
    printed = CliRunner().invoke(app, words.split()).stdout
    shown = [line for line in readme.splitlines() if line.startswith(("│", "┃", "Fits:"))]
    for line in shown:
        assert line in printed

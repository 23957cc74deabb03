"""The generated pages of docs/ are what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.pages import PAGES, readme_with_table
from cluster.readme_table import WHAT
from deepseek.recipe import builtin_recipes


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_up_to_date(page: str, root: Path) -> None:
    found = (root / "docs" / page).read_text(encoding="utf-8")
    assert found == PAGES[page](), "run `python -m cluster.pages docs`"


@pytest.mark.heavy
def test_the_table_in_the_readme_is_the_matrix_s_and_the_plan_s(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert readme == readme_with_table(readme), "run `python -m cluster.pages docs`"
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    other = readme.replace(rows[0], rows[0].replace("read", "executed"))
    assert readme_with_table(other) == readme


def test_the_table_names_every_built_in_recipe() -> None:
    assert {name for names in WHAT for name in names} == set(builtin_recipes())


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

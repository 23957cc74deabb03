"""What a missing program of another project means for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.browser import open_page
from support.parts import PACKAGES, require


def test_a_program_that_is_there_is_given_by_its_path(tmp_path: Path) -> None:
    program = tmp_path / "promtool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert require("promtool", {"PATH": str(tmp_path), "CI": "true"}) == str(program)


def test_a_missing_program_is_a_skip_here_and_a_failure_in_ci(tmp_path: Path) -> None:
    reason = "^promtool is not installed: apt-get install prometheus$"
    with pytest.raises(pytest.skip.Exception, match=reason):
        require("promtool", {"PATH": str(tmp_path)})
    with pytest.raises(pytest.fail.Exception, match=reason):
        require("promtool", {"PATH": str(tmp_path), "CI": "true"})


def test_ci_installs_every_package(root: Path) -> None:
    words = (root / ".ci" / "run").read_text(encoding="utf-8").split()
    assert set(PACKAGES.values()) <= set(words)


@pytest.mark.browser
def test_the_browser_tells_of_a_script_that_fails(tmp_path: Path) -> None:
    """Else no page would ever fail for its console."""
    page = tmp_path / "page.html"
    page.write_text("<p>before</p><script>console.log('said'); absent();</script>")
    opened = open_page(page, tmp_path / "profile")
    assert "<p>before</p>" in opened.dom
    assert opened.console == ["said", "Uncaught ReferenceError: absent is not defined"]

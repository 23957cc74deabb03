"""The job's report as a browser shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.browser import open_page
from support.pages import Page
from support.quantizing import make_small_model, small_recipe

from quant_jobs.quantize import run_quantize


@pytest.mark.browser
def test_a_browser_opens_the_job_report_with_every_plot_and_nothing_in_its_console(
    tmp_path: Path,
) -> None:
    small = make_small_model(tmp_path)
    output = tmp_path / "out"
    run_quantize(small.directory, small_recipe("int8"), small.text, output, 0, lambda event: None)
    written = output / "job_report.html"
    opened = open_page(written, tmp_path / "profile")
    assert opened.console == []
    shown, file = Page(opened.dom), Page(written.read_text(encoding="utf-8"))
    assert shown.figures == file.figures != []
    assert "".join(shown.text).split() == "".join(file.text).split()

"""The report: self-contained, complete, and about this engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.chain import Chain
from support.pages import Page, check_self_contained

from deepseek.artifact.built_engine import read_engine
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.record import read_evaluation
from quant_jobs.evaluation.tokens import read_tokens
from quant_jobs.gate import run_gate
from quant_jobs.report import run_report
from quant_jobs.reports.engine_page import draw_figures, render
from quant_jobs.reports.findings import Report


@pytest.fixture(scope="module")
def written(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Report, Path]:
    """The chain with a verdict, its report, and the page."""
    root = tmp_path_factory.mktemp("report")
    judged = replace(chain, engine=root / "engine")
    shutil.copytree(chain.engine, judged.engine)
    run_gate(judged.engine, judged.evaluation)
    output = root / "pages" / "report.html"
    report = run_report(judged.engine, judged.evaluation, output, checkpoint=judged.checkpoint)
    return judged, report, output


def test_the_page_is_whole_and_fetches_nothing(written: tuple[Chain, Report, Path]) -> None:
    check_self_contained(written[2].read_text(encoding="utf-8"))


def test_the_page_shows_what_was_measured(written: tuple[Chain, Report, Path]) -> None:
    chain, report, output = written
    page, result = Page(output.read_text("utf-8")), read_evaluation(chain.evaluation)
    assert set(page.figures) >= {"kl", "blocks", "sizes"}
    text = " ".join(page.text)
    assert f"{result.perplexity_ratio.value:.5f}" in text
    assert f"{result.kl.mean.value:.5f}" in text
    assert result.engine_digest in text
    assert str(result.artifact_digest) in text
    assert {"PASS", "FAIL"} & set(text.split()) == {report.verdict.upper()}
    assert len(report.worst_tokens) == 12
    worst = [token.kl for token in report.worst_tokens]
    assert worst[0] == pytest.approx(result.kl.max, rel=1e-6)
    assert worst == sorted(worst, reverse=True)


def test_the_json_beside_it_validates_and_says_the_same(
    written: tuple[Chain, Report, Path],
) -> None:
    _, report, output = written
    text = output.with_suffix(".json").read_text(encoding="utf-8")
    assert Report.model_validate_json(text) == report


def test_rules_count_each_linear_once(written: tuple[Chain, Report, Path]) -> None:
    # 4 layers x 5 attention linears, 3 of the dense MLP, 3 x (16 routed + 1 shared) x 3.
    _, report, _ = written
    assert sum(rule.linears for rule in report.rules) == 4 * 5 + 3 + 3 * 17 * 3


def test_an_engine_that_was_not_judged_says_so(fresh: Chain, tmp_path: Path) -> None:
    report = run_report(fresh.engine, fresh.evaluation, tmp_path / "r.html")
    assert report.verdict == "open"
    assert "NOT JUDGED" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_text_of_the_data_cannot_become_markup(written: tuple[Chain, Report, Path]) -> None:
    chain, report, _ = written
    hostile = report.worst_tokens[0].model_copy(update={"text": "<script>alert(1)</script>"})
    report = report.model_copy(update={"worst_tokens": (hostile,)})
    manifest = read_engine(chain.engine).manifest
    html = render(
        report, draw_figures(report, manifest, read_tokens(chain.evaluation, report.evaluation))
    )
    assert Page(html).tags["script"] == 0
    assert "&lt;script&gt;" in html


def test_a_report_never_mixes_runs(fresh: Chain, tmp_path: Path) -> None:
    run_gate(fresh.engine, fresh.evaluation)
    path = fresh.evaluation / "evaluation.json"
    result = read_evaluation(fresh.evaluation)
    other_kl = result.kl.model_copy(
        update={"mean": result.kl.mean.model_copy(update={"value": 0.5})}
    )
    path.write_text(result.model_copy(update={"kl": other_kl}).model_dump_json())
    with pytest.raises(ArtifactError, match="judges another evaluation"):
        run_report(fresh.engine, fresh.evaluation, tmp_path / "r.html")
    path.write_text(result.model_copy(update={"engine_digest": "0" * 64}).model_dump_json())
    with pytest.raises(ArtifactError, match="evaluation of another engine"):
        run_report(fresh.engine, fresh.evaluation, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()

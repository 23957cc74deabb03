"""Pages whose every name, text and sentence tries to be markup, a script, a formula or a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.browser import open_page
from support.hostile import NAME
from support.pages import Page, check_self_contained

from deepseek.artifact.manifest import Fallback
from deepseek.text import visible
from quant_jobs.evaluation.record import (
    DecodeSpeed,
    Divergence,
    Estimate,
    Evaluation,
    GroupBytes,
    HeldOut,
)
from quant_jobs.reports import engine_page, job_page
from quant_jobs.reports.figures import draw, label
from quant_jobs.reports.findings import Check, FallbackRow, Report, RuleRow, WorstToken
from quant_jobs.reports.job_record import (
    CalibrationAccount,
    JobRecord,
    LayerAccount,
    SourceAccount,
    WorkerAccount,
)

#: What the page of a harmless name is compared with.
PLAIN = "name"
#: A longer label leaves room for fewer ticks: how many of these there are is not compared.
OF_PLOTS = ("g", "path", "text", "use")


def job(name: str) -> str:
    """The page of a job with `name` for whatever is not ours."""
    module = f"model.layers.0.self_attn.{name}"
    source = SourceAccount(name=name, weight=1.0, blocks=1, tokens=10, sha256=name)
    layers: list[dict[str, Any]] = [
        {"layer": 0, "errors": {module: 0.1}, "coverage": ()},
        {"layer": 1, "errors": {f"model.layers.1.mlp.experts.0.{name}": 0.2}, "coverage": (3, 40)},
    ]
    record = JobRecord(
        recipe=name,
        model=name,
        num_workers=1,
        num_nodes=1,
        started_at_layer=0,
        workers_lost=1,
        wall_s=3.0,
        floor_tokens=16,
        calibration=CalibrationAccount(
            num_tokens=10, num_blocks=1, block_tokens=10, digest=name, sources=(source,)
        ),
        layers=tuple(
            LayerAccount(seconds={name: 1.0, "write": 1.0}, num_bytes=1, source_bytes=2, **layer)
            for layer in layers
        ),
        workers=(
            WorkerAccount(
                index=0, node=name, pid=1, seconds={name: 2.0}, peak_rss_bytes=1, bytes_read=1,
                bytes_written=1,
            ),
        ),
        driver_peak_rss_bytes=1,
        driver_bytes_read=1,
        driver_bytes_written=1,
        fallbacks=(Fallback(kind=name, layer=0, module=name, count=1, detail=name),),
    )  # fmt: skip
    return job_page.render(record)


def engine(name: str) -> str:
    """The page of an engine with `name` for whatever is not ours."""
    value = Estimate(value=1.0, standard_error=0.1, low=0.9, high=1.1)
    evaluation = Evaluation(
        engine_digest=name,
        artifact_digest=name,
        recipe=name,
        target="embedded",
        arithmetic="embedded",
        executed_by="embedded",
        kv_cache="int8",
        reference_fingerprint=name,
        data=HeldOut(digest=name, num_blocks=2, block_tokens=10),
        perplexity=3.0,
        source_perplexity=3.0,
        perplexity_ratio=value,
        kl=Divergence(mean=value, p50=0.1, p90=0.2, p99=0.3, max=0.4),
        top1=value,
        sizes=(
            GroupBytes(
                group="attention", parameters=1, bf16_bytes=2, source_bytes=1, artifact_bytes=1
            ),
        ),
        artifact_bytes=1,
        engine_bytes=1,
        speed=(
            DecodeSpeed(
                batch_size=1, tokens_per_s=1.0, source_tokens_per_s=1.0, runs=(1.0,),
                source_runs=(1.0,),
            ),
        ),
        tokens_sha256=name,
        tools={name: name},
    )  # fmt: skip
    token = WorstToken(
        block=0, position=1, before=name, text=name, kl=0.1, source_nll=1.0, quantized_nll=1.0
    )
    rule = RuleRow(match=name, format=name, activations=name, algorithm=name, linears=1)
    report = Report(
        title=name,
        description=name,
        verdict="fail",
        reasons=(name,),
        checks=(Check(name=name, measured=name, interval=name, limit=name, kept=False),),
        coverage={1: (3, 40)},
        coverage_note=name,
        errors={f"model.layers.0.self_attn.{name}": 0.1},
        worst_tokens=(token,),
        rules=(rule,),
        fallbacks=(FallbackRow(kind=name, layer=name, module=name, count=1, detail=name),),
        provenance={name: name},
        evaluation=evaluation,
    )
    import torch

    figures = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    tokens = {"kl": figures, "source_nll": figures, "quantized_nll": figures + 0.1}
    return engine_page.render(report, engine_page.draw_figures(report, None, tokens))


@pytest.mark.heavy
@pytest.mark.parametrize("make", [job, engine])
def test_no_element_and_no_attribute_of_a_page_comes_from_data(make: Any) -> None:
    hostile, plain = check_self_contained(make(NAME)), check_self_contained(make(PLAIN))
    assert hostile.attributes.keys() == plain.attributes.keys()
    for tag in hostile.tags | plain.tags:
        if tag not in OF_PLOTS:
            assert hostile.tags[tag] == plain.tags[tag], tag
    assert not any(name.startswith("on") for _, name in hostile.attributes)
    # The names are there all the same, as text that shows what it is.
    text = "".join(hostile.text)
    assert visible(NAME, keep="\n\t") in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.heavy
def test_a_label_of_a_plot_is_text_in_one_line_and_begins_no_formula() -> None:
    def title(text: str) -> Page:
        return Page(draw("x", 2.0, 1.0, lambda axes: axes.set_title(label(text))))

    plain = title(PLAIN)
    for text in (NAME, r"$\frac{$", "$x$", r"\$x$", "a -- b --> c", "font: 1px 'x", 'id="y"'):
        drawn = title(text)
        assert drawn.tags == plain.tags
        assert drawn.attributes == plain.attributes
        assert drawn.ids.keys() == plain.ids.keys()
    assert "$x$" in "".join(title("$x$").text)
    assert 'id="y"' in "".join(title('id="y"').text)
    # What a label is protected from:
    with pytest.raises(ValueError, match="frac"):
        draw("x", 2.0, 1.0, lambda axes: axes.set_title(r"$\frac{$"))


@pytest.mark.browser
@pytest.mark.parametrize("make", [job, engine])
def test_no_script_of_a_name_runs_in_a_browser(make: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(make(NAME), encoding="utf-8")
    opened = open_page(page, tmp_path / "profile")
    assert opened.console == []
    shown, file = Page(opened.dom), Page(page.read_text(encoding="utf-8"))
    assert shown.tags["script"] == shown.tags["img"] == 0
    assert shown.figures == file.figures != []

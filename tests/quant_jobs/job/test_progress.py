"""The bar of a job counts what is published, once, and the ETA only what this run does."""

from __future__ import annotations

import pytest

from deepseek.artifact.manifest import LayerKey, LayerRecord
from quant_jobs.job.folder import PublishedFile
from quant_jobs.job.progress import Event, Pace, TerminalProgress


def published(layer: LayerKey) -> Event:
    record = LayerRecord(
        layer=layer,
        file="f",
        num_bytes=1_000_000,
        sha256="",
        header_sha256="",
        source_sha256="",
        tensors={},
    )
    return Event("published", layer, PublishedFile(record=record))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_eta_counts_layers_of_this_run_from_the_first_one_on() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(left=5)
    clock.now += 300  # workers start, published layers are carried
    for event in (published("globals"), published(61), Event("carried", 0), Event("carried", 1)):
        pace.note(event)
    assert pace.seconds_left is None
    pace.note(Event("calibrated", 2))
    for layer in (2, 3):
        pace.note(Event("solved", layer))
        clock.now += 60
        pace.note(Event("carried", layer))
        pace.note(published(layer))
    assert pace.seconds_left == 3 * 60
    clock.now += 45
    assert pace.seconds_left == 3 * 60 - 45
    clock.now += 1000  # a layer that takes longer than those before
    assert pace.seconds_left == 0


def test_a_layer_that_is_redone_counts_once() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(left=3)
    for event in (Event("calibrated", 0), Event("solved", 0), Event("lost", 0), Event("solved", 0)):
        clock.now += 10
        pace.note(event)
    pace.note(published(0))
    assert pace.seconds_left == 30 * 2


def test_after_a_resume_the_bar_begins_at_what_is_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TerminalProgress(6) as terminal:
        terminal(Event("started", 1, detail="resuming, 2 layers are left", done=3, left=2))
        terminal(Event("carried", 1))
        terminal(Event("solved", 2))
        terminal(Event("carried", 2))
        terminal(Event("lost", 2, detail="lost workers [0]"))
        terminal(Event("solved", 2))
        terminal(published(2))
    *lines, bar = capsys.readouterr().err.splitlines()
    assert " 4/6 " in bar
    assert [line.partition("] ")[2] or line for line in lines] == [
        "resuming, 2 layers are left",
        "layer 1: published before, its outputs are computed again",
        "lost workers [0]",
        "layer 2: 1.00 MB",
    ]


def test_a_log_gets_lines_and_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(2) as terminal:
        terminal(Event("started", 0, detail="a sentence that is " + "long " * 40, left=1))
        for layer in (0, "globals"):
            terminal(published(layer))  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    assert len(err.splitlines()) == 4

"""Progress of a quantize run: the events that the driver reports, and how a terminal shows them.

The driver calls one function with every event. The command passes `TerminalProgress`, tests pass a
function of their own. Events carry no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepseek.artifact.manifest import LayerKey
from deepseek.cli import make_progress, print_line
from quant_jobs.job.folder import PublishedFile

Step = Literal[
    "started", "calibrated", "solved", "published", "carried", "lost", "joined", "finished"
]


@dataclass(frozen=True, slots=True)
class Event:
    """Step `step` of `layer` is complete.

    `published` is set for the step of that name only. `detail` is a sentence for people, empty for
    most steps.
    """

    step: Step
    layer: LayerKey
    published: PublishedFile | None = None
    detail: str = ""


Progress = Callable[[Event], None]


class TerminalProgress:
    """A progress bar over the layers with an ETA on stderr, and a line per published layer."""

    def __init__(self, num_layers: int) -> None:
        self._bar = make_progress()
        self._task = self._bar.add_task("quantize", total=num_layers)
        self._started = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if event.detail:
            print_line(self._bar.console, event.detail)
        if event.published is not None:
            seconds = time.monotonic() - self._started
            print_line(self._bar.console, f"[{seconds:6.1f} s] {describe(event.published)}")
            self._bar.advance(self._task)


def describe(file: PublishedFile) -> str:
    """One line about a published file: size, output errors, coverage, fallbacks."""
    record = file.record
    name = "globals" if record.layer == "globals" else f"layer {record.layer}"
    words = [f"{name}: {record.num_bytes / 1e6:.2f} MB"]
    if record.errors:
        worst = max(record.errors, key=lambda module: record.errors[module])
        mean = sum(record.errors.values()) / len(record.errors)
        short = worst.partition(".")[2].partition(".")[2].partition(".")[2]
        words.append(f"output error mean {mean:.4f}, worst {record.errors[worst]:.4f} ({short})")
    if file.coverage:
        words.append(f"tokens per expert {min(file.coverage)}..{max(file.coverage)}")
    if file.fallbacks:
        words.append(f"{sum(entry.count for entry in file.fallbacks)} fallbacks")
    return ", ".join(words)

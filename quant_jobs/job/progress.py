"""Progress of a quantize run: the events that the driver reports, and how a terminal shows them.

The driver calls one function with every event. The command passes `TerminalProgress`, tests pass a
function of their own. Events carry no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.progress import ProgressColumn, Task
from rich.text import Text

from deepseek.artifact.manifest import LayerKey
from deepseek.cli import make_progress, print_line
from quant_jobs.job.folder import PublishedFile

Step = Literal[
    "started",
    "calibrated",
    "solved",
    "published",
    "carried",
    "lost",
    "joined",
    "noted",
    "finished",
]


@dataclass(frozen=True, slots=True)
class Event:
    """Step `step` of `layer` is complete.

    `published` is set for the step of that name only. `detail` is a sentence for people, empty for
    most steps. The step `started` says in `done` how many files earlier runs have published, and in
    `left` how many layers are to be quantized.
    """

    step: Step
    layer: LayerKey
    published: PublishedFile | None = None
    detail: str = ""
    done: int = 0
    left: int = 0


Progress = Callable[[Event], None]


class Pace:
    """When the job will end, from the layers that this run has quantized.

    Layers that an earlier run published, globals and MTP layers count for nothing: they are carried
    or copied in a small part of the time. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: float | None = None  # when the first layer was calibrated
        self._last = 0.0  # when the last layer was published
        self._left = 0
        self._solved: set[LayerKey] = set()
        self._done: set[LayerKey] = set()

    def start(self, left: int) -> None:
        """`left` layers are to be quantized."""
        self._left = left

    def note(self, event: Event) -> None:
        """Take an event into account."""
        if event.step == "calibrated" and self._begun is None:
            self._begun = self._clock()
        elif event.step == "solved":
            self._solved.add(event.layer)
        elif event.step == "published" and event.layer in self._solved:
            self._done.add(event.layer)
            self._last = self._clock()

    def is_of_this_run(self, layer: LayerKey) -> bool:
        """Whether this run has quantized the layer."""
        return layer in self._solved

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last layer is published; None before the first one is."""
        if self._begun is None or not self._done:
            return None
        per_layer = (self._last - self._begun) / len(self._done)
        left = per_layer * (self._left - len(self._done))
        return max(0.0, left - (self._clock() - self._last))


class TerminalProgress:
    """A progress bar over the files with an ETA on stderr, and a line per published file.

    The bar begins at what earlier runs have published; a layer that is redone because workers died
    counts once. Where stderr is no terminal, the lines are written and the bar once, at the end.
    """

    def __init__(self, num_files: int) -> None:
        self._pace = Pace()
        self._bar = make_progress(_Remaining(self._pace))
        self._task = self._bar.add_task("quantize", total=num_files)
        self._published: set[LayerKey] = set()
        self._done_before = 0
        self._started = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if event.step == "started":
            self._done_before = event.done
            self._pace.start(event.left)
        self._pace.note(event)
        if event.detail:
            print_line(self._bar.console, event.detail)
        if event.published is not None:
            self._published.add(event.layer)
            self._print(describe(event.published))
        elif event.step == "carried" and not self._pace.is_of_this_run(event.layer):
            self._print(f"layer {event.layer}: published before, its outputs are computed again")
        self._bar.update(self._task, completed=self._done_before + len(self._published))

    def _print(self, text: str) -> None:
        print_line(self._bar.console, f"[{time.monotonic() - self._started:6.1f} s] {text}")


class _Remaining(ProgressColumn):
    """`h:mm:ss` until the end. rich's own column forgets what is older than 30 s, and layers of a
    large model take longer."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        seconds = self._pace.seconds_left
        if task.finished:
            return Text("0:00:00", style="progress.remaining")
        if seconds is None:
            return Text("-:--:--", style="progress.remaining")
        minutes, second = divmod(round(seconds), 60)
        text = f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
        return Text(text, style="progress.remaining")


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

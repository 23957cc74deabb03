"""Seeded rounds of a quantize job on a cluster of raylets, with kills at random moments.

A round starts `python -m quant_jobs quantize` as a process of its own on `Raylets`, and kills a
raylet, a worker or the driver each time the job has made the progress that its plan names. A killed
driver is started again with the same command; in some rounds a node joins. Progress is counted in
the files that the job has written so far: layers, parts and boundaries.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from support.quantizing import SmallModel, contents, make_small_model
from support.raylets import Raylets
from support.synthetic import write_checkpoint

from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.recipe import Recipe, load_recipe
from quant_jobs.quantize import run_quantize

What = Literal["raylet", "worker", "driver"]

ROOT = Path(__file__).resolve().parents[2]

RECIPES = ("int4-gptq", "int4-awq", "int8-smoothquant")
NUM_WORKERS = 3
#: The share of its files that a job writes before its workers are ready.
LOADING = 0.09
#: Main layers of the model: more than the small model's, so that kills fall into many layers.
NUM_LAYERS = 8
#: A round that takes longer hangs: an undisturbed one takes 15 s on an idle machine.
ROUND_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Kill:
    """`what` is killed `delay_s` after the job has written a share `at` of its files."""

    what: What
    at: float
    delay_s: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A kill that took place while the job was at work. `moment` is for people."""

    what: What
    moment: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens in one round. A node joins `rejoin_s` after a raylet was killed, if at all."""

    seed: int
    recipe: str
    kills: tuple[Kill, ...]
    rejoin_s: float | None


@dataclass(slots=True)
class Outcome:
    """How a round went. `printed` is the last driver's stdout; `lost` counts its and its
    predecessors' lines about lost workers."""

    plan: Plan
    identical: bool = False
    seconds: float = 0.0
    hits: list[Hit] = field(default_factory=list)
    joined: int = 0
    lost: int = 0
    printed: str = ""


def plan_round(seed: int) -> Plan:
    """One to three kills, spread over the whole job; the recipes take turns."""
    random_ = random.Random(seed)
    kills = []
    for number in range(random_.choice((1, 2, 2, 3))):
        what: What = random_.choice(("raylet", "worker", "driver"))
        # The first one early enough to find the job at work for certain.
        at = random_.uniform(0.0, 0.9 if number else 0.7)
        # While the workers load their libraries no file appears for seconds.
        delay = random_.uniform(0.0, 8.0 if at < LOADING else 0.3)
        kills.append(Kill(what, at, delay))
    rejoin_s = random_.choice((None, random_.uniform(0.0, 10.0)))
    kills.sort(key=lambda kill: kill.at)
    return Plan(seed, RECIPES[seed % len(RECIPES)], tuple(kills), rejoin_s)


def make_deep_model(root: Path) -> SmallModel:
    """The small model with more layers."""
    small = make_small_model(root / "small")
    write_checkpoint(root / "deep", layers=NUM_LAYERS, experts=8)
    (root / "deep" / "tokenizer.json").write_bytes(
        (small.directory / "tokenizer.json").read_bytes()
    )
    return SmallModel(root / "deep", small.text)


def recipe_of(name: str) -> Recipe:
    """A built-in recipe on 12 blocks of 48 tokens."""
    content = load_recipe(name).model_dump(mode="json")
    return Recipe.model_validate(content | {"calibration": {"num_blocks": 12, "block_tokens": 48}})


def reference(model: SmallModel, recipe: Recipe, output: Path) -> dict[str, bytes]:
    """The contents of the output of an undisturbed run of one worker, in this process."""
    run_quantize(model.directory, recipe, model.text, output, 0, lambda event: None)
    return contents(output)


class Round:
    """One job on a cluster, with what happens to it. `num_marks` is the number of files that an
    undisturbed job brings forth, where `Kill.at` counts from."""

    def __init__(
        self,
        cluster: Raylets,
        model: SmallModel,
        plan: Plan,
        folder: Path,
        num_marks: int,
        workers: int = NUM_WORKERS,
    ) -> None:
        self._cluster, self._plan, self._num_marks = cluster, plan, num_marks
        self._random = random.Random(plan.seed)
        folder.mkdir()
        self.output, self._log = folder / "out", folder / "driver.log"
        self._printed = folder / "driver.out"
        self._command = command(model, write_recipe(plan.recipe, folder), self.output, workers)
        self._marks: set[Path] = set()
        self._driver: subprocess.Popen[bytes] | None = None
        self._due: list[tuple[float, Kill]] = []
        self._joins: list[float] = []
        self._outcome = Outcome(plan)

    def run(self, expected: Mapping[str, bytes]) -> Outcome:
        """To the end of the job, and its output held against `expected`.

        Raises:
            AssertionError: the job failed or hangs, with its log.
        """
        outcome, todo = self._outcome, list(self._plan.kills)
        self._began = time.monotonic()
        self._start()
        try:
            while (code := self._poll()) is None:
                now = time.monotonic()
                assert now < self._began + ROUND_TIMEOUT_S, f"hangs; {self.report()}"
                self._look()
                while todo and len(self._marks) >= todo[0].at * self._num_marks:
                    kill = todo.pop(0)
                    self._due.append((now + kill.delay_s, kill))
                for moment, kill in list(self._due):
                    if now >= moment and self._kill(kill.what):
                        self._due.remove((moment, kill))
                self._join(now)
                time.sleep(0.01)
        finally:
            self._end()
        assert code == 0, f"exit code {code}; {self.report()}"
        outcome.seconds = time.monotonic() - self._began
        outcome.lost = self._log.read_text().count("lost workers")
        outcome.printed = self._printed.read_text()
        outcome.identical = contents(self.output) == expected
        return outcome

    @property
    def num_marks(self) -> int:
        """Files that this job has brought forth."""
        return len(self._marks)

    def report(self) -> str:
        """Everything that a reader needs of a round that went wrong."""
        return f"{self._plan}\n{self._outcome.hits}\n{self._log.read_text()}"

    def _start(self) -> None:
        environment = {**os.environ, "RAY_ADDRESS": self._cluster.address}
        with self._log.open("ab") as log, self._printed.open("wb") as printed:
            self._driver = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdout=printed, stderr=log
            )

    def _poll(self) -> int | None:
        assert self._driver is not None
        return self._driver.poll()

    def _look(self) -> None:
        """Note new files. What is gone again in a moment may escape."""
        for pattern in ("model-*", ".job/part-*", ".job/boundary-*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # a boundary that went meanwhile
                self._marks.update(self.output.glob(pattern))

    def _kill(self, what: What) -> bool:
        """Kill it; whether there was one, at a time when the job was still at work."""
        assert self._driver is not None
        if (self.output / MANIFEST_FILE).exists():
            return False
        if what == "raylet":
            if self._cluster.num_nodes < 2:
                return False
            self._cluster.kill_node(self._random.randrange(self._cluster.num_nodes))
            if self._plan.rejoin_s is not None:
                self._joins.append(time.monotonic() + self._plan.rejoin_s)
        elif what == "worker":
            workers = self._cluster.workers()
            if not workers:
                return False
            os.kill(self._random.choice(workers), signal.SIGKILL)
        else:
            if self._driver.poll() is not None:
                return False
            self._driver.kill()
            self._driver.wait()
            self._start()
        seconds = time.monotonic() - self._began
        self._outcome.hits.append(Hit(what, self._moment(), seconds))
        return True

    def _moment(self) -> str:
        published = sum(path.name.startswith("part-") for path in self._marks)
        return f"{len(self._marks)} of {self._num_marks} files, {published} parts"

    def _join(self, now: float) -> None:
        for moment in list(self._joins):
            if now >= moment:
                self._joins.remove(moment)
                self._cluster.add_node()
                self._outcome.joined += 1

    def _end(self) -> None:
        """No driver of this round is left, whatever happened."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()


def write_recipe(name: str, folder: Path) -> Path:
    """`recipe_of` as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(name).model_dump(mode="json")))
    return path


def command(model: SmallModel, recipe: Path, output: Path, workers: int = NUM_WORKERS) -> list[str]:
    return [
        *(sys.executable, "-m", "quant_jobs", "quantize", "--model", str(model.directory)),
        *("--recipe", str(recipe), "--calibration", str(model.text)),
        *("--output", str(output), "--workers", str(workers)),
    ]

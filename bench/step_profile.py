"""Where a step of the native kernels goes, part by part, beside what memory allows.

    python bench/step_profile.py [--recipe int8-head --recipe int4-a8] [--batch 1 --batch 16]
        [--rounds 5] [--threads N] [--small-pages] [--ds3 DIR] [--save FILE.json]

The model is "ds3" (bench/decoding/ds3.py), contexts have 512 tokens, and a prefill is a prompt of
512. The extension's own clock says what each part of a step takes (deepseek/native/model.h); the
rest is Python: scheduling, the step's tables, sampling, text. Milliseconds a step, medians over the
rounds, each the mean of its steps; recipes take turns. The floor is the bytes that the step must
read (bench/decoding/traffic.py), at the bandwidth of plain reads in the same rounds. With
`--small-pages` each recipe takes turns with itself on weights that stay mapped from the file.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.decoding import ds3, rounds, traffic
from bench.decoding.ceilings import Memory
from bench.decoding.ours_worker import Ours
from bench.decoding.report import table
from deepseek.cli import make_app, make_progress, run
from deepseek.engine.native_model import NativeModel
from deepseek.errors import IntServeError

CONTEXT = 512
REST, TOTAL, FLOOR = "Python", "step", "floor"
#: Part -> milliseconds.
Profile = dict[str, float]
app = make_app(__doc__ or "")


class Profiled:
    """An engine of ds3 with `batch` contexts at most."""

    def __init__(
        self, recipe: str, cache: Path, threads: int, batch: int, *, huge_pages: bool
    ) -> None:
        self._ours = Ours()
        opened = self._ours.open(
            str(ds3.engine(recipe, cache)),
            is_engine=True,
            kv_cache=None,
            threads=threads,
            batch=batch,
            context=CONTEXT,
            steps=rounds.steps_of(1),
            huge_pages=huge_pages,
        )
        self._stored = traffic.Stored(**opened["stored"])
        model = self._ours.engine._runner.model
        if not isinstance(model, NativeModel):
            raise IntServeError("the extension deepseek._native was not built; install again")
        self._model = model
        self._ours.fill(rounds.prompts(batch, CONTEXT, ds3.DS3.vocab_size), [batch])

    def decode(self, batch: int) -> Profile:
        steps = rounds.steps_of(batch)
        with self._ours.decoding(batch, steps):
            return self._timed(lambda: [self._ours.engine.step() for _ in range(steps)], steps)

    def prefill(self, seed: int) -> Profile:
        (prompt,) = rounds.prompts(1, CONTEXT, ds3.DS3.vocab_size, seed)
        return self._timed(lambda: self._ours.prefill(prompt), 1)

    def floor_ms(self, batch: int, bandwidth: float) -> float:
        """Of a decode at this batch."""
        size = traffic.step_bytes(
            self._stored,
            batch=batch,
            context=CONTEXT,
            num_experts=ds3.DS3.n_routed_experts,
            per_token=ds3.DS3.num_experts_per_tok,
        )
        return 1e3 * size / bandwidth

    def _timed(self, work: Callable[[], object], steps: int) -> Profile:
        """What `work` takes, by parts, over its steps."""
        before, started = self._model.seconds, time.perf_counter()
        work()
        total, after = time.perf_counter() - started, self._model.seconds
        profile = {part: 1e3 * (after[part] - before[part]) / steps for part in after}
        step = 1e3 * total / steps
        return profile | {REST: step - sum(profile.values()), TOTAL: step}


@app.command(no_args_is_help=False)
def main(
    recipe: Annotated[
        list[str] | None, typer.Option(help="Default: int8-head and int4-a8.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1 and 16.")] = None,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    small_pages: Annotated[
        bool, typer.Option("--small-pages", help="Weights mapped, too.")
    ] = False,
    ds3_cache: Annotated[Path, typer.Option("--ds3", help="Where the model is kept.")] = ds3.CACHE,
    save: Annotated[Path | None, typer.Option(help="Write every number as JSON here.")] = None,
) -> None:
    """See the module's docstring."""
    recipes, batches = recipe or ["int8-head", "int4-a8"], batch or [1, 16]
    threads = threads or len(os.sched_getaffinity(0))
    memory = Memory(threads)
    engines = {
        f"{name}, small pages" if is_small else name: Profiled(
            name, ds3_cache, threads, max(batches), huge_pages=not is_small
        )
        for name in recipes
        for is_small in ([False, True] if small_pages else [False])
    }
    bandwidths: list[float] = []
    profiles: dict[str, list[Profile]] = {}
    with make_progress() as progress:
        task = progress.add_task("", total=(num_rounds + 1) * len(engines) * (len(batches) + 1))
        for number in range(num_rounds + 1):  # the first warms up
            bandwidths.append(memory.bandwidth()[threads])
            for size in (*batches, rounds.PREFILL):
                for name, engine in engines.items():
                    what = f"prefill {CONTEXT}" if size == rounds.PREFILL else f"batch {size}"
                    progress.update(task, description=f"{name}, {what}")
                    profile = (
                        engine.prefill(1000 + number)
                        if size == rounds.PREFILL
                        else engine.decode(size)
                    )
                    if number:
                        profiles.setdefault(f"{name}, {what}", []).append(profile)
                    progress.advance(task)
    bandwidth = statistics.median(bandwidths)
    columns = {
        title: {part: statistics.median(one[part] for one in each) for part in each[0]}
        for title, each in profiles.items()
    }
    for name, engine in engines.items():
        for size in batches:
            columns[f"{name}, batch {size}"][FLOOR] = engine.floor_ms(size, bandwidth)
    parts = [*next(iter(profiles.values()))[0], FLOOR]
    rows = [
        [part, *(f"{column[part]:.2f}" if part in column else "-" for column in columns.values())]
        for part in parts
    ]
    print(f"{threads} threads, memory {bandwidth / 1e9:.1f} GB/s\n")
    print(table(["ms a step", *columns], rows))
    if save is not None:
        save.write_text(json.dumps({"bandwidth": bandwidths, "profiles": profiles}, indent=1))


if __name__ == "__main__":
    run(app)

"""Where a step of the native kernels goes, part by part, beside what memory allows.

    python bench/step_profile.py [--recipe int8-head --recipe int4-a8] [--batch 1 --batch 16]
        [--rounds 5] [--threads N] [--ds3 DIR] [--save FILE.json]

The model is "ds3" (bench/decoding/ds3.py), contexts have 512 tokens, and a prefill is a prompt of
512. The extension's own clock says what each part of a step takes (deepseek/native/model.h); the
rest is Python: scheduling, the step's tables, sampling, text. Milliseconds a step, medians over the
rounds, each the mean of its steps; recipes take turns. The floor is the bytes that the step must
read (bench/decoding/traffic.py), at the bandwidth of plain reads in the same rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.decoding import ds3, rounds, traffic
from bench.decoding.ceilings import Memory
from bench.decoding.report import table
from deepseek.cli import make_app, make_progress, run
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import token_bytes
from deepseek.engine.native_model import NativeModel
from deepseek.engine.request import Request, SamplingParams
from deepseek.kv_layout import kv_layout

CONTEXT = 512
REST, TOTAL, FLOOR = "Python", "step", "floor"
#: Part -> milliseconds.
Profile = dict[str, float]
app = make_app(__doc__ or "")


class Profiled:
    """An engine of ds3 with `batch` contexts at most."""

    def __init__(self, recipe: str, cache: Path, threads: int, batch: int) -> None:
        options = EngineOptions(
            max_batch_size=batch,
            max_batched_tokens=CONTEXT,
            max_kv_tokens=(batch + 1) * 2 * CONTEXT,
            num_threads=threads,
            kernels="native",
        )
        self._engine = LLMEngine.load(ds3.engine(recipe, cache), options)
        model = self._engine._runner.model
        assert isinstance(model, NativeModel)
        self._model = model
        self._number = 0
        identity, config = self._engine.identity, self._engine.config
        layout = kv_layout(identity.arithmetic, identity.kv_cache)  # type: ignore[arg-type]
        row = 2 * config.hidden_size
        self._stored = traffic.of_groups(
            self._engine.allocated_bytes(),
            table=row * config.vocab_size,
            row=row,
            token=token_bytes(config, layout),
        )

    def decode(self, batch: int, steps: int, seed: int) -> Profile:
        names = [
            self._add(prompt, steps + 8)
            for prompt in rounds.prompts(batch, CONTEXT, ds3.DS3.vocab_size, seed)
        ]
        waiting = set(names)
        while waiting:
            waiting -= {out.request_id for out in self._engine.step() if out.token_ids}
        profile = self._steps(steps)
        for name in names:
            self._engine.abort(name)
        while self._engine.has_work:
            self._engine.step()
        return profile

    def prefill(self, seed: int) -> Profile:
        (prompt,) = rounds.prompts(1, CONTEXT, ds3.DS3.vocab_size, seed)
        self._add(prompt, 1)
        return self._steps(1)

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

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        self._number += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        name = str(self._number)
        self._engine.add_request(
            Request(request_id=name, prompt_ids=tuple(prompt), sampling=sampling)
        )
        return name

    def _steps(self, count: int) -> Profile:
        before, started = self._model.seconds, time.perf_counter()
        for _ in range(count):
            self._engine.step()
        total, after = time.perf_counter() - started, self._model.seconds
        profile = {part: 1e3 * (after[part] - before[part]) / count for part in after}
        step = 1e3 * total / count
        return profile | {REST: step - sum(profile.values()), TOTAL: step}


@app.command(no_args_is_help=False)
def main(
    recipe: Annotated[
        list[str] | None, typer.Option(help="Default: int8-head and int4-a8.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1 and 16.")] = None,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    ds3_cache: Annotated[Path, typer.Option("--ds3", help="Where the model is kept.")] = ds3.CACHE,
    save: Annotated[Path | None, typer.Option(help="Write every number as JSON here.")] = None,
) -> None:
    """See the module's docstring."""
    recipes, batches = recipe or ["int8-head", "int4-a8"], batch or [1, 16]
    threads = threads or len(os.sched_getaffinity(0))
    memory = Memory(threads)
    engines = {name: Profiled(name, ds3_cache, threads, max(batches)) for name in recipes}
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
                    seed = 1000 * number + size
                    profile = (
                        engine.prefill(seed)
                        if size == rounds.PREFILL
                        else engine.decode(size, rounds.steps_of(size), seed)
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

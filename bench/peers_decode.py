"""Prefill and decode on one 706 M-parameter model: ours, llama.cpp's and transformers', in one run.

    python bench/peers_decode.py [--rounds 5] [--only REGEX] [--recipe NAME ...] [--threads N]
        [--quick] [--no-growth] [--save FILE.json] [--plot FILE.png]

Every contender loads the model "ds3" (bench/decoding/ds3.py) in a process of its own and computes
64 contexts of 512 tokens once. Then rounds: a prompt of 512 tokens, and decode at batch 1, 4, 16
and 64 over those contexts; for each figure all contenders take turns, and whoever has no turn
sleeps. Every contender has the same number of threads, and picks the likeliest token after each
step.

    ours           BF16, INT8 (recipe `int8`, and `int8-head` with an INT8 head, as q8_0 has), INT4
                   (`int4-all`, and `int4-a8` with INT8 activations and head), through
                   `LLMEngine.step`: scheduling, sampling and text included
    llama.cpp      f16, q8_0, q4_0, through `llama_decode`; compiled from llama-cpp-python's sdist
                   for this machine; KV f16, flash attention, one buffer or one per sequence,
                   whichever is faster at that batch
    transformers   BF16 forward passes with a DynamicCache, up to batch 16

Figures are medians over the rounds, ± half their range; a decode's is the mean of its steps in the
round. The share of the bandwidth ceiling holds the bytes that a step must read, by the engine's own
count of what it holds, against the bandwidth that plain reads reach in the same rounds. Last,
`--growth` (the default) measures how our steps grow with batch and context, by KV format. Prints
Markdown; `--save` writes every number. The first run builds llama.cpp, 10 to 20 minutes of two
cores, into `.cache`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.decoding import ceilings, ds3, growth, llama, plot, report, rounds
from bench.decoding.contenders import (
    RECIPES,
    UNQUANTIZED,
    Contender,
    Load,
    Opened,
    Places,
    contenders,
    open_contender,
    prepare,
)
from deepseek.cli import make_app, make_progress, run
from deepseek.errors import IntServeError

CONTEXT = 512
BATCHES = (1, 4, 16, 64)
#: Ratios that are printed.
PAIRS = (
    ("ours int8", "llama.cpp q8_0"),
    ("ours int8-head", "llama.cpp q8_0"),
    ("ours int4-all", "llama.cpp q4_0"),
    ("ours int4-a8", "llama.cpp q4_0"),
    ("ours bf16", "llama.cpp f16"),
    ("ours int8", "ours bf16"),
    ("ours int8-head", "ours bf16"),
    ("ours int4-all", "ours bf16"),
    ("ours int4-a8", "ours bf16"),
    ("ours bf16", "transformers bf16"),
)
app = make_app(__doc__ or "")


@app.command(no_args_is_help=False)
def main(
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    only: Annotated[str, typer.Option(help="Regular expression: contenders that take part.")] = "",
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"Of ours; default: {', '.join(RECIPES)}.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds, batch 1 and 16.")] = False,
    grow: Annotated[bool, typer.Option("--growth/--no-growth")] = True,
    save: Annotated[Path | None, typer.Option(help="Write all numbers as JSON here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the growth here.")] = None,
    ds3_cache: Annotated[Path, typer.Option("--ds3", help="Where the model is kept.")] = ds3.CACHE,
    llama_cache: Annotated[Path, typer.Option("--llama", help="Where llama.cpp is.")] = llama.CACHE,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once.")] = None,
) -> None:
    """See the module's docstring."""
    threads = threads or len(os.sched_getaffinity(0))
    batches, num_rounds = ((1, 16), min(num_rounds, 2)) if quick else (BATCHES, num_rounds)
    known = contenders(recipe or RECIPES)
    taking_part = [contender for contender in known if re.search(only, contender.name)]
    if not taking_part:
        names = ", ".join(contender.name for contender in known)
        raise IntServeError(f"--only {only!r} leaves no contender of {names}")
    logs = llama_cache.parent / "peers-decode-logs"
    logs.mkdir(parents=True, exist_ok=True)
    places = Places(ds3=ds3_cache, llama=llama_cache, logs=logs)
    _say("making what is not there yet")
    prepare(taking_part, places, jobs)
    measured = _measure(taking_part, places, threads, batches, num_rounds)
    print(f"{_machine()}, {threads} threads\n\n{report.ceilings(measured.ceilings)}\n")
    print(f"{report.rates(measured)}\n\n{report.ratios(measured, PAIRS)}\n")
    print(f"{report.bandwidth(measured)}\n", flush=True)
    points = []
    if grow:
        points = _grow(taking_part, places, threads, quick)
        print(f"{plot.batch_table(points)}\n\n{plot.context_table(points)}")
        if picture is not None:
            plot.draw(points, picture)
    if save is not None:
        save.write_text(json.dumps(_as_json(measured, points), indent=1) + "\n")


def _measure(
    taking_part: list[Contender],
    places: Places,
    threads: int,
    batches: tuple[int, ...],
    num_rounds: int,
) -> report.Run:
    load = Load(threads=threads, batch=max(batches), context=CONTEXT, steps=rounds.steps_of(1))
    contexts = rounds.prompts(max(batches), CONTEXT, ds3.DS3.vocab_size)
    memory = ceilings.Memory(threads)
    bandwidths: list[dict[int, float]] = []
    with ExitStack() as stack, make_progress() as progress:
        task = progress.add_task("loading", total=None)
        field: list[Opened] = []
        for contender in taking_part:
            progress.update(task, description=f"loading {contender.name}")
            opened = open_contender(contender, places, load)
            stack.enter_context(opened.worker)
            field.append(opened)
        for opened in field:
            progress.update(task, description=f"contexts of {opened.contender.name}")
            rounds.fill(opened, batches, contexts)
        total = (num_rounds + 1) * len(list(rounds.turns(field, batches, 0)))
        progress.update(task, total=total)

        def advance(words: str) -> None:
            progress.update(task, description=words)
            progress.advance(task)

        figures = rounds.measure(
            field,
            batches,
            num_rounds,
            context=CONTEXT,
            vocab_size=ds3.DS3.vocab_size,
            advance=advance,
            each_round=lambda: bandwidths.append(memory.bandwidth()),
        )
    return report.Run(
        names=[opened.contender.name for opened in field],
        stored={opened.contender.name: opened.stored for opened in field},
        words={opened.contender.name: "; ".join(opened.words) for opened in field},
        figures=figures,
        batches=batches,
        context=CONTEXT,
        ceilings=ceilings.measure(threads, bandwidths),
        num_experts=ds3.DS3.n_routed_experts,
        per_token=ds3.DS3.num_experts_per_tok,
    )


def _grow(
    taking_part: list[Contender], places: Places, threads: int, quick: bool
) -> list[growth.Point]:
    """INT8 with every KV format, the other models of ours with BF16 pages."""
    models = []
    for contender in taking_part:
        if contender.kind != "ours":
            continue
        is_engine = contender.model != UNQUANTIZED
        cache = places.ds3
        directory = ds3.engine(contender.model, cache) if is_engine else ds3.checkpoint(cache)
        formats = growth.KV_FORMATS if contender.model == "int8" else ("bf16",)
        models += [(contender.model, kv, directory, is_engine) for kv in formats]
    contexts = growth.CONTEXTS[:2] if quick else growth.CONTEXTS
    batches = growth.BATCHES[:4] if quick else growth.BATCHES
    num_rounds = 2 if quick else 3
    with make_progress() as progress:
        calls = growth.num_calls(len(models), contexts, batches, CONTEXT, num_rounds)
        task = progress.add_task("growth", total=calls)

        def advance(words: str) -> None:
            progress.update(task, description=words)
            progress.advance(task)

        return growth.measure(
            models,
            contexts=contexts,
            batches=batches,
            base_context=CONTEXT,
            rounds=num_rounds,
            threads=threads,
            logs=places.logs,
            advance=advance,
        )


def _as_json(measured: report.Run, points: list[growth.Point]) -> dict[str, Any]:
    return {
        "machine": _machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "ceilings": asdict(measured.ceilings),
        "stored": {name: asdict(stored) for name, stored in measured.stored.items()},
        "words": dict(measured.words),
        "seconds": [
            {"contender": name, "batch": batch or "prefill", "rounds": seconds}
            for (name, batch), seconds in measured.figures.seconds.items()
        ],
        "growth": growth.as_json(points),
    }


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")


if __name__ == "__main__":
    run(app)

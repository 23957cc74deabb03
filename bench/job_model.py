"""`quant_jobs estimate` compared with real jobs: bytes, and seconds at this machine's rates.

    python bench/pieces.py --save quant_jobs/cost/pieces.json && python bench/job_model.py [--save]

Quantizes a synthetic model (half of DeepSeek-V3's widths, few experts) with one worker in this
process, without Ray, and predicts the same job from `quant_jobs/cost/pieces.json`, which must have
been measured on this machine. The script fails unless the bytes read agree exactly. Seconds are CPU
seconds of the worker, in the job as in the pieces, so other work on the machine changes them
little; waiting (for Ray, disks, the network) and overlap are therefore not tested. Prints Markdown;
`--save` writes the result into pieces.json, for docs/quantize-671b.md.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from watched import ROOT, TEXT, write_recipe

from deepseek.cli import make_app, run
from deepseek.source.synthetic import Size, synthesize, synthetic_config
from quant_jobs.cost.model import bytes_read, bytes_written, job_time
from quant_jobs.cost.rates import machine_rates
from quant_jobs.cost.work import PIECES, Job, pieces
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.workers.in_process import InProcessWorker

#: Calls of a worker -> the section of the schedule that they belong to.
SECTION = {
    **dict.fromkeys(("trunk", "attend", "observe"), "attend"),
    **dict.fromkeys(
        ("receive", "scale_statistics", "scale_losses", "solve", "folded_norms"), "solve"
    ),
    **dict.fromkeys(("use_solved", "attend_quantized", "run_experts", "combine", "store"), "carry"),
    "write": "write",
}
STEPS = ("read", "attend", "solve", "carry", "write")
app = make_app(__doc__ or "")


class TimedWorker(InProcessWorker):
    """Adds up the CPU seconds of its calls by section, in whatever thread they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(STEPS, 0.0)

    def method(self, name: str) -> Callable[..., Any]:
        call = super().method(name)

        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            result = call(*arguments)
            if name in SECTION:
                self.seconds[SECTION[name]] += time.thread_time() - started
            if name == "begin":
                self._count_reading()
            return result

        return timed

    def _count_reading(self) -> None:
        """Time the thread that reads ahead too; a worker makes it when a job begins."""
        read_ahead = self._worker._read_ahead
        read = read_ahead._read

        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            stored = read(*arguments)
            self.seconds["read"] += time.thread_time() - started
            return stored

        read_ahead._read = timed  # type: ignore[method-assign]


@app.command()
def main(
    recipe: Annotated[list[str] | None, typer.Option(help="Default: four.")] = None,
    layers: Annotated[int, typer.Option(min=2, help="One of them dense.")] = 3,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    num_blocks: Annotated[int, typer.Option(min=1)] = 4,
    block_tokens: Annotated[int, typer.Option(min=16)] = 512,
    save: Annotated[bool, typer.Option("--save")] = False,
    output: Annotated[Path, typer.Option()] = ROOT / "runs" / "bench-job-model",
) -> None:
    """See the module's docstring."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    size = Size(
        layers=layers, experts=experts, vocab=258, hidden=3584, intermediate=9216,
        moe_intermediate=1024, heads=64,
    )  # fmt: skip
    synthesize(output / "model", synthetic_config(size))
    shape = (
        f"{layers} layers of half of DeepSeek-V3's widths, {experts} experts, {num_blocks} x "
        f"{block_tokens} tokens"
    )
    typer.echo(f"{shape}; load average {os.getloadavg()[0]:.1f}.\n\n{HEADER}")
    checks = []
    for name in recipe or ["int4", "int8-smoothquant", "int4-awq", "int4-gptq"]:
        path = write_recipe(output / f"{name}.yaml", name, num_blocks, block_tokens)
        checks.append({"recipe": name, **check(output, path)})
        typer.echo("\n".join(rows(checks[-1])))
        if checks[-1]["predicted_bytes_read"] != checks[-1]["bytes_read"]:
            raise SystemExit("bench: the estimate's bytes read are not those of the run")
    shutil.rmtree(output)
    if save:
        content = pieces() | {"checks": {"shape": shape, "runs": checks}}
        PIECES.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check(folder: Path, recipe: Path) -> dict[str, Any]:
    """Predict and run one job; seconds by step, and bytes."""
    planned = plan_job(folder / "model", recipe=str(recipe), calibration=TEXT, output=folder / "a")
    settings = planned.recipe.calibration
    job = Job(
        config=planned.source.config,
        recipe=planned.recipe,
        nodes=1,
        per_node=1,
        tokens=settings.num_blocks * settings.block_tokens,
        block_tokens=settings.block_tokens,
    )
    with JobFolder(planned.output, planned.fingerprint) as held, TimedWorker() as pool:
        Driver(planned, held, pool, lambda _: None).run()
    report = json.loads((planned.output / "job_report.json").read_text())
    shutil.rmtree(planned.output)
    return {
        "predicted": predicted_seconds(job),
        "measured": pool.seconds,
        "predicted_bytes_read": bytes_read(job),
        "predicted_bytes_written": sum(bytes_written(job)),
        **{
            f"bytes_{what}": report[f"driver_bytes_{what}"]
            + sum(worker[f"bytes_{what}"] for worker in report["workers"])
            for what in ("read", "written")
        },
    }


def predicted_seconds(job: Job) -> dict[str, float]:
    """CPU seconds of one worker by step, without the object store and without waiting for calls."""
    rates = replace(machine_rates(pieces(), start=0.0), put=math.inf, call=0.0)
    layers = job_time(job, rates).layers
    seconds = {step: sum(layer.sections.get(step, 0.0) for layer in layers) for step in STEPS}
    return seconds | {
        step: sum(layer.phases[step] for layer in layers) for step in ("read", "write")
    }


HEADER = (
    "| recipe | CPU seconds | read | attend | solve | carry | write | together | bytes read "
    "| written |\n|---|---|" + "---:|" * 8
)


def rows(result: dict[str, Any]) -> list[str]:
    lines = []
    for kind, prefix in (("predicted", "predicted_"), ("measured", "")):
        seconds = [result[kind][step] for step in STEPS]
        cells = [f"`{result['recipe']}`", kind, *(f"{s:.1f}" for s in (*seconds, sum(seconds)))]
        cells += [f"{result[f'{prefix}bytes_{what}']:,}" for what in ("read", "written")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run(app)

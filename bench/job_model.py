"""`python -m cluster estimate` against real runs: bytes, and seconds at this machine's rates.

    python bench/job_model.py [--recipe int4-gptq] [--workers 1] [--save]

Quantizes a synthetic model of true DeepSeek-V3 layers with few experts, and predicts the same job
from `cluster/pieces.json`, which must have been measured on this very machine (`bench/pieces.py`).
Bytes read must agree exactly, or the script fails. Seconds are of the layers, from the first
attention to the last layer's file: starting Ray and loading libraries is not predicted. Prints
Markdown; `--save` puts the result beside the pieces, for docs/quantize-671b.md.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from watched import ROOT, make_model, quantize, write_recipe

from cluster.job_model import JobTime, bytes_read, bytes_written, job_time
from cluster.job_rates import machine_rates
from cluster.job_work import PIECES, Job, pieces
from deepseek.cli import make_app, run
from deepseek.recipe import load_recipe
from deepseek.synthetic import Size

STEPS = ("attend", "solve", "carry")
app = make_app(__doc__ or "")


@app.command()
def main(
    recipe: Annotated[list[str] | None, typer.Option(help="Default: int4, int4-gptq.")] = None,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1.")] = None,
    layers: Annotated[int, typer.Option(min=2, help="One of them dense.")] = 3,
    experts: Annotated[int, typer.Option(min=2)] = 4,
    num_blocks: Annotated[int, typer.Option(min=1)] = 4,
    block_tokens: Annotated[int, typer.Option(min=16)] = 256,
    save: Annotated[bool, typer.Option("--save")] = False,
    output: Annotated[Path, typer.Option()] = ROOT / "runs" / "bench-job-model",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    size = Size(layers=layers, experts=experts, vocab=258)
    model = make_model(output / f"model-{layers}x{experts}", size)

    typer.echo(
        f"{layers} true-shape layers, {experts} experts, {num_blocks} x {block_tokens} tokens; "
        f"load average {os.getloadavg()[0]:.1f}.\n\n"
        "| recipe | workers | | attend s | solve s | carry s | layers s | read s | read bytes "
        "| written bytes |\n|---|---:|---|" + "---:|" * 7
    )
    checks = []
    for name in recipe or ["int4", "int4-gptq"]:
        path = write_recipe(output / f"{name}.yaml", name, num_blocks, block_tokens)
        for count in workers or [1]:
            job = Job(
                config=model.config,
                recipe=load_recipe(str(path)),
                nodes=1,
                per_node=count,
                tokens=num_blocks * block_tokens,
                block_tokens=block_tokens,
            )
            predicted = of_estimate(job)
            shutil.rmtree(output / "artifact", ignore_errors=True)
            found = of_report(quantize(model.directory, path, output / "artifact", count).report)
            checks.append(
                {"recipe": name, "workers": count, "predicted": predicted, "measured": found}
            )
            for kind, one in (("predicted", predicted), ("measured", found)):
                typer.echo(row(name, count, kind, one))
            if predicted["bytes_read"] != found["bytes_read"]:
                raise SystemExit("bench: the estimate's bytes read are not those of the run")
    shutil.rmtree(output / "artifact", ignore_errors=True)
    if save:
        shape = {"layers": layers, "experts": experts, "blocks": num_blocks, "tokens": block_tokens}
        content = pieces() | {"checks": {"shape": shape, "runs": checks}}
        PIECES.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def of_estimate(job: Job) -> dict[str, Any]:
    time = job_time(job, machine_rates(pieces(), start=0.0))
    written, boundaries = bytes_written(job)
    return {
        **{step: sum(layer.sections[step] for layer in time.layers) for step in STEPS},
        "layers": layers_seconds(time),
        "read": time.phase("read"),
        "bytes_read": bytes_read(job),
        "bytes_written": written + boundaries,
    }


def layers_seconds(time: JobTime) -> float:
    return replace(time, start=0.0, carried=0.0).total


def of_report(report: dict[str, Any]) -> dict[str, Any]:
    """The driver's account by step; what it waits for a layer's file is part of `layers` only."""
    steps = [layer["seconds"] for layer in report["layers"] if layer["layer"] != "globals"]
    return {
        **{step: sum(one.get(step, 0.0) for one in steps) for step in STEPS},
        "layers": sum(sum(one.get(step, 0.0) for step in (*STEPS, "write")) for one in steps),
        "read": max(worker["seconds"]["read"] for worker in report["workers"]),
        "bytes_read": report["driver_bytes_read"]
        + sum(worker["bytes_read"] for worker in report["workers"]),
        "bytes_written": report["driver_bytes_written"]
        + sum(worker["bytes_written"] for worker in report["workers"]),
    }


def row(recipe: str, workers: int, kind: str, one: dict[str, Any]) -> str:
    seconds = " | ".join(f"{one[step]:.1f}" for step in (*STEPS, "layers", "read"))
    return (
        f"| `{recipe}` | {workers} | {kind} | {seconds} | {one['bytes_read']:,} "
        f"| {one['bytes_written']:,} |"
    )


if __name__ == "__main__":
    run(app)

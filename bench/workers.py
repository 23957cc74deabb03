"""The same job on 1, 2 and 4 workers: wall time, bytes read, memory, and whether the bytes agree.

    python bench/workers.py [--workers 1 --workers 2 --workers 4] [--recipe int4-gptq]

Quantizes a synthetic model of true DeepSeek-V3 layers (one dense, the others MoE with few experts)
from the start with each number of workers. All workers share this machine: with more workers than
cores the run can only show that the bytes stay the same, not a speedup. Prints Markdown.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from watched import ROOT, Run, make_model, quantize, write_recipe

from deepseek.cli import make_app, run
from deepseek.source.synthetic import Size

app = make_app(__doc__ or "")


@app.command()
def main(
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4.")] = None,
    recipe: Annotated[str, typer.Option(help="A built-in recipe.")] = "int4-gptq",
    layers: Annotated[int, typer.Option(min=2, help="One of them dense.")] = 2,
    experts: Annotated[int, typer.Option(min=2, help="Routed experts per MoE layer.")] = 8,
    num_blocks: Annotated[int, typer.Option(min=4, help="Blocks of calibration text.")] = 4,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens per block.")] = 256,
    output: Annotated[Path, typer.Option(help="Where model and artifacts go.")] = ROOT
    / "runs"
    / "bench-workers",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    size = Size(layers=layers, experts=experts, vocab=258)
    model = make_model(output / f"model-{layers}x{experts}", size)
    settings = write_recipe(output / "recipe.yaml", recipe, num_blocks, block_tokens)
    typer.echo(
        f"{layers} true-shape layers, {experts} experts, {model.total_bytes / 1e9:.2f} GB; "
        f"`{recipe}` on {num_blocks} x {block_tokens} tokens; {os.cpu_count()} cores.\n"
    )
    typer.echo(
        "| workers | wall s | without start-up s | of the first | source read GB | of the model "
        "| a worker's own memory GB | all processes GB | artifact |\n|---:|" + "---:|" * 7 + "---|"
    )
    digests: set[str] = set()
    first: Run | None = None
    for count in workers or (1, 2, 4):
        artifact = output / f"workers-{count}"
        shutil.rmtree(artifact, ignore_errors=True)
        done = quantize(model.directory, settings, artifact, count)
        first = first or done
        typer.echo(row(done, first, count, model.total_bytes))
        digests.add(done.digest)
        shutil.rmtree(artifact)
    if len(digests) > 1:
        raise SystemExit("bench: the artifacts differ")


def row(done: Run, first: Run, count: int, model_bytes: int) -> str:
    report = done.report
    read = report["driver_bytes_read"] + sum(worker["bytes_read"] for worker in report["workers"])
    private = max(size for kind, size in done.private.items() if kind.startswith("worker"))
    whole = "not measured" if done.peak is None else f"{done.peak / 1e9:.2f}"
    return (
        f"| {count} | {done.wall_s:.0f} | {report['wall_s']:.0f} "
        f"| {report['wall_s'] / first.report['wall_s']:.2f}x | {read / 1e9:.3f} "
        f"| {read / model_bytes:.3f}x | {private / 1e9:.2f} | {whole} | `{done.digest[:16]}` |"
    )


if __name__ == "__main__":
    run(app)

"""Quantizes a model several times larger than the memory that the whole job may use.

    python bench/memory_limit.py [--limit-gb 6] [--times 4] [--recipe int4] [--workers 1]

Makes a synthetic model of true DeepSeek-V3 layers (or narrower ones, which need less time),
`--times` as large as the limit, and quantizes it in a cgroup with that limit: driver, Ray with its
object store, workers, and the page cache of all files that they read and write. Where no cgroup can
be made, the limit is RLIMIT_AS of each process; the result says which limit it was. Prints
Markdown; fails if the job fails.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from watched import ROOT, make_model, quantize, write_recipe

from deepseek.cli import make_app, run
from deepseek.source.synthetic import Size, num_bytes, synthetic_config

app = make_app(__doc__ or "")


@app.command()
def main(
    limit_gb: Annotated[float, typer.Option(min=0.5, help="Limit in 10^9 bytes.")] = 6,
    times: Annotated[float, typer.Option(min=0.1, help="Size of the model over the limit.")] = 4,
    recipe: Annotated[str, typer.Option(help="A built-in recipe.")] = "int4",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    experts: Annotated[int, typer.Option(min=2, help="Routed experts per MoE layer.")] = 12,
    hidden: Annotated[int | None, typer.Option(help="True shapes without these four.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Of the dense layer.")] = None,
    moe_intermediate: Annotated[int | None, typer.Option(help="Of one expert.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of the attention.")] = None,
    num_blocks: Annotated[int, typer.Option(min=4, help="Blocks of calibration text.")] = 4,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens per block.")] = 64,
    output: Annotated[Path, typer.Option(help="Where model and artifact go.")] = ROOT
    / "runs"
    / "bench-memory",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    limit = round(limit_gb * 1e9)
    widths = Size(
        experts=experts,
        vocab=258,
        hidden=hidden,
        intermediate=intermediate,
        moe_intermediate=moe_intermediate,
        heads=heads,
    )
    size = size_of_at_least(times * limit, widths)
    model = make_model(output / f"model-{size.layers}x{size.experts}", size)
    settings = write_recipe(output / "recipe.yaml", recipe, num_blocks, block_tokens)
    artifact = output / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    done = quantize(model.directory, settings, artifact, workers, limit)
    written = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    largest = max(model.num_bytes(layer) for layer in range(size.layers))
    rows = {
        "model": f"{size.layers} layers, {experts} experts, width {model.config.hidden_size}, "
        f"{model.total_bytes / 1e9:.2f} GB, the largest layer {largest / 1e9:.2f} GB",
        "job": f"`{recipe}`, {num_blocks} x {block_tokens} tokens, {workers} workers",
        "limit": f"{limit / 1e9:.2f} GB by {done.limited_by}; the model is "
        f"{model.total_bytes / limit:.2f} times that",
        "wall time": f"{done.wall_s:.0f} s",
        "artifact": f"{written / 1e9:.2f} GB, `{done.digest[:16]}`",
        "peak, all processes": in_words(done.peak, limit),
        "peak with page cache": in_words(done.cached, limit),
        "killed for memory": f"{done.oom_kills} processes",
        "at the peak": ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in done.at_peak.items()),
        "peak of each": ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in done.private.items()),
    }
    typer.echo("| what | measured |\n|---|---|")
    for name, value in rows.items():
        typer.echo(f"| {name} | {value} |")
    shutil.rmtree(artifact)


def size_of_at_least(min_bytes: float, widths: Size) -> Size:
    """One dense layer and as many MoE layers as `min_bytes` bytes need."""
    size = replace(widths, layers=2)
    while num_bytes(synthetic_config(size)) < min_bytes:
        size = replace(size, layers=size.layers + 1)
    return size


def in_words(size: int | None, limit: int) -> str:
    if size is None:
        return "not measured"
    return f"{size / 1e9:.2f} GB, {size / limit:.0%} of the limit"


if __name__ == "__main__":
    run(app)

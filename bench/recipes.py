"""Every built-in recipe on the example model: size, perplexity, KL, top-1, speed, verdict.

    python bench/recipes.py [--output runs/bench] [RECIPE ...]

Runs the commands of the README, one recipe after the other; each evaluation scores the source in
the same run. Prints one Markdown table. `quantize` and `build` resume, so a second run only
measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek.cli import make_app, run
from deepseek.recipe import builtin_recipes

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"

app = make_app(__doc__ or "")


@app.command()
def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Default: all built-in.")] = None,
    output: Annotated[Path, typer.Option(help="Where checkpoints and engines go.")] = ROOT
    / "runs"
    / "bench",
) -> None:
    """See the module's docstring."""
    typer.echo(
        "| recipe | MB | of BF16 | perplexity | ratio | mean KL | top-1 | decode tok/s, batch 1 "
        "| of unquantized | quantize s | verdict |"
    )
    typer.echo("|---|" + "---:|" * 9 + "---|")
    for recipe in recipes or builtin_recipes():
        seconds, gate = judge(recipe, output / recipe)
        typer.echo(
            f"| `{recipe}` | {gate['bytes'] / 1e6:.2f} | {gate['bytes'] / gate['bf16_bytes']:.1%} "
            f"| {gate['perplexity']:.3f} | {gate['perplexity_ratio']:.4f} | {gate['kl']:.4f} "
            f"| {gate['top1']:.2%} | {gate['decode_tokens_per_s']:.0f} "
            f"| {gate['decode_tokens_per_s'] / gate['bf16_decode_tokens_per_s']:.2f}x "
            f"| {seconds:.0f} | {gate['verdict']} |"
        )
    typer.echo(f"\nSource perplexity {gate['source_perplexity']:.3f}; sizes include the MTP layer.")


def judge(recipe: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """Quantize, build, evaluate and gate; the wall time of quantize, and the JSON of gate."""
    checkpoint, engine, evaluation = folder / "checkpoint", folder / "engine", folder / "evaluation"
    started = time.monotonic()
    command(
        *("quantize", "--model", MODEL, "--recipe", recipe),
        *("--calibration", MODEL / "calibration.txt", "--output", checkpoint),
    )
    seconds = time.monotonic() - started
    command("build", "--checkpoint", checkpoint, "--output", engine)
    command(
        *("evaluate", "--engine", engine, "--reference", MODEL),
        *("--data", MODEL / "heldout.txt", "--output", evaluation),
    )
    gate = command("gate", "--engine", engine, "--evaluation", evaluation, "--json", allow=(0, 1))
    return seconds, json.loads(gate)


def command(*args: object, allow: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "quant_jobs", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in allow:
        raise SystemExit(f"bench: quant_jobs {args[0]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    run(app)

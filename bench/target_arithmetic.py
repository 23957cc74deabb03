"""Every recipe in every target's arithmetic, against the embedded arithmetic of the same artifact.

    python bench/target_arithmetic.py [--work DIR] [--blocks 8] [--target vllm] [RECIPE ...]

The example model, as released and quantized with each recipe (once: artifacts stay in the work
folder, or are those of --artifacts), is built for every target in every dialect, and executed as
that target computes it: its stored values, its roundings, its KV layout with BF16 pages. All
engines of a recipe, and the source, score the same held-out text in one run, block by block.

Prints one Markdown table. Perplexity ratio, mean KL and top-1 are against the source, with 95 %
intervals over blocks; "KL - embedded's" is the mean KL less that of the embedded arithmetic, paired
over blocks: an interval above zero means that the target's roundings cost something. "KL of the
two" is KL(embedded || target), which is zero only where the two compute the same. What a target
refuses is listed below the table in its own words. Scores are deterministic, so one run is enough.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from cluster.matrix import TARGETS
from deepseek.cli import make_app, run
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.errors import IntServeError
from deepseek.recipe import builtin_recipes
from deepseek.target_engine import load_as_target
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.calibration.token_blocks import load_token_blocks
from quant_jobs.evaluation.metrics import Interval, TokenScores, compare_logits, estimate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"
BLOCK_TOKENS = 512
#: In place of a recipe: the source itself, built as it is for every target that takes it.
RELEASED = "released"
#: The arithmetic that the others are compared with.
BASELINE = "embedded"
#: Target -> dialects that are tried; None is the target's own choice.
DIALECTS: dict[str, tuple[str | None, ...]] = {"trtllm": ("mixed", "single")}

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Build:
    """One way to build an artifact for a target."""

    target: str
    dialect: str | None = None

    @property
    def name(self) -> str:
        return self.target if self.dialect is None else f"{self.target} {self.dialect}"

    def options(self) -> BuildOptions:
        """One GPU, BF16 pages."""
        given: dict[str, Any] = {"kv_cache": "bf16"}
        if self.target not in (BASELINE, "transformers"):
            given["tp"] = 1
        if self.target == "trtllm":
            given["ep"] = 1
        if self.dialect is not None:
            given["dialect"] = self.dialect
        return BuildOptions(**given)


def builds() -> Iterator[Build]:
    """Every target, the embedded engine first."""
    for target in sorted(TARGETS, key=lambda target: target != BASELINE):
        for dialect in DIALECTS.get(target, (None,)):
            yield Build(target, dialect)


@app.command()
def main(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Default: `released` and all built-in.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where artifacts and engines stay.")] = ROOT
    / "runs"
    / "target-arithmetic",
    target: Annotated[
        list[str] | None, typer.Option(help="Beside embedded; may be repeated. Default: all.")
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="Quantized checkpoints by recipe, in place of making them.")
    ] = None,
    blocks: Annotated[
        int, typer.Option(min=2, help=f"Blocks of {BLOCK_TOKENS} tokens of held-out text.")
    ] = 8,
) -> None:
    """See the module's docstring."""
    ids_BT = load_token_blocks(MODEL / "heldout.txt", MODEL, blocks, BLOCK_TOKENS).ids
    source = LLMEngine.from_checkpoint(MODEL, EngineOptions(kv_cache="bf16"))
    source_logits = _score(source, ids_BT)
    typer.echo(
        "| recipe | arithmetic | perplexity ratio | mean KL | KL - embedded's | KL of the two "
        "| top-1 |"
    )
    typer.echo("|---|---|---:|---:|---:|---:|---:|")
    refused: list[str] = []
    for recipe in recipes or [RELEASED, *builtin_recipes()]:
        if recipe == RELEASED:
            artifact = MODEL
        else:
            artifact = quantized(recipe, work) if artifacts is None else artifacts / recipe
        baseline: list[Tensor] = []
        for build in builds():
            if target and build.target not in (BASELINE, *target):
                continue
            folder = work / recipe / build.name.replace(" ", "-")
            try:
                run_build(artifact, build.target, folder, build.options())
                engine = load_as_target(folder, EngineOptions())
            except IntServeError as error:
                refused.append(f"- `{recipe}`, {build.name}: {error}")
                continue
            logits = _score(engine, ids_BT)
            baseline = baseline or logits
            typer.echo(row(recipe, build, ids_BT, source_logits, baseline, logits))
    typer.echo(f"\n{blocks * (BLOCK_TOKENS - 1)} judged tokens. Refused:\n")
    typer.echo("\n".join(refused) or "- nothing")


def row(
    recipe: str,
    build: Build,
    ids_BT: Tensor,
    source: list[Tensor],
    baseline: list[Tensor],
    logits: list[Tensor],
) -> str:
    """One line of the table, from the logits f32 [T, V] of every block."""
    ours = _compare(source, logits, ids_BT)
    theirs = _compare(source, baseline, ids_BT)
    ratio = estimate(_stack(ours, "quantized_nll") - _stack(ours, "source_nll"), _exp)
    kl, top1 = estimate(_stack(ours, "kl")), estimate(_stack(ours, "same_top1"))
    cells = [f"`{recipe}`", build.name, _show(ratio, 4), _show(kl, 5)]
    if build.target == BASELINE:
        cells += ["-", "-"]
    else:
        more = estimate(_stack(ours, "kl") - _stack(theirs, "kl"))
        between = estimate(_stack(_compare(baseline, logits, ids_BT), "kl"))
        cells += [_show(more, 5), _show(between, 5)]
    cells.append(f"{top1.value:.2%} [{top1.low:.2%}, {top1.high:.2%}]")
    return f"| {' | '.join(cells)} |"


def quantized(recipe: str, work: Path) -> Path:
    """The artifact of a recipe, made in one process where it is not there."""
    output = work / recipe / "artifact"
    words = (
        *("quantize", "--model", MODEL, "--recipe", recipe, "--workers", "0"),
        *("--calibration", MODEL / "calibration.txt", "--output", output),
    )
    done = subprocess.run(
        [sys.executable, "-m", "quant_jobs", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"bench: quantize {recipe} ended with {done.returncode}")
    return output


def _score(engine: LLMEngine, ids_BT: Tensor) -> list[Tensor]:
    return [engine.score(ids_T) for ids_T in ids_BT]


def _compare(source: list[Tensor], logits: list[Tensor], ids_BT: Tensor) -> list[TokenScores]:
    return [compare_logits(p, q, ids) for p, q, ids in zip(source, logits, ids_BT, strict=True)]


def _stack(scores: list[TokenScores], name: str) -> Tensor:
    """One value per judged token, f64 [B, T-1]."""
    return torch.stack([getattr(score, name) for score in scores]).double()


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())


def _show(interval: Interval, digits: int) -> str:
    value, low, high = (
        f"{number:.{digits}f}" for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    run(app)

"""Accuracy of every built-in recipe on the native kernels beside PyTorch's: KL, perplexity, top-1.

    python bench/kernel_accuracy.py [--output runs/bench] [--save FILE.json] [--resume] [RECIPE ...]

Takes the engines of bench/recipes.py (OUTPUT/RECIPE/engine); makes those that are missing, in this
process. Each is scored on the example model's held-out text on both kernels, against the
unquantized source on PyTorch's, which holds it in FP32 and is exact; and on the native ones
against the source on the native ones too, which has BF16 weights and inputs: so `evaluate` judges
where the extension is built ("as judged"). Intervals are of 95 %. "native - torch" is the paired
difference of the mean KL over blocks of text: an interval that holds 0 says that the kernels cannot
be told apart by it. What the native kernels round otherwise (BF16 inputs where PyTorch's are FP32,
among others) moves codes and experts of single tokens either way; the row of the source says how
far that goes by itself. Everything is deterministic, so one run is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_app, make_progress, run
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.options import KernelChoice
from deepseek.files import write_atomic
from deepseek.recipe import builtin_recipes, load_recipe
from quant_jobs.calibration.token_blocks import load_token_blocks
from quant_jobs.evaluation.metrics import Interval, TokenScores, compare_logits, estimate
from quant_jobs.job.progress import Event
from quant_jobs.quantize import run_quantize
from quant_jobs.targets.embedded import pack_engine

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"
SOURCE = "source"
BLOCK_TOKENS = 512

#: By what is scored: "native" and "torch" against the exact source, "judged" against the native.
Scores = dict[str, "Score"]

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Score:
    """One engine on one kind of kernels; `kl_B` is the mean KL of each block of text."""

    perplexity_ratio: Interval
    kl: Interval
    top1: Interval
    kl_B: tuple[float, ...]


@app.command()
def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Default: all built-in.")] = None,
    output: Annotated[Path, typer.Option(help="Where checkpoints and engines are.")] = ROOT
    / "runs"
    / "bench",
    save: Annotated[
        Path | None, typer.Option(help="Write the scores as JSON, recipe by recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Take what is in --save already.")] = False,
    heldout_blocks: Annotated[int, typer.Option(min=2, help="Of 512 tokens.")] = 24,
) -> None:
    """See the module's docstring."""
    names = [SOURCE, *(recipes or builtin_recipes())]
    scores: dict[str, Scores] = {}
    if resume and save is not None and save.exists():
        scores = read_scores(save)
    heldout = load_token_blocks(MODEL / "heldout.txt", MODEL, heldout_blocks, BLOCK_TOKENS)
    judge = Judge(list(heldout.ids))
    with make_progress() as progress:
        for name in progress.track(names, description="recipes"):
            if name in scores:
                continue
            directory = MODEL if name == SOURCE else engine_of(name, output)
            scores[name] = judge.score(directory)
            if save is not None:
                content = {
                    key: {kernels: asdict(score) for kernels, score in value.items()}
                    for key, value in scores.items()
                }
                write_atomic(save, json.dumps(content, indent=1).encode())
    report({name: scores[name] for name in names}, judge.perplexity)


def engine_of(recipe: str, output: Path) -> Path:
    """The engine directory of a recipe, made where it is not there."""
    checkpoint, engine = output / recipe / "checkpoint", output / recipe / "engine"
    if not engine.exists():
        run_quantize(
            MODEL, load_recipe(recipe), MODEL / "calibration.txt", checkpoint, 0, drop_event
        )
        pack_engine(ArtifactReader(checkpoint), engine)
    return engine


def drop_event(_: Event) -> None:
    """One bar over all of the small jobs is enough."""


def open_engine(directory: Path, kernels: KernelChoice) -> LLMEngine:
    options = EngineOptions(kernels=kernels, kv_cache="bf16", max_batched_tokens=BLOCK_TOKENS)
    if directory == MODEL:
        return LLMEngine.from_checkpoint(directory, options)
    return LLMEngine.load(directory, options)


class Judge:
    """Scores engines against the source, whose logits of both kernels it holds."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._exact, self._native = (
            self._logits(open_engine(MODEL, kernels)) for kernels in ("torch", "native")
        )
        own = self._compare(self._exact, self._exact)
        self.perplexity = math.exp(float(torch.stack([s.source_nll for s in own]).mean()))

    def score(self, directory: Path) -> Scores:
        native, slow = (
            self._logits(open_engine(directory, kernels)) for kernels in ("native", "torch")
        )
        return {
            "native": make_score(self._compare(self._exact, native)),
            "torch": make_score(self._compare(self._exact, slow)),
            "judged": make_score(self._compare(self._native, native)),
        }

    def _logits(self, engine: LLMEngine) -> list[Tensor]:
        return [engine.score(ids_T) for ids_T in self._blocks]

    def _compare(self, source: list[Tensor], logits: list[Tensor]) -> list[TokenScores]:
        pairs = zip(source, logits, self._blocks, strict=True)
        return [compare_logits(before, after, ids_T) for before, after, ids_T in pairs]


def make_score(scores: list[TokenScores]) -> Score:
    kl_BT = torch.stack([score.kl for score in scores])
    loss_BT = torch.stack([score.quantized_nll - score.source_nll for score in scores])
    return Score(
        perplexity_ratio=estimate(loss_BT, math.exp),
        kl=estimate(kl_BT),
        top1=estimate(torch.stack([score.same_top1 for score in scores])),
        kl_B=tuple(kl_BT.double().mean(dim=1).tolist()),
    )


def report(scores: dict[str, Scores], perplexity: float) -> None:
    """Print the table."""
    typer.echo(f"Source perplexity {perplexity:.3f} (PyTorch's kernels).\n")
    typer.echo(
        "| recipe | KL native | KL torch | native - torch | ratio native, torch "
        "| top-1 native, torch | KL, ratio, top-1 as judged |"
    )
    typer.echo("|---|---|---|---|---:|---:|---|")
    for name, by_kernels in scores.items():
        native, slow, judged = (by_kernels[key] for key in ("native", "torch", "judged"))
        change = estimate((torch.tensor(native.kl_B) - torch.tensor(slow.kl_B))[:, None])
        typer.echo(
            f"| `{name}` | {words(native.kl)} | {words(slow.kl)} "
            f"| {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}] "
            f"| {native.perplexity_ratio.value:.4f}, {slow.perplexity_ratio.value:.4f} "
            f"| {native.top1.value:.2%}, {slow.top1.value:.2%} "
            f"| {words(judged.kl)}, {judged.perplexity_ratio.value:.4f}, {judged.top1.value:.2%} |"
        )


def words(interval: Interval) -> str:
    return f"{interval.value:.5f} [{interval.low:.5f}, {interval.high:.5f}]"


def read_scores(path: Path) -> dict[str, Scores]:
    """Read what `--save` wrote."""
    intervals = ("perplexity_ratio", "kl", "top1")
    return {
        name: {
            kernels: Score(
                **{field: Interval(**score[field]) for field in intervals},
                kl_B=tuple(score["kl_B"]),
            )
            for kernels, score in by_kernels.items()
        }
        for name, by_kernels in json.loads(path.read_text()).items()
    }


if __name__ == "__main__":
    run(app)

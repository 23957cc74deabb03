"""Accuracy of each algorithm on the example model: perplexity ratio, mean KL, top-1 agreement.

    python bench/accuracy.py [--save runs/accuracy.json] [--only REGEX] [--workers 2]

Runs every format (INT8 and INT4 in groups of 32 and 128, with and without zero points) with every
algorithm that can make it, on all linears and on the routed experts only; and AWQ and GPTQ with
each expert coverage policy. Each run is a job as `quantize` runs it, packed for the embedded engine
as `build` does, and scored against the unquantized source on held-out text as `evaluate` does. One
pool of workers serves all jobs, and the source is scored once.

Prints Markdown: one row per run, the lowest KL of each format first. "against max" is the mean KL
minus that of rounding to nearest in the same format and the same linears, with its 95 % interval,
paired over blocks of text; an interval below zero means that the algorithm is better. At INT8 a few
tokens that rounding sends to other experts, 0.3 to 3 nats each, make up most of the mean, so the
median compares algorithms better. Everything is deterministic, so one run is enough.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from cluster.connect import connect
from deepseek.artifact.manifest import Manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_app, make_progress, run
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.files import write_atomic
from deepseek.recipe import Recipe, parse_recipe
from quant_jobs.calibration.token_blocks import TokenBlocks, load_token_blocks
from quant_jobs.evaluation.metrics import Interval, TokenScores, compare_logits, estimate
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.job.progress import Event
from quant_jobs.targets.embedded import pack_engine
from quant_jobs.workers.pool import WorkerPool

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"

SCOPES = {"all": "*", "experts": "model.layers.*.mlp.experts.*"}
BLOCK_TOKENS = 512

#: Format -> the keys of a rule that select it.
FORMATS: dict[str, dict[str, Any]] = {
    "int8 W8A8": {"weights": "int8", "activations": "int8"},
    "int8": {"weights": "int8"},
    "int8-asym": {"weights": "int8-asym"},
    "int4 g128": {"weights": "int4", "group_size": 128},
    "int4 g32": {"weights": "int4", "group_size": 32},
    "int4-asym g128": {"weights": "int4-asym", "group_size": 128},
    "int4-asym g32": {"weights": "int4-asym", "group_size": 32},
}
#: Method -> the keys of a rule that select it. `max` is rounding to nearest (RTN).
METHODS: dict[str, dict[str, Any]] = {
    "max": {},
    "mse clip": {"clip": "mse"},
    "99 % clip": {"clip": "percentile", "percentile": 99.0},
    "smoothquant": {"algorithm": "smoothquant"},
    "awq": {"algorithm": "awq"},
    "gptq": {"algorithm": "gptq"},
    "gptq + act order": {"algorithm": "gptq", "act_order": True},
    "gptq + mse clip": {"algorithm": "gptq", "clip": "mse"},
}
_ROUNDING = ("max", "mse clip", "99 % clip", "awq", "gptq", "gptq + act order", "gptq + mse clip")
#: Format -> the methods to run. INT8 has headroom: clips and orders change little.
MATRIX: dict[str, tuple[str, ...]] = {
    "int8 W8A8": ("max", "smoothquant", "gptq"),
    "int8": ("max", "mse clip", "99 % clip", "awq", "gptq"),
    "int8-asym": ("max", "gptq"),
    "int4 g128": _ROUNDING,
    "int4 g32": _ROUNDING,
    "int4-asym g128": ("max", "awq", "gptq"),
    "int4-asym g32": ("max", "awq", "gptq"),
}
POLICIES = ("all", "shrink")  # every other row has topk

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `scope` is a key of SCOPES: which linears are quantized."""

    format: str
    scope: str
    method: str
    coverage: str = "topk"

    @property
    def name(self) -> str:
        words = f"{self.format} {self.scope} {self.method} {self.coverage}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

    @property
    def baseline(self) -> Case:
        return Case(self.format, self.scope, "max")

    def recipe(self, num_blocks: int) -> Recipe:
        """The recipe. Its gate limits are not read: nothing here is gated."""
        rules: list[dict[str, Any]] = []  # what no rule matches stays as the source has it
        rule = FORMATS[self.format] | {"match": SCOPES[self.scope]}
        if self.method == "smoothquant" and self.scope == "experts":
            # gate and up share their input with the shared expert and the router and cannot be
            # smoothed without them. Only down is smoothed, through the rows of up.
            rules.append(dict(rule))
            rule["match"] += ".down_proj"
        rules.append(rule | METHODS[self.method])
        return parse_recipe(
            {
                "name": self.name,
                "description": "One row of bench/accuracy.py.",
                "rules": rules,
                "calibration": {"num_blocks": num_blocks, "block_tokens": BLOCK_TOKENS},
                "expert_coverage": {"policy": self.coverage},
                "gate": {"max_perplexity_ratio": 2.0, "max_mean_kl": 1.0, "min_top1": 0.0},
            },
            where=self.name,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured in one run; `kl_B` is the mean KL of each block of text."""

    case: Case
    perplexity_ratio: Interval
    kl: Interval
    kl_p50: float
    top1: Interval
    fallbacks: dict[str, int]
    bytes: int
    kl_B: tuple[float, ...]


def cases() -> Iterator[Case]:
    """Every run, INT4 first, each baseline before the runs that are compared with it."""
    for fmt, methods in sorted(MATRIX.items(), key=lambda item: item[0].startswith("int8")):
        for scope in SCOPES:
            for method in methods:
                yield Case(fmt, scope, method)
    for group in ("int4 g128", "int4 g32"):
        for method in ("awq", "gptq"):
            for coverage in POLICIES:
                yield Case(group, "experts", method, coverage)


@app.command()
def main(
    save: Annotated[
        Path | None, typer.Option(help="Write the rows as JSON here, after each run.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Take the rows that are in --save already, of the same code.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Regular expression: runs whose name holds it, and their baselines.")
    ] = "",
    workers: Annotated[int, typer.Option(min=1)] = 2,
    calibration_blocks: Annotated[int, typer.Option(min=1, help="Of 512 tokens.")] = 32,
    heldout_blocks: Annotated[int, typer.Option(min=2, help="Of 512 tokens.")] = 24,
    model: Annotated[Path, typer.Option(help="A source with both texts beside it.")] = MODEL,
) -> None:
    """See the module's docstring."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15 they starve beside other work
    chosen = [case for case in cases() if re.search(only, case.name)]
    if not chosen:
        raise typer.BadParameter(f"--only {only!r} matches none of {[c.name for c in cases()]}")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(dict.fromkeys(run for case in chosen for run in (case.baseline, case)))
    heldout = load_token_blocks(model / "heldout.txt", model, heldout_blocks, BLOCK_TOKENS)
    judge = Judge(model, heldout)
    rows = read_rows(save) if resume and save is not None and save.exists() else []
    done = {row.case for row in rows}
    with (
        connect(num_cpus=workers),
        WorkerPool(workers) as pool,
        tempfile.TemporaryDirectory(prefix="accuracy-") as folder,
        make_progress() as progress,
    ):
        for case in progress.track(chosen, description="accuracy"):
            if case in done:
                continue
            place = Path(folder) / case.name
            manifest = quantize(model, case.recipe(calibration_blocks), place, pool)
            rows.append(judge.score(case, manifest, place))
            shutil.rmtree(place)
            if save is not None:
                write_atomic(save, json.dumps([_jsonable(row) for row in rows], indent=1).encode())
    report([row for row in rows if row.case in chosen], judge.perplexity, heldout)


def quantize(model: Path, recipe: Recipe, folder: Path, pool: WorkerPool) -> Manifest:
    """`run_quantize` on the workers of `pool`."""
    output = folder / "checkpoint"
    job = plan_job(model, recipe, model / "calibration.txt", output)
    with JobFolder(output, job.fingerprint) as lock:
        return Driver(job, lock, pool, _quiet).run()


def _quiet(_: Event) -> None:
    """Drop a job's progress: one bar over all of the small jobs is enough."""


class Judge:
    """Scores engines against the source, whose logits it holds: f32 [B, T, V] in all."""

    def __init__(self, model: Path, heldout: TokenBlocks) -> None:
        self._ids_BT = heldout.ids
        source = LLMEngine.from_checkpoint(model, EngineOptions(kv_cache="bf16"))
        self._source = [source.score(ids_T) for ids_T in self._ids_BT]
        own = [
            compare_logits(logits, logits, ids_T)
            for logits, ids_T in zip(self._source, self._ids_BT, strict=True)
        ]
        self.perplexity = math.exp(float(_stacked(own, "source_nll").mean()))

    def score(self, case: Case, manifest: Manifest, folder: Path) -> Row:
        """Build the engine of `folder`/checkpoint and score it."""
        pack_engine(ArtifactReader(folder / "checkpoint"), folder / "engine", tp=1)
        engine = LLMEngine.load(folder / "engine")
        scores = [
            compare_logits(logits, engine.score(ids_T), ids_T)
            for logits, ids_T in zip(self._source, self._ids_BT, strict=True)
        ]
        kl_BT = _stacked(scores, "kl")
        loss_BT = _stacked(scores, "quantized_nll") - _stacked(scores, "source_nll")
        fallbacks: dict[str, int] = {}
        for entry in manifest.fallbacks:
            fallbacks[entry.kind] = fallbacks.get(entry.kind, 0) + entry.count
        return Row(
            case,
            perplexity_ratio=estimate(loss_BT, math.exp),
            kl=estimate(kl_BT),
            kl_p50=float(kl_BT.double().flatten().median()),
            top1=estimate(_stacked(scores, "same_top1")),
            fallbacks=fallbacks,
            bytes=manifest.num_bytes,
            kl_B=tuple(kl_BT.double().mean(dim=1).tolist()),
        )


def _stacked(scores: Sequence[TokenScores], field: str) -> Tensor:
    return torch.stack([getattr(score, field) for score in scores])


def report(rows: Sequence[Row], source_perplexity: float, heldout: TokenBlocks) -> None:
    """Print the table."""
    judged = heldout.num_tokens - len(heldout.ids)
    typer.echo(f"Source perplexity {source_perplexity:.3f} on {judged} held-out tokens.\n")
    typer.echo(
        "| linears | format | algorithm | coverage | MB | perplexity ratio | mean KL | median KL "
        "| top-1 | of max's mean | against max (95 %) | fallbacks |"
    )
    typer.echo("|---|---|---|---|" + "---:|" * 7 + "---|")
    by_case = {row.case: row for row in rows}
    formats = list(FORMATS)
    order = sorted(
        rows, key=lambda row: (row.case.scope, formats.index(row.case.format), row.kl.value)
    )
    for row in order:
        case, ratio, kl, top1 = row.case, row.perplexity_ratio, row.kl, row.top1
        typer.echo(
            f"| {case.scope} | {case.format} | {case.method} | {case.coverage} "
            f"| {row.bytes / 1e6:.2f} | {ratio.value:.4f} "
            f"| {kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}] | {row.kl_p50:.1e} | {top1.value:.2%} "
            f"| {versus(row, by_case[case.baseline])} "
            f"| {', '.join(f'{kind} {n}' for kind, n in sorted(row.fallbacks.items()))} |"
        )


def versus(row: Row, baseline: Row) -> str:
    """Two cells: the KL over the baseline's, and the paired difference with its interval."""
    if row.case == baseline.case:
        return "1.00 |"
    pairs = torch.tensor(row.kl_B) - torch.tensor(baseline.kl_B)
    change = estimate(pairs[:, None])
    share = row.kl.value / baseline.kl.value
    return f"{share:.2f} | {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}]"


def read_rows(path: Path) -> list[Row]:
    """Read the rows that `--save` wrote."""
    intervals = ("perplexity_ratio", "kl", "top1")
    return [
        Row(
            case=Case(**row["case"]),
            **{name: Interval(**row[name]) for name in intervals},
            kl_p50=row["kl_p50"],
            fallbacks=row["fallbacks"],
            bytes=row["bytes"],
            kl_B=tuple(row["kl_B"]),
        )
        for row in json.loads(path.read_text())
    ]


def _jsonable(row: Row) -> dict[str, Any]:
    return {**asdict(row), "case": asdict(row.case), "name": row.case.name}


if __name__ == "__main__":
    run(app)

"""Quantizes on a cluster of three raylets with kills: same bytes, and how much time is lost?

    python bench/kill_rounds.py [--rounds 20] [--first-seed 0]

Every round kills a raylet, a worker or the driver with SIGKILL, one to three times, at moments that
its seed decides, spread over the whole job; a killed driver is started again with the same command.
The output of every round is compared, byte for byte, with that of an undisturbed run of one worker,
and its wall time with an undisturbed run of the same workers on the same cluster. Prints one
Markdown table; exit code 1 if a round's bytes differ.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from support.kill_rounds import (
    NUM_WORKERS,
    RECIPES,
    Outcome,
    Plan,
    Round,
    make_deep_model,
    plan_round,
    recipe_of,
    reference,
)
from support.raylets import Raylets, use_token

from deepseek.cli import make_app, run

app = make_app(__doc__ or "")


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    first_seed: Annotated[int, typer.Option(help="Seed of the first round.")] = 0,
) -> None:
    """See the module's docstring."""
    use_token()
    with tempfile.TemporaryDirectory() as folder, Raylets(NUM_WORKERS) as cluster:
        outcomes = run_rounds(cluster, Path(folder), range(first_seed, first_seed + rounds))
    if not all(outcome.identical for outcome in outcomes):
        raise typer.Exit(1)


def run_rounds(cluster: Raylets, folder: Path, seeds: range) -> list[Outcome]:
    """Run all rounds on one cluster; after each, nodes join until it has its size again."""
    model = make_deep_model(folder)
    expected = {
        name: reference(model, recipe_of(name), folder / f"reference-{name}") for name in RECIPES
    }
    baselines: dict[str, Outcome] = {}
    marks: dict[str, int] = {}
    for name in RECIPES:
        undisturbed = Round(cluster, model, Plan(0, name, (), None), folder / name, 0)
        baselines[name] = undisturbed.run(expected[name])
        marks[name] = undisturbed.num_marks
        typer.echo(f"undisturbed {name}: {baselines[name].seconds:.1f} s, {marks[name]} files")
    typer.echo("\n| seed | recipe | killed (after seconds, at) | nodes joined | seconds | lost to "
               "kills, s | s per kill | same bytes |")  # fmt: skip
    typer.echo("|---:|---|---|---:|---:|---:|---:|---|")
    outcomes = []
    for seed in seeds:
        plan = plan_round(seed)
        round_ = Round(cluster, model, plan, folder / f"round-{seed}", marks[plan.recipe])
        outcomes.append(round_.run(expected[plan.recipe]))
        typer.echo(row(outcomes[-1], baselines[plan.recipe].seconds))
        while cluster.num_nodes < NUM_WORKERS:
            cluster.add_node()
    show_totals(outcomes, {name: outcome.seconds for name, outcome in baselines.items()})
    return outcomes


def row(outcome: Outcome, baseline_s: float) -> str:
    kills = "; ".join(f"{hit.what} ({hit.seconds:.1f} s, {hit.moment})" for hit in outcome.hits)
    lost = outcome.seconds - baseline_s
    return (
        f"| {outcome.plan.seed} | `{outcome.plan.recipe}` | {kills} | {outcome.joined} "
        f"| {outcome.seconds:.1f} | {lost:.1f} | {lost / max(len(outcome.hits), 1):.1f} "
        f"| {'yes' if outcome.identical else '**no**'} |"
    )


def show_totals(outcomes: list[Outcome], baseline_s: dict[str, float]) -> None:
    same = sum(outcome.identical for outcome in outcomes)
    by_kind = {
        what: sum(hit.what == what for outcome in outcomes for hit in outcome.hits)
        for what in ("raylet", "worker", "driver")
    }
    lost = sum(outcome.seconds - baseline_s[outcome.plan.recipe] for outcome in outcomes)
    kills = sum(by_kind.values())
    typer.echo(
        f"\n{same} of {len(outcomes)} rounds with the same bytes; {kills} kills that hit ("
        + ", ".join(f"{count} {what}s" for what, count in by_kind.items())
        + f"), {lost / max(kills, 1):.1f} s lost per kill on average."
    )


if __name__ == "__main__":
    run(app)

"""quantize on a cluster of several raylets, some of which die: same bytes, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.kill_rounds import (
    NUM_WORKERS,
    RECIPES,
    Kill,
    Outcome,
    Plan,
    Round,
    make_deep_model,
    plan_round,
    recipe_of,
    reference,
)
from support.quantizing import SmallModel
from support.raylets import Raylets

#: Files that an undisturbed run of the model on three workers brings forth: 10 layer files and
#: parts, and 3 files for each of 7 boundaries.
NUM_MARKS = 41
NUM_ROUNDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_deep_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets(NUM_WORKERS) as raylets:
        yield raylets


def test_a_raylet_killed_in_the_middle_costs_no_byte_and_the_job_goes_on_with_those_left(
    cluster: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    plan = Plan(0, "int4-gptq", (Kill("raylet", 0.4, 0.0),), rejoin_s=None)
    expected = reference(model, recipe_of(plan.recipe), tmp_path / "reference")
    one = Round(cluster, model, plan, tmp_path / "round", NUM_MARKS)
    outcome = one.run(expected)
    assert outcome.identical
    assert [hit.what for hit in outcome.hits] == ["raylet"]
    assert (outcome.lost, outcome.joined) == (1, 0), one.report()
    assert cluster.num_nodes == NUM_WORKERS - 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_rounds_of_kills_of_raylets_workers_and_drivers_change_no_byte(
    cluster: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    expected = {
        name: reference(model, recipe_of(name), tmp_path / f"reference-{name}") for name in RECIPES
    }
    outcomes: list[Outcome] = []
    for seed in range(NUM_ROUNDS):
        while cluster.num_nodes < NUM_WORKERS:
            cluster.add_node()
        plan = plan_round(seed)
        one = Round(cluster, model, plan, tmp_path / f"round-{seed}", NUM_MARKS)
        outcomes.append(one.run(expected[plan.recipe]))
        assert outcomes[-1].identical, one.report()
        assert outcomes[-1].hits, one.report()
    hits = [hit.what for outcome in outcomes for hit in outcome.hits]
    assert {what: hits.count(what) > 0 for what in ("raylet", "worker", "driver")} == {
        "raylet": True,
        "worker": True,
        "driver": True,
    }


@pytest.mark.slow
def test_a_cluster_smaller_than_the_job_asks_for_is_used_as_it_is(
    cluster: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    """The driver and a node die, and the same command finds no place for all of its workers; a
    node that joins later is taken in."""
    while cluster.num_nodes < NUM_WORKERS:
        cluster.add_node()
    plan = Plan(1, "int4-awq", (Kill("raylet", 0.3, 0.0), Kill("driver", 0.4, 0.0)), rejoin_s=None)
    expected = reference(model, recipe_of(plan.recipe), tmp_path / "reference")
    one = Round(cluster, model, plan, tmp_path / "round", NUM_MARKS)
    outcome = one.run(expected)
    assert outcome.identical
    assert [hit.what for hit in outcome.hits] == ["raylet", "driver"]
    assert "now on 2 workers" in one.report()


def test_rounds_repeat_by_their_seed_and_spread_kills_over_the_whole_job() -> None:
    plans = [plan_round(seed) for seed in range(NUM_ROUNDS)]
    assert plans == [plan_round(seed) for seed in range(NUM_ROUNDS)]
    assert {plan.recipe for plan in plans} == set(RECIPES)
    kills = [kill for plan in plans for kill in plan.kills]
    assert {kill.what for kill in kills} == {"raylet", "worker", "driver"}
    assert {int(kill.at * 4) for kill in kills} == {0, 1, 2, 3}
    assert replace(plans[0], seed=1) != plans[0]

"""quantize on a cluster of several raylets, some of which die: the output has the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    RayTaskError,
)
from support.kill_rounds import (
    NUM_LAYERS,
    NUM_WORKERS,
    RECIPES,
    ROOT,
    Kill,
    Outcome,
    Plan,
    Round,
    command,
    make_deep_model,
    plan_round,
    recipe_of,
    reference,
    write_recipe,
)
from support.namespaces import Network, NotPermitted
from support.quantizing import SmallModel, contents
from support.raylets import Raylets

from deepseek.errors import CheckpointError
from quant_jobs.ray_losses import is_loss

pytestmark = pytest.mark.ray

#: Files written by an undisturbed run of the model on three workers: 10 layer files, 10 of
#: part-*.json, and one file of each worker for each of 7 boundaries.
NUM_MARKS = 41
NUM_ROUNDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_deep_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets(NUM_WORKERS) as raylets:
        yield raylets


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[Raylets]:
    with Raylets(2) as raylets:
        yield raylets


@pytest.fixture
def pair(shared_pair: Raylets) -> Raylets:
    """Two nodes; replaces those that an earlier test has killed."""
    while shared_pair.num_nodes < 2:
        shared_pair.add_node()
    return shared_pair


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_raylet_killed_in_the_middle_costs_no_byte_and_the_job_goes_on_with_those_left(
    pair: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    plan = Plan(0, "int4-gptq", (Kill("raylet", 0.3, 0.0),), rejoin_s=None)
    expected = reference(model, recipe_of(plan.recipe), tmp_path / "reference")
    kill_round = Round(pair, model, plan, tmp_path / "round", NUM_MARKS - NUM_LAYERS + 1, workers=2)
    outcome = kill_round.run(expected)
    assert pair.num_nodes == 1
    assert outcome.identical
    assert [hit.what for hit in outcome.hits] == ["raylet"]
    assert (outcome.lost, outcome.joined) == (1, 0), kill_round.report()
    # Ray's messages about its dead node are not on stdout.
    assert outcome.printed.startswith(f"{kill_round.output}: int4-gptq, "), outcome.printed
    assert outcome.printed.count("\n") == 1, outcome.printed


POOL = """
import sys, time
from ray.util import placement_group_table
from cluster.connect import connect
from quant_jobs.workers.pool import WorkerPool

answers, sys.stdout = sys.stdout, sys.stderr  # Ray says there what it thinks of dead nodes
connect()
others = set(placement_group_table())
with WorkerPool(2) as pool:
    pool.admit()
    print("ready", file=answers, flush=True)
    input()
    while not (dead := pool.recover()):
        time.sleep(0.1)  # the worker outlives its raylet by a moment
    groups = placement_group_table()
    states = sorted(groups[name]["state"] for name in groups.keys() - others)
    print(len(dead), *states, file=answers, flush=True)
    input()
    while not pool.admit():
        time.sleep(0.1)
    print(*pool.slots, file=answers, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_without_a_node_waits_in_a_new_group_for_a_node_that_joins(
    pair: Raylets,
) -> None:
    """A group in Ray's state RESCHEDULING would keep the head busy until a node joins."""
    process = subprocess.Popen(
        [sys.executable, "-c", POOL],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": pair.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert answer(process) == "ready"
            pair.kill_node(0)
            assert answer(process, "\n") == "1 CREATED PENDING REMOVED"
            pair.add_node()
            assert answer(process, "\n") == "0 1"
        finally:
            process.kill()


def answer(process: subprocess.Popen[str], to: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(to)
    process.stdin.flush()
    return process.stdout.readline().strip()


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
        kill_round = Round(cluster, model, plan, tmp_path / f"round-{seed}", NUM_MARKS)
        outcomes.append(kill_round.run(expected[plan.recipe]))
        assert outcomes[-1].identical, kill_round.report()
        assert outcomes[-1].hits, kill_round.report()
    hits = [hit.what for outcome in outcomes for hit in outcome.hits]
    assert {what: hits.count(what) > 0 for what in ("raylet", "worker", "driver")} == {
        "raylet": True,
        "worker": True,
        "driver": True,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_smaller_than_the_job_asks_for_is_used_as_it_is(
    cluster: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    """The driver and a node die, and the same command finds no room for all its workers; a worker
    joins once a node does."""
    while cluster.num_nodes < NUM_WORKERS:
        cluster.add_node()
    plan = Plan(1, "int4-awq", (Kill("raylet", 0.3, 0.0), Kill("driver", 0.4, 0.0)), rejoin_s=None)
    expected = reference(model, recipe_of(plan.recipe), tmp_path / "reference")
    kill_round = Round(cluster, model, plan, tmp_path / "round", NUM_MARKS)
    outcome = kill_round.run(expected)
    assert outcome.identical
    assert [hit.what for hit in outcome.hits] == ["raylet", "driver"]
    assert "now on 2 workers" in kill_round.report()


def failed_with(cause: BaseException) -> RayTaskError:
    """The exception that Ray raises for a call that failed with `cause`."""
    return RayTaskError("solve", "", cause)


def test_every_word_of_rays_for_a_death_means_that_the_layer_is_redone() -> None:
    deaths = [
        ActorDiedError(),
        ObjectReconstructionFailedError("0" * 56, None, ""),
        OutOfMemoryError("the memory monitor killed it"),
        failed_with(ActorDiedError()).as_instanceof_cause(),  # its argument died with a worker
        failed_with(failed_with(ObjectLostError("0" * 56, None, ""))),
    ]
    assert [is_loss(error) for error in deaths] == [True] * len(deaths)
    others = [failed_with(ValueError("a bug")), failed_with(CheckpointError("not finite")), None]
    assert [is_loss(error) for error in others] == [False] * len(others)


def test_rounds_repeat_by_their_seed_and_spread_kills_over_the_whole_job() -> None:
    plans = [plan_round(seed) for seed in range(NUM_ROUNDS)]
    assert plans == [plan_round(seed) for seed in range(NUM_ROUNDS)]
    assert {plan.recipe for plan in plans} == set(RECIPES)
    kills = [kill for plan in plans for kill in plan.kills]
    assert {kill.what for kill in kills} == {"raylet", "worker", "driver"}
    assert {int(kill.at * 4) for kill in kills} == {0, 1, 2, 3}
    assert replace(plans[0], seed=1) != plans[0]


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        network = Network(2)
    except NotPermitted as reason:
        pytest.skip(f"network namespaces are not permitted here ({reason})")
    with network:
        yield network


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_whose_network_link_is_cut_costs_no_byte(
    network: Network, model: SmallModel, tmp_path: Path
) -> None:
    """The node and its worker keep running, but their results reach no one."""
    expected = reference(model, recipe_of("int4-gptq"), tmp_path / "reference")
    recipe = write_recipe("int4-gptq", tmp_path)
    log, output = tmp_path / "driver.log", tmp_path / "out"
    driver = network.start(0, command(model, recipe, output, workers=2), log)
    deadline = time.monotonic() + 240
    try:
        while not (output / ".job" / "part-00002.json").exists():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        assert len(network.workers(1)) == len(network.workers(2)) == 1
        network.cut(2)
        assert driver.poll() is None, "the link was cut after the job had ended"
        assert network.workers(2), "the node itself was to stay"
        assert driver.wait(240) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert "lost workers [1]; doing layer" in log.read_text() or (
        "lost workers [0]; doing layer" in log.read_text()
    )
    assert contents(output) == expected

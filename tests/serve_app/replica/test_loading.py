"""A replica that loads says how far it is, and why it gives up; with fake clocks."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.engines.protocol import LoadingReplica, LoadProgress
from serve_app.replica.loading import Loading


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loading(clock: Clock) -> Loading:
    return Loading("r", pool="long", node="abc", clock=clock)


def test_the_seconds_that_are_left_follow_from_the_bytes_of_this_phase(
    loading: Loading, clock: Clock
) -> None:
    assert loading.report() == LoadingReplica(
        replica_id="r", progress=LoadProgress("starting"), elapsed_s=0.0, pool="long", node="abc"
    )
    clock.now += 50
    loading.note(LoadProgress("reading", 0, 1000))
    clock.now += 10
    loading.note(LoadProgress("reading", 200, 1000))
    report = loading.report()
    assert (report.elapsed_s, report.eta_s) == (60.0, 40.0)
    loading.note(LoadProgress("warming up"))
    clock.now += 10
    assert loading.report().eta_s is None


def test_a_phase_that_just_began_or_reads_nothing_promises_nothing(
    loading: Loading, clock: Clock
) -> None:
    loading.note(LoadProgress("reading", 500, 1000))
    clock.now += 1
    loading.note(LoadProgress("reading", 600, 1000))
    assert loading.report().eta_s is None, "a second says nothing"
    clock.now += 9
    assert loading.report().eta_s == 40.0, "what was there at the start was not read by it"
    stuck = Loading("r", pool="p", clock=clock)
    stuck.note(LoadProgress("reading", 500, 1000))
    clock.now += 60
    assert stuck.report().eta_s is None


def test_more_bytes_than_there_should_be_are_no_time_below_zero(
    loading: Loading, clock: Clock
) -> None:
    loading.note(LoadProgress("reading", 0, 10))
    clock.now += 10
    loading.note(LoadProgress("reading", 20, 10))
    assert loading.report().eta_s == 0.0


async def test_whoever_loads_is_told_of_until_it_ends(loading: Loading) -> None:
    told: list[LoadingReplica] = []
    progress = iter([None, LoadProgress("a", 1, 2), LoadProgress("b")])

    async def tell(report: LoadingReplica) -> None:
        told.append(report)

    async with loading.told(tell, lambda: next(progress, None), every_s=0.001):
        while len(told) < 5:
            await asyncio.sleep(0.001)
    count = len(told)
    await asyncio.sleep(0.01)
    assert len(told) == count, "nothing after the end"
    assert [r.progress.phase for r in told[:4]] == ["starting", "a", "b", "b"]
    assert all(report.failure is None for report in told)


async def test_the_last_word_of_a_load_that_fails_is_why(loading: Loading) -> None:
    told: list[LoadingReplica] = []

    async def tell(report: LoadingReplica) -> None:
        told.append(report)

    with pytest.raises(RuntimeError):
        async with loading.told(tell, lambda: None, every_s=0.001):
            raise RuntimeError("rank 3: model.layers.7.mlp.gate.weight is missing\nand more")
    assert told[-1].failure == "rank 3: model.layers.7.mlp.gate.weight is missing"
    assert [report.failure for report in told[:-1]] == [None] * (len(told) - 1)

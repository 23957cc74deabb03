"""What an ingress knows of replicas that load: they are neither failed nor ready."""

from __future__ import annotations

import pytest

from deepseek.engine.options import EngineLoad
from serve_app.engines.protocol import EngineInfo, LoadingReplica, LoadProgress, ReplicaStatus
from serve_app.errors import EngineUnavailable
from serve_app.routing.loading_board import SILENT_S, describe
from serve_app.routing.replica_client import ReplicaClient, StatusBoard

INFO = EngineInfo(
    max_model_len=10, kv_tokens_total=10, recipe="r", artifact_digest="a", engine="echo"
)
LOAD = EngineLoad(running=0, waiting=0, kv_tokens_used=0, kv_tokens_total=10)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def report(
    name: str = "r", done: int = 0, total: int = 0, *, eta_s: float | None = None, **more: object
) -> LoadingReplica:
    fields: dict[str, object] = {"elapsed_s": 7.0, **more}
    progress = LoadProgress("reading the weights", done, total)
    return LoadingReplica(replica_id=name, progress=progress, eta_s=eta_s, **fields)  # type: ignore[arg-type]


def ready(name: str) -> ReplicaStatus:
    return ReplicaStatus(replica_id=name, info=INFO, load=LOAD, gated=True)


async def refusal(board: StatusBoard) -> EngineUnavailable:
    with pytest.raises(EngineUnavailable) as caught:
        await ReplicaClient({}, board).statuses()
    return caught.value


async def test_a_503_says_how_far_the_replicas_are_that_load() -> None:
    board = StatusBoard(clock=Clock())
    assert str(await refusal(board)) == "no engine replica is ready; retry later"
    board.note_loading(report("a", 10 * 10**9, 20 * 10**9, eta_s=29.5))
    board.note_loading(report("b", 1 * 10**9, 20 * 10**9, eta_s=300.0))
    told = await refusal(board)
    assert str(told) == (
        "no engine replica is ready: 2 are loading (reading the weights, 10.0 GB of 20.0 GB, about "
        "30 s to go); retry later"
    )
    assert told.retry_after_s == 30
    board.note_loading(report("a", eta_s=None))
    board.note_loading(report("b", eta_s=None))
    assert (await refusal(board)).retry_after_s == 5
    board.note_loading(report("a", eta_s=5000.0))
    assert (await refusal(board)).retry_after_s == 60, "a client asks again within a minute"


def test_a_replica_that_serves_goodbyes_or_falls_silent_does_not_load() -> None:
    clock = Clock()
    board = StatusBoard(clock=clock)
    for name in "abc":
        board.note_loading(report(name))
    board.note(ready("a"))
    board.note_loading(report("a"))
    assert [r.replica_id for r in board.loading.reports()] == ["b", "c"], "a late word is late"
    board.remove("b")
    assert [r.replica_id for r in board.loading.reports()] == ["c"]
    clock.now = SILENT_S + 1
    assert board.loading.reports() == []


def test_why_a_load_failed_is_known_until_one_of_its_pool_serves() -> None:
    board = StatusBoard(clock=Clock())
    board.note_loading(report("a"))
    board.note_loading(report("a", failure="out of memory"))
    board.note_loading(report("b", pool="long", failure="rank 3 died"))
    assert board.loading.reports() == []
    assert board.loading.failures == {"default": "out of memory", "long": "rank 3 died"}
    board.note(ready("c"))
    assert board.loading.failures == {"long": "rank 3 died"}


def test_a_replica_of_which_little_is_known_tells_how_long_it_has_taken() -> None:
    assert describe(report()) == "reading the weights, 7 s so far"
    assert (
        describe(report(done=3, total=2)) == "reading the weights, 2 bytes of 2 bytes, 7 s so far"
    )

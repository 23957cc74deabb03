"""Who waits in a terminal reads of each phase of a load, and nothing of a short one."""

from __future__ import annotations

from serve_app.engines.protocol import LoadingReplica, LoadProgress
from serve_app.load_watch import SHORT_S, LoadWatch


def replica(phase: str, elapsed_s: float, name: str = "r") -> LoadingReplica:
    return LoadingReplica(replica_id=name, progress=LoadProgress(phase), elapsed_s=elapsed_s)


def test_a_line_for_each_phase_and_again_after_a_while() -> None:
    lines: list[str] = []
    watch = LoadWatch(lambda: [], lines.append, again_s=10.0)
    watch.tell([replica("reading", SHORT_S - 1)], now=1.0)
    assert lines == [], "a start of a moment needs no words"
    for now, phase in (
        (6.0, "reading"),
        (7.0, "reading"),
        (8.0, "warming"),
        (17.0, "warming"),
    ):
        watch.tell([replica(phase, now)], now=now)
    assert lines == [
        "loading: pool default, r: reading, 6 s so far",
        "loading: pool default, r: warming, 8 s so far",
    ]
    watch.tell([replica("warming", 18.0), replica("reading", 18.0, "s")], now=18.0)
    assert lines[2:] == [
        "loading: pool default, r: warming, 18 s so far",
        "loading: pool default, s: reading, 18 s so far",
    ]


def test_an_answer_that_nobody_gives_ends_nothing() -> None:
    lines: list[str] = []
    asked = 0

    def ask() -> list[LoadingReplica]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RuntimeError("no application")
        return [replica("reading", 60.0)]

    with LoadWatch(ask, lines.append, look_s=0.001, first_s=0.0) as watch:
        while not lines:
            pass
    watch._thread.join(5)
    assert not watch._thread.is_alive()
    assert lines == ["loading: pool default, r: reading, 60 s so far"]

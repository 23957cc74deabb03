"""Several pools under one owner: whose queue, which replica, and what each is told of itself."""

from __future__ import annotations

import pytest
from support.admissions import (
    INGRESS,
    Office,
    enter,
    granted,
    held,
    refused,
    seen,
    status,
)

from serve_app.routing.admission_stats import PoolStats
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.recent import WINDOW_S
from serve_app.routing.sessions import Sessions
from serve_app.routing.tickets import Join, Leave, Refusal

SHORT, LONG = ("short",), ("long",)
SPILLS = ("short", "long")


def two_pools(**settings: object) -> Office:
    """Two places in each of two replicas for short requests, one replica for long ones."""
    return Office(
        status("s1", kv=1000, pool="short"),
        status("s2", kv=1000, pool="short"),
        status("l1", kv=8000, pool="long"),
        places={"short": 2, "long": 2},
        **settings,  # type: ignore[arg-type]
    )


def stats(office: Office, pool: str) -> PoolStats:
    return next(one for one in office.admission.stats().pools if one.pool == pool)


def fill(office: Office, name: str, count: int, pools: tuple[str, ...], tokens: int = 100) -> None:
    for index in range(count):
        assert granted(office.enter(f"{name}{index}", tokens=tokens, pools=pools))


def test_a_request_runs_in_its_home_with_the_places_of_that_pool() -> None:
    office = two_pools()
    got = [granted(office.enter(f"q{i}", pools=SHORT)) for i in range(5)]
    assert [list(one.values()) for one in got] == [["s1"], ["s2"], ["s1"], ["s2"], []]
    assert granted(office.enter("long", pools=LONG)) == {"long-0": "l1"}


def test_what_waits_for_one_pool_holds_up_nobody_in_another_not_even_of_its_key() -> None:
    office = two_pools()
    fill(office, "running", 2, LONG, tokens=3000)
    for index in range(20):
        assert office.enter(f"waits{index}", tokens=3000, pools=LONG) == []
    fill(office, "running-short", 4, SHORT)
    assert office.enter("short", pools=SHORT) == []
    assert granted(office.leave("running-short0-0")) == {"short-0": "s1"}


def test_a_full_queue_of_one_pool_refuses_nobody_of_another() -> None:
    office = two_pools(max_queued_requests=2)
    fill(office, "running", 2, LONG)
    fill(office, "running-short", 4, SHORT)
    for index in range(2):
        assert office.enter(f"waits{index}", pools=LONG) == []
    assert refused(office.enter("too-much", pools=LONG)) == {"too-much-0": "queue_full"}
    assert office.enter("short", pools=SHORT) == []


def test_keys_share_each_pool_by_itself() -> None:
    office = two_pools()
    fill(office, "running-short", 4, SHORT)
    # What alice has had of the long pool costs her nothing in the short one.
    for index in range(2):
        office.enter(f"long{index}", "alice", tokens=4000, pools=LONG)
    office.enter("a", "alice", pools=SHORT)
    office.enter("b", "bob", pools=SHORT)
    assert granted(office.leave("running-short0-0")) == {"a-0": "s1"}


def test_a_request_spills_over_only_where_it_may_and_while_its_home_is_full() -> None:
    office = two_pools()
    assert granted(office.enter("first", pools=SPILLS)) == {"first-0": "s1"}
    fill(office, "running", 3, SHORT)
    assert office.enter("waits", pools=SHORT) == []
    assert granted(office.enter("spills", pools=SPILLS)) == {"spills-0": "l1"}
    office.leave("first-0", "running0-0")
    assert granted(office.enter("again", pools=SPILLS))["again-0"] in ("s1", "s2")


def test_a_pools_own_requests_go_before_those_that_spill_over_into_it() -> None:
    office = two_pools()
    fill(office, "short", 4, SHORT)
    fill(office, "long", 2, LONG)
    office.enter("spills", "alice", pools=SPILLS)
    office.enter("own", "bob", pools=LONG)
    assert granted(office.leave("long0-0")) == {"own-0": "l1"}
    assert granted(office.leave("long1-0")) == {"spills-0": "l1"}


def test_a_long_head_that_may_spill_over_is_not_passed_by_for_ever() -> None:
    office = two_pools()
    fill(office, "short", 4, SHORT, tokens=400)
    fill(office, "long", 2, LONG)
    office.enter("large", "alice", tokens=1000, pools=SPILLS)
    for index in range(6):
        office.enter(f"small{index}", "bob", tokens=100, pools=SHORT)
    answers = office.leave("short0-0", "short1-0", "short2-0", "short3-0")
    assert "large-0" in granted(answers)


def test_a_sequence_that_moves_stays_within_its_pools() -> None:
    office = two_pools()
    assert granted(office.enter("short", pools=SHORT)) == {"short-0": "s1"}
    office.say(seen(gone=("s2",)))
    assert office.move("short-0", "s1") == []
    assert granted(office.enter("spills", pools=SPILLS)) == {"spills-0": "s1"}
    assert granted(office.move("spills-0", "s1")) == {"spills-0": "l1"}


def test_what_no_pool_of_a_request_can_hold_is_refused_and_an_empty_pool_may_yet_come() -> None:
    office = two_pools()
    too_long = office.enter("q", tokens=2000, pools=SHORT)
    assert refused(too_long) == {"q-0": "context_length_exceeded"}
    assert office.enter("r", tokens=2000, pools=("short", "starting")) == []


# Sessions.


def test_a_session_comes_back_to_its_replica_and_others_go_to_the_least_used() -> None:
    office = two_pools(slack=0.5)
    assert granted(office.enter("a", pools=SHORT, affinity="x")) == {"a-0": "s1"}
    office.leave("a-0", used=100)
    assert granted(office.enter("b", pools=SHORT)) == {"b-0": "s1"}
    assert granted(office.enter("c", pools=SHORT, affinity="x")) == {"c-0": "s1"}
    assert granted(office.enter("d", pools=SHORT, affinity="y")) == {"d-0": "s2"}


@pytest.mark.parametrize(("slack", "replica"), [(0.4, "s2"), (0.5, "s1")])
def test_a_session_leaves_a_replica_that_is_much_fuller_than_the_emptiest(
    slack: float, replica: str
) -> None:
    office = two_pools(slack=slack)
    office.enter("a", pools=SHORT, affinity="x")  # half of the places of s1
    assert granted(office.enter("b", pools=SHORT, affinity="x")) == {"b-0": replica}


def test_a_session_never_waits_for_its_replica() -> None:
    office = two_pools(slack=1.0)
    for name in ("a", "b"):
        assert granted(office.enter(name, pools=SHORT, affinity="x")) == {f"{name}-0": "s1"}
    assert granted(office.enter("c", pools=SHORT, affinity="x")) == {"c-0": "s2"}
    # From now on that one is its replica.
    office.leave("a-0", "b-0", "c-0")
    assert granted(office.enter("d", pools=SHORT, affinity="x")) == {"d-0": "s2"}


def test_a_session_that_has_spilled_over_goes_home_as_soon_as_there_is_room() -> None:
    office = two_pools(slack=1.0)
    assert granted(office.enter("first", pools=SPILLS, affinity="x")) == {"first-0": "s1"}
    fill(office, "running", 3, SHORT)
    assert granted(office.enter("spilled", pools=SPILLS, affinity="x")) == {"spilled-0": "l1"}
    office.leave("first-0", "running0-0", "running1-0", "running2-0")
    assert granted(office.enter("home", pools=SPILLS, affinity="x")) == {"home-0": "s1"}


def test_a_session_does_not_try_out_a_replica_that_fails() -> None:
    office = two_pools(slack=1.0)
    for name in ("a", "b", "c"):
        assert granted(office.enter(name, pools=SHORT, affinity="x")) == {f"{name}-0": "s1"}
        office.leave(f"{name}-0", failed=True)
    assert granted(office.enter("d", pools=SHORT, affinity="x")) == {"d-0": "s2"}


def test_a_new_owner_learns_sessions_of_what_runs() -> None:
    office = two_pools(slack=1.0)
    office.enter("other", pools=SHORT)
    first = enter("first", pools=SHORT, affinity="x")
    assert granted(office.say(first)) == {"first-0": "s2"}
    office.new_owner()
    office.say(Join(held=(held(first, "s2"),)))
    office.report()
    assert granted(office.enter("next", pools=SHORT, affinity="x")) == {"next-0": "s2"}


def test_sessions_are_bounded_and_forgotten() -> None:
    sessions = Sessions(max_sessions=2, ttl_s=10.0)
    sessions.note("", "p", "r", 0.0)
    assert len(sessions) == 0
    for moment, name in enumerate(("a", "b", "a", "c")):
        sessions.note(name, "p", f"r{moment}", float(moment))
    assert [sessions.find(name, "p", 4.0) for name in "abc"] == ["r2", None, "r3"]
    assert sessions.find("a", "q", 4.0) is None
    assert sessions.find("a", "p", 12.5) is None
    sessions.prune(14.0)
    assert len(sessions) == 0


# A pool without replicas.


def test_who_waits_for_a_pool_without_replicas_is_told_that_it_has_none() -> None:
    office = two_pools(max_wait_s=5.0)
    office.say(seen(gone=("l1",)))
    assert office.enter("q", pools=LONG) == []
    del office.replicas["l1"]
    office.wait(5.5)
    (answer,) = office.later()
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.retry_after_s) == ("engine_unavailable", 5)
    assert "no engine of pool long is ready" in answer.message


def test_a_pool_that_starts_its_first_replica_holds_who_asks_or_refuses_at_once() -> None:
    empty = {"places": {"long": 2}, "max_wait_s": 5.0}
    holds = Office(**empty, more={"wakes_up": frozenset(LONG)})  # type: ignore[arg-type]
    assert holds.enter("q", pools=LONG) == []
    holds.wait(60.0)
    assert holds.later() == []
    assert stats(holds, "long").waiting == 1
    holds.replicas["l1"] = status("l1", pool="long")
    holds.wait(1.0)
    assert granted(holds.later()) == {"q-0": "l1"}

    wakes = {"wakes_up": frozenset(LONG), "refuses": frozenset(LONG)}
    refuses = Office(**empty, more=wakes)  # type: ignore[arg-type]
    assert refused(refuses.enter("q", pools=LONG)) == {"q-0": "engine_unavailable"}
    assert (stats(refuses, "long").waiting, stats(refuses, "long").turned_away) == (0, 1)
    refuses.now += WINDOW_S + 1
    assert stats(refuses, "long").turned_away == 0


# Figures.


def test_figures_of_a_pool_are_its_own() -> None:
    office = two_pools()
    fill(office, "short", 4, SHORT)
    office.enter("waits", tokens=300, pools=SHORT)
    office.now += 2.0
    short, long = stats(office, "short"), stats(office, "long")
    assert (short.ready, short.running, short.waiting, short.waiting_tokens) == (2, 4, 1, 300)
    assert short.oldest_wait_s == pytest.approx(2.0)
    assert short.kv_share == pytest.approx(400 / 2000)
    assert short.places_share == 1.0
    assert (long.ready, long.running, long.waiting, long.oldest_wait_s) == (1, 0, 0, 0.0)
    assert long.kv_share == 0.0


def test_latencies_are_those_of_nine_of_ten_requests_of_the_last_seconds() -> None:
    office = two_pools()
    assert stats(office, "short").ttft_p90_s is None
    fill(office, "running", 3, SHORT)
    assert granted(office.enter("spilled", pools=SPILLS)) == {"spilled-0": "s2"}
    for index in range(10):
        assert granted(office.enter(f"q{index}", pools=SPILLS)) == {f"q{index}-0": "l1"}
        office.say(
            Leave(
                sequence_id=f"q{index}-0",
                used_tokens=100,
                ttft_s=1.0 + index,
                itl_s=0.01 * (1 + index),
            )
        )
    # A first token that comes late is the fault of the home; the time between tokens that of the
    # engine which made them.
    assert stats(office, "short").ttft_p90_s == 9.0
    assert stats(office, "short").itl_p90_s is None
    assert stats(office, "long").itl_p90_s == pytest.approx(0.09)
    office.now += WINDOW_S + 1
    assert stats(office, "short").ttft_p90_s is None


def test_other_places_of_a_pool_hold_at_once_and_a_pool_that_is_gone_drains() -> None:
    office = two_pools()
    fill(office, "short", 4, SHORT)
    fill(office, "long", 2, LONG)
    for name, pools in (("s", SHORT), ("l", LONG)):
        assert office.enter(name, pools=pools) == []
    office.admission.configure(OwnerSettings(admission=office.settings, places={"short": 3}))
    assert granted(office.later()) == {"s-0": "s1"}
    assert granted(office.leave("long0-0")) == {"l-0": "l1"}
    assert stats(office, "long").running == 2
    del office.replicas["l1"]
    office.leave("long1-0", "l-0")
    office.wait(70.0)
    assert [one.pool for one in office.admission.stats().pools] == ["short"]


def test_a_pool_that_is_configured_has_figures_without_replicas() -> None:
    office = Office(places={"short": 2, "long": 2})
    assert office.admission.knows(INGRESS)
    assert {one.pool: one.ready for one in office.admission.stats().pools} == {
        "short": 0,
        "long": 0,
    }

"""Who is next: bands, shares of tokens, order within a key, and who gives way."""

from __future__ import annotations

import pytest
from support.admissions import ask

from serve_app.routing.fair_queue import MAX_LAG, QUANTUM, FairQueue
from serve_app.routing.quotas import Key
from serve_app.routing.tickets import Terms
from serve_app.routing.visits import Sequence, Visit


class Line:
    """A queue from which one sequence is taken at a time."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.count = 0
        self.visits: dict[str, Visit] = {}

    def add(
        self,
        key: str,
        tokens: int = 100,
        *,
        n: int = 1,
        deadline: float | None = None,
        **terms: float,
    ) -> str:
        self.count += 1
        visit = Visit(
            request_id=f"{key}{self.count}",
            ingress_id="i",
            key=Key(Terms(name=key), 0.0),
            terms=Terms(name=key, **terms),  # type: ignore[arg-type]
            entered=float(self.count),
            deadline=deadline or 1e9,
            own_deadline=deadline is not None,
            order=self.count,
        )
        for index in range(n):
            item = ask(f"{visit.request_id}-{index}", tokens)
            visit.waiting[item.sequence_id] = Sequence(item, visit)
        self.queue.add(visit)
        self.visits[visit.request_id] = visit
        return visit.request_id

    def take(self, max_tokens: int = 10**9) -> str | None:
        """The request of the first sequence in order that has at most `max_tokens`."""
        taken: list[str] = []

        def try_place(sequence: Sequence, is_head: bool) -> bool:
            if taken or sequence.tokens > max_tokens:
                return False
            self.queue.remove(sequence)
            self.queue.charge(sequence.visit, sequence.tokens)
            taken.append(sequence.visit.request_id)
            return True

        for priority in sorted(self.queue.bands):
            self.queue.place(priority, try_place, lambda: not taken)
        return taken[0] if taken else None

    def shares(self, tokens: int) -> dict[str, int]:
        """Tokens by key, of the next grants of so many tokens."""
        got: dict[str, int] = {}
        while sum(got.values()) < tokens:
            visit = self.visits[self.take() or ""]
            name = visit.terms.name
            got[name] = got.get(name, 0) + next(iter(self.sizes[name]))
        return got

    sizes: dict[str, set[int]] = {}


@pytest.mark.parametrize(("weight", "small", "large"), [(1.0, 50, 5000), (3.0, 700, 900)])
def test_keys_share_tokens_by_weight_whatever_their_sizes(
    weight: float, small: int, large: int
) -> None:
    line = Line()
    line.sizes = {"a": {small}, "b": {large}}
    for _ in range(3000):
        line.add("a", small, weight=weight)
    for _ in range(300):
        line.add("b", large)
    got = line.shares(120_000)
    assert abs(got["a"] / weight - got["b"]) <= QUANTUM + small + large


def test_a_lower_priority_number_goes_strictly_first() -> None:
    line = Line()
    line.add("batch", priority=1)
    line.add("user", priority=0)
    line.add("user", priority=0)
    assert [line.take()[:4] for _ in range(3)] == ["user", "user", "batc"]  # type: ignore[index]


def test_within_a_key_own_deadlines_go_first_then_arrival() -> None:
    line = Line()
    order = [line.add("a"), line.add("a", deadline=90.0), line.add("a", deadline=30.0)]
    order.append(line.add("a"))
    assert [line.take() for _ in range(4)] == [order[2], order[1], order[0], order[3]]


def test_choices_of_a_request_go_one_after_the_other() -> None:
    line = Line()
    first, second = line.add("a", n=2), line.add("a")
    assert [line.take() for _ in range(3)] == [first, first, second]


def test_an_idle_key_keeps_no_credit() -> None:
    line = Line()
    line.sizes = {"a": {100}, "b": {100}}
    line.add("b", 100)
    line.take()
    for _ in range(200):
        line.add("a", 100)
    line.shares(15_000)
    for _ in range(100):
        line.add("b", 100)
    got = line.shares(5_000)
    assert abs(got["a"] - got["b"]) <= 2 * QUANTUM


def test_a_large_request_of_an_idle_key_is_paid_with_its_next_rounds() -> None:
    line = Line()
    line.sizes = {"a": {1000}, "b": {1000}}
    line.add("a", 20_000)
    line.add("b", 1000)
    line.take()
    line.take()
    for _ in range(30):
        line.add("a", 1000)
        line.add("b", 1000)
    got = line.shares(17_000)
    assert got.get("a", 0) <= 2 * QUANTUM


def test_what_comes_back_unused_is_granted_again() -> None:
    line = Line()
    line.sizes = {"a": {1000}, "b": {1000}}
    for _ in range(60):
        line.add("a", 1000)
        line.add("b", 1000)
    visit = line.visits["a1"]
    line.queue.charge(visit, 10_000)
    line.queue.charge(visit, -10_000)
    got = line.shares(20_000)
    assert abs(got["a"] - got["b"]) <= QUANTUM + 1000


def test_credit_is_bounded() -> None:
    line = Line()
    line.add("a", 100)
    line.add("b", 100)
    for _ in range(1000):
        line.queue.charge(line.visits["a1"], -10_000)
    flow = line.queue.bands[0].flows["a"]
    assert flow.deficit <= MAX_LAG * QUANTUM


def test_a_key_without_credit_waits_as_it_should_although_nobody_else_does() -> None:
    line = Line()
    line.add("a", 10**6)
    later = line.add("a", 100)
    line.take()
    assert line.take() == later


def test_behind_a_blocked_head_its_key_and_others_go_on() -> None:
    line = Line()
    line.add("a", 5000)
    small, other = line.add("a", 100), line.add("b", 100)
    assert {line.take(1000), line.take(1000)} == {small, other}
    assert line.take(1000) is None
    assert line.take() == "a1"


def test_counts_return_to_nothing() -> None:
    line = Line()
    line.add("a", 100, n=3)
    line.add("b", 50)
    assert (line.queue.sequences, line.queue.tokens) == (4, 350)
    for _ in range(4):
        line.take()
    assert (line.queue.sequences, line.queue.tokens) == (0, 0)
    line.queue.prune()
    assert not line.queue.bands


def ways(line: Line, newcomer: str) -> list[str]:
    return [visit.request_id for visit in line.queue.gives_way(line.visits[newcomer])]


def test_the_newest_of_the_key_with_most_waiting_gives_way_until_it_has_less() -> None:
    line = Line()
    a = [line.add("a", 100) for _ in range(5)]
    line.add("b", 100)
    newcomer = line.add("b", 100)
    assert ways(line, newcomer) == [a[4], a[3], a[2]]


def test_the_key_with_most_waiting_pushes_nobody_out() -> None:
    line = Line()
    line.add("b", 100)
    line.add("a", 100)
    assert ways(line, line.add("a", 100)) == []


def test_who_waits_for_nothing_else_takes_from_who_has_more_than_one() -> None:
    line = Line()
    a = [line.add("a", 10) for _ in range(3)]
    assert ways(line, line.add("b", 5000)) == [a[2], a[1]]


def test_lower_bands_give_way_before_ones_own() -> None:
    line = Line()
    own = [line.add("a", 100) for _ in range(9)]
    low, lowest = line.add("c", 100, priority=5), line.add("d", 100, priority=9)
    assert ways(line, line.add("b", 100))[:3] == [lowest, low, own[8]]
    assert ways(line, line.add("e", 10, priority=7)) == [lowest]


def test_a_request_that_runs_in_part_does_not_give_way() -> None:
    line = Line()
    a = [line.add("a", 100) for _ in range(3)]
    line.visits[a[2]].placed = True
    assert ways(line, line.add("b", 10)) == [a[1], a[0]]

"""Whatever happens in whatever order: nothing is lost, said twice, or placed where no room is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.admissions import enter, seen, status

from serve_app.routing.admission import Admission
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.tickets import Answer, Enter, Grant, Held, Join, Leave, Move
from serve_app.sections import AdmissionSection
from serve_app.setting_types import POOL

INGRESSES = ("i1", "i2")
PLACES, MAX_WAIT_S = 3, 20.0
#: Unequal replicas: KV tokens of each.
SIZES = {"r1": 300, "r2": 300, "r3": 800}


@dataclass
class Asked:
    """A sequence as its ingress knows it."""

    ingress: str
    request: Enter
    index: int
    arrived: float
    deadline: float
    state: str = "waiting"  # held, moving, refused, left
    replica: str | None = None
    lost: str | None = None
    placed: bool = False

    @property
    def tokens(self) -> int:
        return self.request.asks[self.index].kv_tokens


class Ingresses(RuleBasedStateMachine):
    """Two ingresses, an owner that may die, three engines that may go."""

    #: The pool of each engine, and what a request may say of pools.
    pools: ClassVar = dict.fromkeys(SIZES, POOL)
    routes: tuple[tuple[str, ...], ...] = ((POOL,),)

    @initialize()
    def start(self) -> None:
        self.now = 100.0
        self.asked: dict[str, Asked] = {}
        self.alive = set(SIZES)
        self.count = 0
        self.new_owner()
        self.beat()

    def new_owner(self) -> None:
        section = AdmissionSection(max_queued_requests=12, max_wait_s=MAX_WAIT_S)
        places = dict.fromkeys(self.pools.values(), PLACES)
        settings = OwnerSettings(admission=section, places=places)
        self.admission = Admission(settings, lambda: self.now)
        for ingress in INGRESSES:
            self.say(ingress, self.join(ingress))

    def join(self, ingress: str) -> Join:
        mine = {k: a for k, a in self.asked.items() if a.ingress == ingress}
        waiting: dict[str, list[Asked]] = {}
        for asked in mine.values():
            if asked.state == "waiting":
                waiting.setdefault(asked.request.request_id, []).append(asked)
        return Join(
            held=tuple(self.held(a, a.replica) for a in mine.values() if a.state == "held"),
            waiting=tuple(
                Enter(
                    request_id=request_id,
                    terms=group[0].request.terms,
                    asks=tuple(a.request.asks[a.index] for a in group),
                    seconds_left=group[0].deadline - self.now,
                    waited_s=self.now - group[0].arrived,
                    placed=self.runs(group[0]),
                )
                for request_id, group in waiting.items()
            ),
            moving=tuple(
                (self.held(a, a.lost), self.moved(k, a))
                for k, a in mine.items()
                if a.state == "moving"
            ),
        )

    def held(self, asked: Asked, replica: str | None) -> Held:
        assert replica is not None
        return Held(
            request_id=asked.request.request_id,
            terms=asked.request.terms,
            ask=asked.request.asks[asked.index],
            replica_id=replica,
            seconds_left=asked.deadline - self.now,
        )

    def moved(self, sequence_id: str, asked: Asked) -> Move:
        assert asked.lost is not None
        return Move(
            sequence_id=sequence_id,
            lost=asked.lost,
            blame=False,
            seconds_left=asked.deadline - self.now,
        )

    def say(self, ingress: str, *messages: object) -> None:
        self.hear(ingress, self.admission.take(ingress, messages))  # type: ignore[arg-type]
        for other in INGRESSES:
            self.hear(other, self.admission.answers_for(other))

    def hear(self, ingress: str, answers: list[Answer]) -> None:
        for answer in answers:
            ids = (answer.sequence_id,) if isinstance(answer, Grant) else answer.sequence_ids
            for sequence_id in ids:
                asked = self.asked[sequence_id]
                assert asked.ingress == ingress, "an answer to the wrong ingress"
                assert asked.state in ("waiting", "moving"), f"{asked.state}, and {answer}"
                if isinstance(answer, Grant):
                    assert answer.replica_id != asked.lost
                    assert answer.replica_id in self.alive
                    ask = asked.request.asks[asked.index]
                    assert self.pools[answer.replica_id] in ask.pools
                    if not asked.placed:
                        assert self.now - asked.arrived <= MAX_WAIT_S + 1.0 or self.runs(asked)
                    asked.state, asked.replica, asked.placed = "held", answer.replica_id, True
                else:
                    asked.state, asked.replica = "refused", None
                    if answer.code in ("waited_too_long", "engine_unavailable"):
                        assert not self.runs(asked)
                        assert self.now - asked.arrived >= MAX_WAIT_S

    def runs(self, asked: Asked) -> bool:
        """Whether some sequence of the request has had a place."""
        mates = [a for a in self.asked.values() if a.request is asked.request]
        return any(mate.placed for mate in mates)

    def beat(self) -> None:
        """Heartbeats, which name what runs in each replica."""
        for ingress in INGRESSES:
            self.say(ingress, seen(*(self.status(name) for name in sorted(self.alive))))

    def status(self, name: str):  # type: ignore[no-untyped-def]
        mine = {k: a for k, a in self.asked.items() if a.state == "held" and a.replica == name}
        used = sum(a.tokens for a in mine.values())
        pool = self.pools[name]
        return status(name, kv=SIZES[name], used=used, request_ids=tuple(mine), pool=pool)

    @rule(
        ingress=st.sampled_from(INGRESSES),
        key=st.sampled_from(["alice", "bob", "carol"]),
        tokens=st.sampled_from([20, 90, 140, 280, 700]),
        n=st.integers(1, 3),
        deadline=st.sampled_from([3.0, 100.0]),
        session=st.sampled_from(["", "x", "y"]),
        data=st.data(),
    )
    def ask(
        self,
        ingress: str,
        key: str,
        tokens: int,
        n: int,
        deadline: float,
        session: str,
        data: st.DataObject,
    ) -> None:
        self.count += 1
        request = enter(
            f"q{self.count}",
            key,
            tokens=tokens,
            n=n,
            seconds_left=deadline,
            pools=data.draw(st.sampled_from(self.routes)),
            affinity=session,
        )
        for index, item in enumerate(request.asks):
            self.asked[item.sequence_id] = Asked(
                ingress, request, index, self.now, self.now + deadline
            )
        self.say(ingress, request)
        states = {self.asked[item.sequence_id].state for item in request.asks}
        assert states == {"refused"} or "refused" not in states, "refused in part"

    def pick(self, data: st.DataObject, *states: str) -> str | None:
        ids = [k for k, a in self.asked.items() if a.state in states]
        return data.draw(st.sampled_from(ids)) if ids else None

    @rule(data=st.data(), ran=st.booleans())
    def leave(self, data: st.DataObject, ran: bool) -> None:
        if (sequence_id := self.pick(data, "waiting", "held", "moving")) is not None:
            asked = self.asked[sequence_id]
            asked.state, asked.replica = "left", None
            used = asked.tokens if ran else 0
            self.say(asked.ingress, Leave(sequence_id=sequence_id, used_tokens=used))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if (sequence_id := self.pick(data, "held")) is not None:
            asked = self.asked[sequence_id]
            asked.state, asked.lost, asked.replica = "moving", asked.replica, None
            self.say(asked.ingress, self.moved(sequence_id, asked))

    @precondition(lambda self: len(self.alive) > 1)
    @rule(data=st.data(), goodbye=st.booleans())
    def replica_goes(self, data: st.DataObject, goodbye: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        if goodbye:
            self.say("i1", seen(gone=(name,)))
        else:
            self.let_pass(6.0, without=name)
        self.alive.discard(name)
        for sequence_id, asked in self.asked.items():
            if asked.state == "held" and asked.replica == name:
                asked.state, asked.lost, asked.replica = "moving", name, None
                self.say(asked.ingress, self.moved(sequence_id, asked))

    @precondition(lambda self: len(self.alive) < len(SIZES))
    @rule()
    def replicas_come_back_to_a_new_owner(self) -> None:
        self.alive = set(SIZES)
        for asked in self.asked.values():
            asked.lost = asked.lost if asked.state == "moving" else None
        self.owner_dies()

    @rule()
    def owner_dies(self) -> None:
        self.new_owner()
        self.beat()

    @rule(ingress=st.sampled_from(INGRESSES))
    def joins_again(self, ingress: str) -> None:
        self.say(ingress, self.join(ingress))

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.let_pass(seconds)

    def let_pass(self, seconds: float, without: str | None = None) -> None:
        steps = round(seconds / 0.1)
        for step in range(steps):
            self.now += 0.1
            if step % 10 == 9:
                names = [name for name in sorted(self.alive) if name != without]
                for ingress in INGRESSES:
                    self.say(ingress, seen(*map(self.status, names)))
            self.admission.tick()
            for ingress in INGRESSES:
                self.hear(ingress, self.admission.answers_for(ingress))

    @invariant()
    def no_replica_has_more_than_it_holds(self) -> None:
        if not hasattr(self, "asked"):
            return
        for name, kv in SIZES.items():
            mine = [a for a in self.asked.values() if a.state == "held" and a.replica == name]
            assert len(mine) <= PLACES
            assert sum(asked.tokens for asked in mine) <= kv

    @invariant()
    def the_owner_counts_what_the_ingresses_hold(self) -> None:
        if not hasattr(self, "asked"):
            return
        stats = self.admission.stats()
        counts = {use.replica_id: use.held for use in stats.replicas if use.held}
        held = [a.replica for a in self.asked.values() if a.state == "held"]
        assert counts == {name: held.count(name) for name in set(held)}
        tokens = {use.replica_id: use.kv_tokens_held for use in stats.replicas if use.held}
        for name in tokens:
            mine = [a for a in self.asked.values() if a.state == "held" and a.replica == name]
            assert tokens[name] == sum(asked.tokens for asked in mine)
        waiting = [a for a in self.asked.values() if a.state == "waiting"]
        assert sum(queued.sequences for queued in stats.queued) == len(waiting)
        assert sum(queued.kv_tokens for queued in stats.queued) == sum(a.tokens for a in waiting)
        assert stats.moving == sum(a.state == "moving" for a in self.asked.values())
        assert not self.admission.pending_ingresses()

    @invariant()
    def a_head_that_fits_does_not_wait(self) -> None:
        if not hasattr(self, "asked"):
            return
        open_to_all = [
            use
            for use in self.admission.stats().replicas
            if use.fresh and not use.reserved and use.replica_id in self.alive
        ]
        heads: dict[tuple[str, str], Asked] = {}  # by home and key
        for asked in self.asked.values():  # in order of arrival
            if asked.state == "waiting":
                home = asked.request.asks[0].pools[0]
                heads.setdefault((home, asked.request.terms.name), asked)
        for asked in heads.values():
            for use in open_to_all:
                if use.pool not in asked.request.asks[0].pools:
                    continue
                free = use.kv_tokens_total - use.kv_tokens_held - use.kv_tokens_ghosts
                has_place = use.held + use.ghosts < use.places
                assert not (has_place and asked.tokens <= free), "a head that fits waits"

    def teardown(self) -> None:
        if hasattr(self, "asked"):
            self.let_pass(MAX_WAIT_S + 1.0)
            stuck = [k for k, a in self.asked.items() if a.state == "waiting" and not self.runs(a)]
            assert not stuck, "neither granted nor refused"


SETTINGS = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class IngressesOfTwoPools(Ingresses):
    """The same with two pools, each of which may be left empty."""

    pools: ClassVar = {"r1": "a", "r2": "a", "r3": "b"}
    routes = (("a",), ("b",), ("a", "b"), ("b", "a"))

    @invariant()
    def figures_of_the_pools_are_those_of_their_requests(self) -> None:
        if not hasattr(self, "asked"):
            return
        for of_pool in self.admission.stats().pools:
            mine = [a for a in self.asked.values() if a.request.asks[0].pools[0] == of_pool.pool]
            waiting = [a for a in mine if a.state in ("waiting", "moving")]
            assert of_pool.waiting == len(waiting)
            assert of_pool.waiting_tokens == sum(a.tokens for a in waiting)


@pytest.mark.heavy
@pytest.mark.parametrize("machine", [Ingresses, IngressesOfTwoPools])
def test_nothing_is_lost_said_twice_or_placed_without_room(machine: type[Ingresses]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)

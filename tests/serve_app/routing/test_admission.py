"""What admission decides, claim by claim."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from support.admissions import INGRESS, Office, enter, granted, held, refused, seen, status

from serve_app.errors import CODES
from serve_app.routing.admission import UnknownIngress
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.tickets import Join, Landed, Leave, Move, Refusal, Spent, Terms
from serve_app.setting_types import POOL


def retry(answers: list) -> int:  # type: ignore[type-arg]
    (refusal,) = [a for a in answers if isinstance(a, Refusal)]
    return refusal.retry_after_s


# Places.


def test_a_request_that_fits_gets_a_place_at_once() -> None:
    office = Office(status("r1"))
    assert granted(office.enter("a")) == {"a-0": "r1"}


def test_what_does_not_fit_waits_until_something_leaves() -> None:
    office = Office(status("r1", kv=250))
    assert granted(office.enter("a", n=2)) == {"a-0": "r1", "a-1": "r1"}
    assert office.enter("b") == []
    assert granted(office.leave("a-0", used=100)) == {"b-0": "r1"}


def test_places_are_those_of_the_pool_and_of_the_engines_batch() -> None:
    office = Office(status("r1"), status("r2", max_running=1), places=2)
    assert sorted(granted(office.enter("a", tokens=10, n=4)).values()) == ["r1", "r1", "r2"]


def test_the_replica_with_the_least_used_share_is_chosen() -> None:
    office = Office(status("r1", kv=1000), status("r2", kv=4000), places=8)
    places = [granted(office.enter(f"q{i}", tokens=500))[f"q{i}-0"] for i in range(4)]
    assert places == ["r1", "r2", "r2", "r2"]


def test_nothing_goes_to_a_replica_that_is_silent_or_has_said_goodbye() -> None:
    office = Office(status("r1"), status("r2"))
    office.say(seen(gone=("r1",)))
    assert granted(office.enter("a")) == {"a-0": "r2"}
    del office.replicas["r2"]
    office.wait(5.2)
    assert office.enter("b") == []
    office.replicas["r3"] = status("r3")
    office.report()
    assert granted(office.later()) == {"b-0": "r3"}


def test_the_age_of_a_status_counts_and_an_older_one_does_not() -> None:
    office = Office()
    office.say(seen(status("r1"), age_s=5.5))
    assert office.enter("a") == []
    assert granted(office.say(seen(status("r1", kv=200), age_s=1.0))) == {"a-0": "r1"}
    office.say(seen(status("r1", kv=5000), age_s=3.0))
    (use,) = office.admission.stats().replicas
    assert use.kv_tokens_total == 200


def test_a_status_that_comes_after_the_goodbye_brings_nobody_back() -> None:
    office = Office(status("r1"))
    office.say(seen(gone=("r1",)))
    office.wait(2.0)
    assert office.enter("a") == []


def test_sequences_that_nobody_holds_occupy_places_while_they_are_reported() -> None:
    office = Office(status("r1", used=900, request_ids=("ghost",)), places=2)
    assert granted(office.enter("a", tokens=100)) == {"a-0": "r1"}
    assert office.enter("b", tokens=1) == []
    office.replicas["r1"] = status("r1")
    office.wait(1.0)
    assert granted(office.later()) == {"b-0": "r1"}


def test_a_sequence_that_has_just_left_is_no_ghost_but_one_that_stays_becomes_one() -> None:
    office = Office(status("r1"), places=1)
    office.enter("a")
    office.leave("a-0", used=10)
    office.replicas["r1"] = status("r1", used=100, request_ids=("a-0",))
    office.wait(1.0)
    assert granted(office.enter("b")) == {"b-0": "r1"}
    office.leave("b-0", used=10)
    office.wait(3.5)
    assert office.enter("c") == []


def test_a_ghost_that_an_ingress_claims_is_counted_once() -> None:
    office = Office(status("r1", used=100, request_ids=("a-0",)), places=2)
    other = enter("a")
    office.admission.take("i2", [Join(held=(held(other, "r1"),))])
    (use,) = office.admission.stats().replicas
    assert (use.held, use.ghosts, use.kv_tokens_held, use.kv_tokens_ghosts) == (1, 0, 100, 0)


def test_a_sequence_that_lands_elsewhere_is_counted_there() -> None:
    office = Office(status("r1"), status("r2"), places=1)
    office.enter("a")
    office.say(Landed(sequence_id="a-0", replica_id="r2"))
    assert granted(office.enter("b")) == {"b-0": "r1"}


# Long prompts.


def test_a_blocked_head_keeps_one_replica_free_and_the_rest_goes_on() -> None:
    office = Office(status("r1"), status("r2"), places=8)
    office.enter("a", tokens=600, n=2)
    assert office.enter("long", tokens=900) == []
    assert granted(office.enter("small", "bob", tokens=100)) == {"small-0": "r2"}
    assert granted(office.enter("own", tokens=100)) == {"own-0": "r2"}
    assert office.enter("more", "bob", tokens=250) == []
    assert granted(office.leave("a-0", used=600)) == {"long-0": "r1"}


def test_small_requests_do_not_starve_a_long_one() -> None:
    office = Office(status("r1", kv=1000), places=100, max_wait_s=1000.0)
    for i in range(10):
        office.enter(f"q{i}", "bob", tokens=100)
    office.enter("long", tokens=800)
    for i in range(10, 20):
        office.enter(f"q{i}", "bob", tokens=100)
    out: list[str] = []
    for i in range(10):
        out += granted(office.leave(f"q{i}-0", used=100))
        if "long-0" in out:
            break
    assert out[-1] == "long-0"


def test_a_higher_band_does_not_wait_for_a_long_one_of_a_lower() -> None:
    office = Office(status("r1"), places=8)
    office.enter("a", tokens=600)
    office.enter("long", Terms(name="batch", priority=5), tokens=900)
    assert office.enter("low", Terms(name="batch2", priority=5), tokens=100) == []
    assert granted(office.enter("user", tokens=100)) == {"user-0": "r1"}


def test_what_no_replica_can_ever_hold_is_refused_and_not_queued() -> None:
    office = Office(status("r1", kv=500), status("r2", kv=2000, max_model_len=1500))
    assert refused(office.enter("a", tokens=1600)) == {"a-0": "context_length_exceeded"}
    assert granted(office.enter("b", tokens=1400)) == {"b-0": "r2"}
    assert office.enter("c", tokens=1400) == []


def test_pages_beyond_the_cache_do_not_shut_out_what_fits() -> None:
    office = Office(status("r1", kv=1000))
    rounded = enter("a", tokens=1000)
    ask = rounded.asks[0]
    wide = type(ask)(sequence_id="a-0", prompt_tokens=500, output_tokens=524, charge=1000)
    assert granted(
        office.say(
            type(rounded)(request_id="a", terms=rounded.terms, asks=(wide,), seconds_left=60.0)
        )
    ) == {"a-0": "r1"}


def test_without_replicas_requests_wait_and_are_bounded() -> None:
    office = Office(max_queued_requests=2, max_wait_s=10.0)
    assert office.enter("a", n=2) == []
    assert refused(office.enter("b")) == {"b-0": "queue_full"}
    office.wait(9.0)
    assert office.later() == []
    office.wait(1.2)
    assert refused(office.later()) == {"a-0": "engine_unavailable", "a-1": "engine_unavailable"}


# The queue.


def test_a_request_enters_whole_or_not_at_all() -> None:
    office = Office(status("r1"), places=2, max_queued_requests=1)
    assert refused(office.enter("a", n=4)) == {f"a-{i}": "queue_full" for i in range(4)}
    (use,) = office.admission.stats().replicas
    assert use.held == 0
    assert granted(office.enter("b", n=3)) == {"b-0": "r1", "b-1": "r1"}


def test_a_queue_of_nothing_lets_in_what_has_room_at_once() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=0)
    assert granted(office.enter("a")) == {"a-0": "r1"}
    assert refused(office.enter("b")) == {"b-0": "queue_full"}
    office.leave("a-0", used=100)
    assert granted(office.enter("c")) == {"c-0": "r1"}


def test_the_queue_is_bounded_in_tokens_but_takes_one_request_of_any_size() -> None:
    office = Office(status("r1"), places=1, max_queued_tokens=300)
    office.enter("a")
    assert office.enter("b", tokens=900) == []
    assert refused(office.enter("c")) == {"c-0": "queue_full"}
    office.leave("a-0", used=100)
    assert office.enter("d", tokens=300) == []
    assert refused(office.enter("e", tokens=1)) == {"e-0": "queue_full"}


def test_in_a_full_queue_the_key_with_most_waiting_gives_way() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=3)
    office.enter("a0")
    for i in (1, 2, 3):
        office.enter(f"a{i}")
    assert refused(office.enter("b1", "bob")) == {"a3-0": "queue_full"}
    assert refused(office.enter("b2", "bob")) == {"b2-0": "queue_full"}
    assert refused(office.enter("a4")) == {"a4-0": "queue_full"}


def test_the_one_that_gives_way_is_told_through_its_own_ingress() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=2, ingresses=(INGRESS, "i2"))
    for i in range(3):
        office.enter(f"a{i}", ingress="i2")
    office.later("i2")
    assert office.enter("b", "bob") == []
    assert office.admission.pending_ingresses() == {"i2"}
    assert refused(office.later("i2")) == {"a2-0": "queue_full"}


def test_retry_after_is_what_waits_over_the_measured_drain_rate() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=10, max_wait_s=1000.0)
    for i in range(11):
        office.enter(f"a{i}", tokens=100)
    for i in range(60):
        office.wait(2.0)
        office.leave(f"a{i}-0", used=100)
        office.enter(f"a{i + 11}", tokens=100)
    # 50 tokens/s, and 11 requests of 100 tokens with the refused one.
    assert retry(office.enter("late", tokens=100)) in range(20, 26)


def test_of_a_request_that_runs_in_part_nothing_is_refused_for_waiting() -> None:
    office = Office(status("r1"), places=1, max_wait_s=5.0)
    office.enter("a", n=2)
    office.enter("b")
    office.wait(6.0)
    assert refused(office.later()) == {"b-0": "waited_too_long"}
    assert granted(office.leave("a-0", used=100)) == {"a-1": "r1"}


def test_the_deadline_counts_for_all_that_wait() -> None:
    office = Office(status("r1"), places=1)
    office.enter("a", n=2, seconds_left=3.0)
    office.wait(3.2)
    assert refused(office.later()) == {"a-1": "deadline_exceeded"}
    assert refused(office.enter("b", seconds_left=0.0)) == {"b-0": "deadline_exceeded"}


def test_other_settings_hold_at_once_and_throw_nobody_out() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=5)
    for i in range(3):
        office.enter(f"a{i}")
    fewer = office.settings.model_copy(update={"max_queued_requests": 1})
    office.admission.configure(OwnerSettings(admission=fewer, places={POOL: 2}))
    assert granted(office.later()) == {"a1-0": "r1"}
    assert office.admission.stats().queued[0].sequences == 1
    assert refused(office.enter("b")) == {"b-0": "queue_full"}


# Limits of keys.


def test_a_keys_concurrency_counts_what_runs_and_what_waits() -> None:
    office = Office(status("r1"), places=1)
    terms = Terms(name="a", max_concurrency=2)
    office.enter("q1", terms, n=2)
    assert refused(office.enter("q2", terms)) == {"q2-0": "too_many_requests"}
    office.leave("q1-1")
    assert office.enter("q3", terms) == []
    assert refused(office.enter("q4", terms, n=3)) == dict.fromkeys(
        ("q4-0", "q4-1", "q4-2"), "invalid_value"
    )


def test_the_limits_hold_over_all_ingresses_together() -> None:
    office = Office(status("r1"), ingresses=(INGRESS, "i2"))
    terms = Terms(name="a", requests_per_minute=2)
    office.enter("q1", terms)
    office.enter("q2", terms, ingress="i2")
    answers = office.enter("q3", terms)
    assert refused(answers) == {"q3-0": "rate_limited"}
    assert retry(answers) == 30


def test_tokens_are_charged_as_asked_and_what_is_unused_comes_back() -> None:
    office = Office(status("r1", kv=10_000), places=100)
    terms = Terms(name="a", tokens_per_minute=600)
    office.enter("q1", terms, tokens=600)
    answers = office.enter("q2", terms, tokens=100)
    assert refused(answers) == {"q2-0": "rate_limited"}
    assert retry(answers) == 10
    office.leave("q1-0", used=400)
    assert granted(office.enter("q3", terms, tokens=200)) == {"q3-0": "r1"}
    assert refused(office.enter("q4", terms, tokens=1)) == {"q4-0": "rate_limited"}


def test_what_is_refused_is_charged_nothing() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=1, max_wait_s=1.0)
    terms = Terms(name="a", requests_per_minute=3, tokens_per_minute=300)
    office.enter("q1", terms)
    office.enter("q2", terms)
    assert refused(office.enter("q3", terms)) == {"q3-0": "queue_full"}
    office.wait(1.2)
    assert refused(office.later()) == {"q2-0": "waited_too_long"}
    office.enter("q4", terms)
    office.leave("q4-0")
    assert office.enter("q5", terms) == []


def test_a_key_that_is_idle_for_long_is_forgotten() -> None:
    office = Office(status("r1"))
    office.enter("q1", Terms(name="a", requests_per_minute=1000))
    office.leave("q1-0", used=100)
    assert len(office.admission._roster.quotas) == 1
    office.wait(125.0)
    assert len(office.admission._roster.quotas) == 0


# Moves.


def test_a_moving_sequence_goes_before_all_and_avoids_the_replica_it_lost() -> None:
    office = Office(status("r1"), status("r2"), places=1)
    office.enter("a", n=2)
    office.enter("b", Terms(name="b", priority=-5))
    assert granted(office.move("a-0", "r1")) == {"b-0": "r1"}
    office.enter("c", Terms(name="c", priority=-9))
    assert granted(office.leave("b-0", used=100)) == {"c-0": "r1"}
    assert granted(office.leave("a-1", used=100)) == {"a-0": "r2"}


def test_sequences_move_in_the_order_in_which_they_lost_their_places() -> None:
    office = Office(status("r1"), places=3)
    office.enter("a", n=3)
    office.say(seen(gone=("r1",)))
    for name in ("a-2", "a-0", "a-1"):
        office.move(name, "r1")
    assert list(granted(office.say(seen(status("r2"))))) == ["a-2", "a-0", "a-1"]


def test_a_moving_sequence_has_its_deadline_but_no_longest_wait() -> None:
    office = Office(status("r1"), max_wait_s=2.0)
    office.enter("a")
    office.move("a-0", "r1", left=5.0)
    office.wait(4.0)
    assert office.later() == []
    office.wait(1.2)
    assert refused(office.later()) == {"a-0": "deadline_exceeded"}


def test_a_sequence_that_is_not_known_is_told_so() -> None:
    office = Office(status("r1"))
    assert refused(office.move("nobody", "r1")) == {"nobody": "engine_unavailable"}


def test_a_replica_that_fails_three_times_is_avoided_then_tried_with_one() -> None:
    office = Office(status("bad"), status("good"), places=4)
    for i in range(3):
        office.enter(f"q{i}", tokens=10)
        office.say(Landed(sequence_id=f"q{i}-0", replica_id="bad"))
        office.leave(f"q{i}-0", failed=True)
    assert set(granted(office.enter("a", tokens=10, n=4)).values()) == {"good"}
    assert office.enter("b", tokens=10, n=2) == []
    office.wait(10.2)
    assert granted(office.later()) == {"b-0": "bad"}
    assert granted(office.leave("b-0", used=10)) == {"b-1": "bad"}
    assert granted(office.enter("c", tokens=10)) == {"c-0": "bad"}


def test_where_all_replicas_are_open_the_first_to_come_back_is_tried() -> None:
    office = Office(status("r1"), places=4)
    office.enter("a", n=4)
    for i in range(3):
        office.leave(f"a-{i}", failed=True)
    assert granted(office.enter("b", n=2)) == {"b-0": "r1"}
    assert granted(office.leave("b-0", used=100)) == {"b-1": "r1"}


def test_a_move_that_blames_nobody_opens_nothing() -> None:
    office = Office(status("r1"), status("r2"), places=4)
    office.enter("a", n=4)
    for i in range(4):
        office.move(f"a-{i}", "r1", blame=False)
    assert {use.breaker for use in office.admission.stats().replicas} == {"closed"}


# Ingresses.


def test_an_ingress_must_join_first() -> None:
    office = Office(status("r1"))
    with pytest.raises(UnknownIngress):
        office.admission.take("stranger", [enter("a")])
    with pytest.raises(UnknownIngress):
        office.admission.take("stranger", [])
    assert not office.admission.knows("stranger")
    assert isinstance(pickle.loads(pickle.dumps(UnknownIngress("x"))), UnknownIngress)


def test_a_silent_ingress_leaves_and_what_it_held_counts_until_it_ends() -> None:
    office = Office(status("r1"), places=1, ingresses=(INGRESS, "i2"))
    office.enter("a", ingress="i2")
    office.ingresses.remove("i2")
    office.replicas["r1"] = status("r1", used=100, request_ids=("a-0",))
    office.enter("b")
    office.wait(6.0)
    assert not office.admission.knows("i2")
    assert office.later() == []
    office.replicas["r1"] = status("r1")
    office.wait(1.0)
    assert granted(office.later()) == {"b-0": "r1"}


def test_an_owner_that_was_held_up_forgets_nobody() -> None:
    office = Office(status("r1"))
    office.enter("a")
    office.now += 30.0
    office.admission.tick()
    assert office.admission.knows(INGRESS)
    office.wait(1.0)
    assert office.admission.knows(INGRESS)


def test_a_new_owner_knows_what_runs_waits_moves_and_was_spent() -> None:
    office = Office(status("r1"), places=2, max_wait_s=10.0)
    terms = Terms(name="a", requests_per_minute=4, tokens_per_minute=1000)
    running, queued = enter("run", terms, n=2), enter("old", terms, waited_s=8.0)
    young, lost = enter("young", terms, waited_s=1.0), enter("lost", terms)
    office.new_owner()
    move = Move(sequence_id="lost-0", lost="r9", blame=False, seconds_left=60.0)
    spent = (Spent(terms=terms, age_s=0.0, requests=4, tokens=500),)
    office.say(
        Join(
            held=(held(running, "r1", 0), held(running, "r1", 1)),
            waiting=(young, queued),
            moving=((held(lost, "r9"), move),),
            spent=spent,
        ),
        seen(status("r1")),
    )
    assert refused(office.enter("more", terms)) == {"more-0": "rate_limited"}
    assert granted(office.leave("run-0", used=100)) == {"lost-0": "r1"}
    assert granted(office.leave("run-1", used=100)) == {"old-0": "r1"}
    office.wait(9.2)
    assert refused(office.later()) == {"young-0": "waited_too_long"}


def test_choices_that_wait_while_others_run_are_exempt_from_the_longest_wait_after_a_join() -> None:
    office = Office(status("r1"), places=1, max_wait_s=3.0)
    request = enter("a", n=2)
    rest = type(request)(
        request_id="a", terms=request.terms, asks=request.asks[1:], seconds_left=60.0, waited_s=9.0
    )
    office.new_owner()
    office.say(Join(held=(held(request, "r1"),), waiting=(rest,)), seen(status("r1")))
    office.wait(4.0)
    assert office.later() == []
    assert granted(office.leave("a-0", used=100)) == {"a-1": "r1"}


def test_a_choice_whose_mates_have_all_ended_is_exempt_from_the_longest_wait_after_a_join() -> None:
    office = Office(status("r1"), places=1, max_wait_s=3.0)
    request = enter("a", n=2)
    rest = replace(request, asks=request.asks[1:], waited_s=9.0, placed=True)
    office.new_owner()
    office.say(Join(held=(held(enter("b"), "r1"),), waiting=(rest,)), seen(status("r1")))
    office.wait(4.0)
    assert office.later() == []
    assert granted(office.leave("b-0", used=100)) == {"a-1": "r1"}


def test_what_an_ingress_says_when_it_joins_again_replaces_what_was_known() -> None:
    office = Office(status("r1"), places=1)
    terms = Terms(name="a", requests_per_minute=3)
    office.enter("a", terms)
    office.enter("b", terms)
    again = Spent(terms=terms, age_s=0.0, requests=2, tokens=0)
    assert granted(office.say(Join(waiting=(enter("b", terms),), spent=(again,)))) == {"b-0": "r1"}
    assert office.enter("c", terms) == []
    assert refused(office.enter("d", terms)) == {"d-0": "rate_limited"}


def test_a_message_said_twice_counts_once() -> None:
    office = Office(status("r1"), places=1)
    office.enter("a")
    assert office.enter("a") == []
    office.leave("a-0", used=100)
    office.leave("a-0", used=100)
    (use,) = office.admission.stats().replicas
    assert use.held == 0


def test_nobody_leaves_for_another_ingress() -> None:
    office = Office(status("r1"), places=1, ingresses=(INGRESS, "i2"))
    office.enter("a")
    office.say(Leave(sequence_id="a-0", used_tokens=0), ingress="i2")
    assert office.enter("b") == []


def test_every_code_of_a_refusal_is_one_that_clients_know() -> None:
    known = CODES | {"queue_full", "waited_too_long", "rate_limited", "too_many_requests"}
    office = Office(status("r1"), places=1, max_queued_requests=1, max_wait_s=1.0)
    office.enter("a", n=2)
    office.enter("b")
    office.enter("c", tokens=5000)
    office.enter("d", seconds_left=-1.0)
    office.move("nobody", "r1")
    stats = office.admission.stats()
    assert {code for code, _ in stats.refused} == {
        *("queue_full", "context_length_exceeded", "deadline_exceeded", "engine_unavailable")
    }
    assert {code for code, _ in stats.refused} <= known
    assert pickle.loads(pickle.dumps(stats)) == stats

"""What admission decides, claim by claim."""

from __future__ import annotations

from support.admissions import Office, granted, refused, status


def test_a_request_that_fits_gets_a_place_at_once() -> None:
    office = Office(status("r1"))
    assert granted(office.enter("a")) == {"a-0": "r1"}


def test_what_does_not_fit_waits_until_something_leaves() -> None:
    office = Office(status("r1", kv=250))
    assert granted(office.enter("a", n=2)) == {"a-0": "r1", "a-1": "r1"}
    assert office.enter("b") == []
    assert granted(office.leave("a-0", used=100)) == {"b-0": "r1"}


def test_a_full_queue_refuses() -> None:
    office = Office(status("r1"), places=1, max_queued_requests=1)
    office.enter("a")
    office.enter("b")
    assert refused(office.enter("c")) == {"c-0": "queue_full"}
    office.wait(31)
    assert refused(office.later()) == {"b-0": "waited_too_long"}

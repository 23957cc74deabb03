"""The thread that asks for the pools' figures, with an owner that answers, fails and hangs."""

from __future__ import annotations

import gc
import logging
import queue
import threading
from typing import Any

import pytest
from support.scaling import figures

from serve_app.autoscaling.figures import STALE_S, FiguresReader, signals_of


class Owner:
    """Answers a question when the test gives it an answer; an exception is raised."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()
        self.asked = threading.Semaphore(0)

    def __call__(self) -> Any:
        self.asked.release()
        answer = self.answers.get(timeout=30.0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer(self, answer: Any) -> None:
        """Answer the question under way; returns when the next one has been asked, so that the
        answer has been taken in."""
        self.answers.put(answer)
        self.wait_for_question()

    def wait_for_question(self) -> None:
        assert self.asked.acquire(timeout=30.0)


def test_reading_does_not_wait_for_an_owner_that_hangs() -> None:
    owner = Owner()
    reader = FiguresReader(owner, period_s=0.001)
    assert reader.latest() is None
    owner.wait_for_question()
    assert reader.latest() is None
    owner.answer("figures")
    assert reader.latest() == "figures"
    reader.close()
    owner.answers.put(None)


def test_an_owner_that_fails_is_asked_again_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner = Owner()
    reader = FiguresReader(owner, period_s=0.001)
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        reader.latest()
        owner.wait_for_question()
        for _ in range(3):
            owner.answer(ValueError("there is no actor admission:default:2"))
        owner.answer("figures")
    assert reader.latest() == "figures"
    assert [record.getMessage() for record in caplog.records] == [
        "autoscaling is without figures: ValueError: there is no actor admission:default:2"
    ]
    reader.close()
    owner.answers.put(None)


def test_figures_that_are_old_are_none() -> None:
    now = [100.0]
    owner = Owner()
    reader = FiguresReader(owner, period_s=0.001, clock=lambda: now[0])
    reader.latest()
    owner.wait_for_question()
    owner.answer("figures")
    now[0] += STALE_S - 1.0
    assert reader.latest() == "figures"
    now[0] += 2.0
    assert reader.latest() is None
    reader.close()
    owner.answers.put(None)


def test_the_thread_ends_with_its_reader() -> None:
    owner, others = Owner(), set(threading.enumerate())
    reader = FiguresReader(owner, period_s=0.001)
    reader.latest()
    owner.wait_for_question()
    (thread,) = set(threading.enumerate()) - others
    assert thread.name == "intserve-autoscaling-figures"
    del reader
    gc.collect()
    owner.answers.put(None)
    thread.join(timeout=30.0)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("running", "target", "counts"),
    [(0, 3, (0, 3, 0)), (2, 3, (2, 1, 0)), (3, 3, (3, 0, 0)), (4, 3, (3, 0, 1))],
)
def test_replicas_that_serve_works_toward_count_as_starting(
    running: int, target: int, counts: tuple[int, int, int]
) -> None:
    signals = signals_of(None, now_s=1.0, running=running, target=target, places=8)
    assert (signals.ready, signals.starting, signals.draining) == counts
    assert not signals.known


def test_the_figures_reach_the_policy_as_they_are() -> None:
    shown = figures(
        waiting=3,
        waiting_tokens=900,
        oldest_wait_s=1.5,
        running=7,
        kv_share=0.25,
        ttft_p90_s=0.5,
        itl_p90_s=None,
        turned_away=2,
    )
    signals = signals_of(shown, now_s=1.0, running=1, target=1, places=8)
    assert (signals.waiting, signals.waiting_tokens, signals.oldest_wait_s) == (3, 900, 1.5)
    assert (signals.running, signals.kv_share, signals.turned_away) == (7, 0.25, 2)
    assert (signals.ttft_p90_s, signals.itl_p90_s, signals.places) == (0.5, None, 8)
    assert signals.known

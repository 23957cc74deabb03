"""The scheduler alone: no tensors and no model; a step only advances the counts."""

from __future__ import annotations

import random

import pytest
from support.page_checks import check_pages

from deepseek.engine.pages import PagePool
from deepseek.engine.request import Request, SamplingParams, Sequence
from deepseek.engine.scheduler import Schedule, Scheduler


def sequence(name: str, prompt: int) -> Sequence:
    sampling = SamplingParams(max_tokens=1000)
    return Sequence(
        Request(request_id=name, prompt_ids=(7,) * prompt, sampling=sampling), arrived_s=0.0
    )


def scheduler(
    *, pages: int = 100, page_tokens: int = 4, batch: int = 8, tokens: int = 32
) -> Scheduler:
    pool = PagePool(pages, page_tokens)
    return Scheduler(pool, max_batch_size=batch, max_batched_tokens=tokens)


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step, computed; every completed sequence gets a token. (name, start, length) each."""
    schedule = scheduler.schedule()
    check(scheduler, schedule)
    chunks = [(c.sequence.request.request_id, c.start, c.length) for c in schedule.chunks]
    completing = [chunk.sequence for chunk in schedule.chunks if chunk.completes]
    scheduler.advance(schedule)
    for item in completing:
        item.output_ids.append(1)
    return chunks


def check(scheduler: Scheduler, schedule: Schedule) -> None:
    """What holds in every step."""
    pool = scheduler.pool
    check_pages(pool, scheduler.running, scheduler.waiting)
    assert len({id(chunk.sequence) for chunk in schedule.chunks}) == len(schedule.chunks)
    for chunk in schedule.chunks:
        assert chunk.start == chunk.sequence.num_computed
        assert chunk.length >= 1
        assert chunk.stop <= len(chunk.sequence.pages) * pool.page_tokens
        assert chunk.stop <= chunk.sequence.num_tokens


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    it = scheduler(tokens=10)
    it.add(sequence("a", 25))
    assert [step(it) for _ in range(4)] == [
        [("a", 0, 10)],
        [("a", 10, 10)],
        [("a", 20, 5)],
        [("a", 25, 1)],
    ]


def test_decodes_go_first_and_prefills_take_the_rest_of_the_budget() -> None:
    it = scheduler(tokens=10)
    it.add(sequence("a", 2))
    assert step(it) == [("a", 0, 2)]
    it.add(sequence("b", 30))
    it.add(sequence("c", 3))
    assert step(it) == [("a", 2, 1), ("b", 0, 9)]
    assert step(it) == [("a", 3, 1), ("b", 9, 9)]
    assert step(it) == [("a", 4, 1), ("b", 18, 9)]
    assert step(it) == [("a", 5, 1), ("b", 27, 3), ("c", 0, 3)]


def test_the_batch_size_bounds_what_runs_at_once() -> None:
    it = scheduler(batch=2)
    for name in "abc":
        it.add(sequence(name, 3))
    assert [name for name, _, _ in step(it)] == ["a", "b"]
    it.remove(it.running[0])
    assert [name for name, _, _ in step(it)] == ["b", "c"]


def test_nothing_overtakes_a_request_that_does_not_fit_yet() -> None:
    it = scheduler(pages=10)
    it.add(sequence("a", 20))  # 6 pages with the next token
    it.add(sequence("b", 24))  # 7 pages: must wait
    it.add(sequence("c", 1))
    assert [name for name, _, _ in step(it)] == ["a"]
    assert [s.request.request_id for s in it.waiting] == ["b", "c"]


def test_admission_counts_the_pages_that_running_prefills_still_need() -> None:
    it = scheduler(pages=10, tokens=12)
    it.add(sequence("a", 20))
    it.add(sequence("b", 20))
    assert step(it) == [("a", 0, 12)]  # 3 of its 6 pages so far; b's 6 would fit in the other 7
    assert step(it) == [("a", 12, 8)]


def test_the_youngest_gives_its_pages_to_the_oldest_and_is_computed_anew() -> None:
    it = scheduler(pages=4, page_tokens=2)
    old, young = sequence("old", 3), sequence("young", 3)
    it.add(old)
    it.add(young)
    assert step(it) == [("old", 0, 3), ("young", 0, 3)]  # two pages each: full
    assert step(it) == [("old", 3, 1), ("young", 3, 1)]
    assert step(it) == [("old", 4, 1)]
    assert it.num_preemptions == 1
    assert young.pages == []
    assert (young.num_computed, young.num_tokens) == (0, 5)
    it.remove(old)
    assert step(it) == [("young", 0, 5)]  # prompt and output together


def test_a_sequence_alone_can_fill_the_whole_cache() -> None:
    it = scheduler(pages=3, page_tokens=2, tokens=8)
    it.add(sequence("a", 5))
    assert step(it) == [("a", 0, 5)]
    assert step(it) == [("a", 5, 1)]
    assert it.pool.num_free == 0


def test_removing_a_waiting_sequence_leaves_the_pool_alone() -> None:
    it = scheduler(batch=1)
    it.add(sequence("a", 3))
    it.add(sequence("b", 3))
    step(it)
    it.remove(it.waiting[0])
    it.remove(it.running[0])
    assert it.pool.num_free == it.pool.num_pages
    assert not it.schedule().chunks


def test_freeing_twice_is_a_bug_that_shows() -> None:
    pool = PagePool(4, 2)
    item = sequence("a", 3)
    pages = pool.grow(item, 3)
    pool.release(item)
    item.pages = pages
    with pytest.raises(KeyError):
        pool.release(item)


@pytest.mark.parametrize("seed", range(8))
def test_any_workload_ends_with_every_page_free(seed: int) -> None:
    """Random arrivals, lengths, finishes and aborts in a cache that is too small for them."""
    chance = random.Random(seed)
    it = scheduler(
        pages=chance.randint(6, 14), page_tokens=chance.choice([1, 4]), batch=4, tokens=9
    )
    limit = it.pool.capacity_tokens
    goals: dict[Sequence, int] = {}
    ended = arrived = 0
    for _ in range(3000):
        if arrived < 60 and chance.random() < 0.3:
            item = sequence(str(arrived), chance.randint(1, limit - 1))
            goals[item] = chance.randint(1, limit - item.num_tokens)
            it.add(item)
            arrived += 1
        before = {item: item.num_tokens for item in goals}
        assert sum(length for _, _, length in step(it)) <= 9
        assert all(item.num_tokens <= count + 1 for item, count in before.items())
        for item in list(goals):
            finished = len(item.output_ids) >= goals[item]
            if finished or chance.random() < 0.01:
                it.remove(item)
                del goals[item]
                ended += 1
        if arrived == ended == 60:
            break
    assert ended == 60
    assert it.num_preemptions > 0
    assert it.pool.num_free == it.pool.num_pages

"""Pages that hold the same beginning are found, shared, kept and given up: without a model."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from support.page_checks import check_pages

from deepseek.engine.pages import PagePool
from deepseek.engine.prefix import page_key, root_key
from deepseek.engine.request import Request, SamplingParams, Sequence
from deepseek.engine.scheduler import Chunk, Scheduler

ROOT = root_key("", "digest", "bf16")


def sequence(name: str, prompt: Iterable[int], root: bytes | None = ROOT) -> Sequence:
    sampling = SamplingParams(max_tokens=1000)
    request = Request(request_id=name, prompt_ids=tuple(prompt), sampling=sampling)
    return Sequence(request, arrived_s=0.0, prefix_root=root)


def scheduler(*, pages: int = 100, batch: int = 8, tokens: int = 32) -> Scheduler:
    """Pages of 4 tokens."""
    return Scheduler(PagePool(pages, 4), max_batch_size=batch, max_batched_tokens=tokens)


def step(it: Scheduler) -> list[tuple[str, int, int]]:
    """One step, computed; every completed sequence gets a token. (name, start, length) each."""
    schedule = it.schedule()
    check_pages(it.pool, it.running, it.waiting)
    for chunk in schedule.chunks:
        check_writes(it, chunk)
    assert len(set(schedule.new_pages)) == len(schedule.new_pages)
    assert not any(it.pool.prefixes.holds(page) for page in schedule.new_pages)
    done = [(c.sequence.request.request_id, c.start, c.length) for c in schedule.chunks]
    completing = [chunk.sequence for chunk in schedule.chunks if chunk.completes]
    it.advance(schedule)
    for item in completing:
        item.output_ids.append(len(item.output_ids))
    check_pages(it.pool, it.running, it.waiting)
    return done


def check_writes(it: Scheduler, chunk: Chunk) -> None:
    """What a chunk writes is its sequence's own."""
    first, last = chunk.start // 4, (chunk.stop - 1) // 4
    for page in chunk.sequence.pages[first : last + 1]:
        assert it.pool.num_users(page) == 1
        assert not it.pool.prefixes.holds(page)


def serve(it: Scheduler, item: Sequence, num_steps: int = 1) -> list[tuple[str, int, int]]:
    """Run it alone for some steps and end it."""
    it.add(item)
    done = [chunk for _ in range(num_steps) for chunk in step(it)]
    it.remove(item)
    check_pages(it.pool, it.running, it.waiting)
    return done


def test_a_prompt_that_begins_alike_is_computed_from_the_next_page_on() -> None:
    it = scheduler()
    assert serve(it, sequence("a", range(11))) == [("a", 0, 11)]
    assert it.pool.num_free == 100
    assert it.pool.prefixes.num_idle == 2  # the third is not full
    assert serve(it, sequence("b", [*range(9), 50, 51, 52])) == [("b", 8, 4)]
    assert serve(it, sequence("c", [*range(7), 50])) == [("c", 4, 4)]
    assert serve(it, sequence("d", [9, *range(1, 11)])) == [("d", 0, 11)]
    assert (it.num_cached_tokens, it.num_uncached_tokens) == (8 + 4, 11 + 4 + 4 + 11)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_the_last_token_is_computed_however_much_is_found(length: int) -> None:
    it = scheduler()
    serve(it, sequence("a", range(20)))
    [(_, start, rest)] = serve(it, sequence("b", range(length)))
    assert start == (length - 1) // 4 * 4
    assert start + rest == length


def test_what_was_generated_is_found_by_the_next_turn() -> None:
    it = scheduler()
    serve(it, sequence("a", range(100, 106)), num_steps=7)  # 6 + 6 of its 7 tokens are computed
    turn = [*range(100, 106), *range(7), 70, 71]
    assert serve(it, sequence("b", turn)) == [("b", 12, 3)]


def test_a_running_sequence_shares_what_it_has_computed_so_far() -> None:
    it = scheduler(tokens=8)
    it.add(sequence("a", range(30)))
    assert step(it) == [("a", 0, 8)]
    it.add(sequence("b", [*range(12), 60]))
    assert step(it) == [("a", 8, 8)]
    assert step(it) == [("a", 16, 8)]
    assert step(it) == [("a", 24, 6), ("b", 12, 1)]
    a, b = it.running
    assert a.pages[:3] == b.pages[:3]
    assert it.pool.num_pages - it.pool.num_free == 8 + 1  # shared pages count once
    it.remove(a)
    check_pages(it.pool, it.running, it.waiting)
    assert it.pool.num_pages - it.pool.num_free == 4
    step(it)
    it.remove(b)
    assert it.pool.num_free == 100


def test_two_that_computed_the_same_at_once_end_on_the_same_pages() -> None:
    it = scheduler()
    it.add(sequence("a", range(9)))
    it.add(sequence("b", range(10)))
    assert step(it) == [("a", 0, 9), ("b", 0, 10)]
    a, b = it.running
    assert a.pages[:2] == b.pages[:2]
    assert a.pages[2] != b.pages[2]
    assert it.pool.num_pages - it.pool.num_free == 4


def test_salts_and_formats_and_engines_share_nothing() -> None:
    roots = [
        root_key(*words)
        for words in (
            *(("", "digest", "bf16"), ("a", "digest", "bf16"), ("b", "digest", "bf16")),
            *(("", "digest", "fp8"), ("", "digests", "bf16"), ("adigest", "", "bf16")),
            ('a", "digest', "", "bf16"),
        )
    ]
    it = scheduler()
    for number, root in enumerate(roots):
        name = str(number)
        assert serve(it, sequence(name, range(9), root)) == [(name, 0, 9)]
        assert serve(it, sequence(name, range(9), root)) == [(name, 8, 1)]


def test_who_shares_nothing_neither_finds_nor_leaves_pages() -> None:
    it = scheduler()
    assert serve(it, sequence("a", range(9), None)) == [("a", 0, 9)]
    assert it.pool.prefixes.num_idle == 0
    serve(it, sequence("b", range(9)))
    assert serve(it, sequence("c", range(9), None)) == [("c", 0, 9)]
    assert it.pool.prefixes.num_idle == 2


def test_the_key_of_a_page_is_that_of_all_tokens_before_its_end() -> None:
    whole = sequence("a", range(40))
    for change in range(40):
        other = sequence("b", [99 if i == change else i for i in range(40)])
        for number in range(10):
            same = page_key(whole, number, 4) == page_key(other, number, 4)
            assert same == (change >= 4 * number + 4), (change, number)


def test_room_is_made_by_the_pages_used_longest_ago_and_leaves_go_first() -> None:
    it = scheduler(pages=10)
    for first in (100, 200):
        serve(it, sequence(str(first), range(first, first + 13)))  # 3 full pages each, 4 blank
    serve(it, sequence("again", range(100, 106)))  # the first page of the older one
    serve(it, sequence("new", range(300, 322)))  # needs 6 pages

    def cached(first: int) -> int:
        probe = sequence("probe", range(first, first + 13))
        return len(it.pool.find(probe))

    # 4 blank pages, then the two that were not used again, leaf first.
    assert [cached(first) for first in (100, 200, 300)] == [1, 3, 3]
    serve(it, sequence("newer", range(400, 410)))  # 1 blank page and two leaves of 200
    assert [cached(first) for first in (100, 200, 300)] == [1, 1, 3]


def test_pages_that_nobody_uses_count_as_free_when_a_prompt_is_admitted() -> None:
    it = scheduler(pages=10)
    serve(it, sequence("old", range(37)), num_steps=2)
    assert it.pool.prefixes.num_idle == 9
    it.add(sequence("a", range(500, 532)))  # 9 pages with the next token
    assert step(it) == [("a", 0, 32)]


def test_found_pages_that_nobody_uses_are_counted_as_they_are_taken() -> None:
    """They are free until then: admission must not count them twice."""
    it = scheduler(pages=10)
    serve(it, sequence("old", range(20)))  # 5 idle pages
    it.add(sequence("a", range(500, 516)))  # 5 pages with the next token
    it.add(sequence("b", range(21)))  # 6 pages, of which it finds 5: one is missing
    assert step(it) == [("a", 0, 16)]
    assert [s.request.request_id for s in it.waiting] == ["b"]
    it.remove(it.running[0])
    assert step(it) == [("b", 20, 1)]


def test_found_pages_in_use_take_no_room() -> None:
    for pages, has_room in ((6, False), (7, True)):
        it = scheduler(pages=pages)
        it.add(sequence("a", range(20)))  # 6 pages with the next token
        assert step(it) == [("a", 0, 20)]
        it.add(sequence("b", [*range(20), 50]))  # 6 pages, 5 of them a's
        assert step(it) == [("a", 20, 1), *[("b", 20, 1)] * has_room]


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    it = scheduler(pages=8)
    old, young = sequence("old", range(14)), sequence("young", range(100, 114))
    it.add(old)
    it.add(young)
    while not it.num_preemptions:
        step(it)
    assert young.pages == []
    assert it.pool.prefixes.num_idle > 0
    it.remove(old)
    [(name, start, length)] = step(it)
    assert (name, start % 4) == ("young", 0)
    assert 0 < start < start + length == young.num_tokens - 1
    assert it.num_cached_tokens == 0  # a request counts once, when it first ran
    assert it.num_uncached_tokens == 28


def test_what_may_be_wrong_is_found_no_more_nor_what_follows_it() -> None:
    it = scheduler()
    serve(it, sequence("old", [*range(8), 40, 41, 42, 43, 44]))
    bad = sequence("bad", [*range(8), 50, 51, 52, 53, 54])
    good = sequence("good", [*range(8), 60, 61, 62, 63, 64])
    other = sequence("other", range(200, 209))
    for item in (bad, good, other):
        it.add(item)
    step(it)
    it.pool.forget(bad)
    check_pages(it.pool, it.running, it.waiting)
    assert it.pool.prefixes.num_idle == 0  # old's third page followed one of bad's
    assert [it.pool.find(sequence("probe", item.request.prompt_ids)) for item in (bad, good)] == [
        [],
        [],
    ]
    it.remove(bad)
    for _ in range(6):
        step(it)  # good fills a page, which follows one that is forgotten
    assert it.pool.find(sequence("probe", [*good.request.prompt_ids, *good.output_ids])) == []
    for item in (good, other):
        it.remove(item)
    assert it.pool.prefixes.num_idle == 3  # other's
    assert serve(it, sequence("new", good.request.prompt_ids)) == [("new", 0, 13)]
    assert serve(it, sequence("newer", good.request.prompt_ids)) == [("newer", 12, 1)]


@pytest.mark.parametrize("seed", range(2))
def test_any_workload_of_shared_prefixes_gives_every_page_back(seed: int) -> None:
    """400 requests with common beginnings in a cache that is too small; some are aborted, some of
    another salt, some share nothing, some turn out wrong."""
    chance = random.Random(seed)
    it = scheduler(pages=chance.randint(16, 40), batch=5, tokens=chance.choice([9, 24]))
    limit = it.pool.capacity_tokens
    heads = [[chance.randrange(50) for _ in range(40)] for _ in range(4)]
    roots = [ROOT, ROOT, root_key("another", "digest", "bf16"), None]
    goals: dict[Sequence, int] = {}
    ended = arrived = 0
    while ended < 400:
        if arrived < 400 and len(goals) < 9 and chance.random() < 0.5:
            head = chance.choice(heads)[: chance.randint(0, 40)]
            tail = [chance.randrange(50) for _ in range(chance.randint(1, 9))]
            item = sequence(str(arrived), [*head, *tail], chance.choice(roots))
            goals[item] = chance.randint(1, min(20, limit - item.num_tokens))
            it.add(item)
            arrived += 1
        step(it)
        for item in list(goals):
            finished = len(item.output_ids) >= goals[item]
            if finished or chance.random() < 0.01:
                if chance.random() < 0.05:
                    it.pool.forget(item)
                it.remove(item)
                check_pages(it.pool, it.running, it.waiting)
                del goals[item]
                ended += 1
    assert it.pool.num_free == it.pool.num_pages
    assert it.num_preemptions > 0
    assert it.num_cached_tokens > 400

"""What always holds of KV pages: who uses them, which can be found, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from deepseek.engine.engine import LLMEngine
from deepseek.engine.pages import ZERO_PAGE, PagePool
from deepseek.engine.prefix import page_key
from deepseek.engine.request import Sequence


def check_pages(pool: PagePool, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
    """Between two steps, or after `schedule`."""
    running = list(running)
    table = pool.prefixes
    blank, idle, entries = pool.blank_pages, table.idle_pages, table.entries
    users = Counter(page for sequence in running for page in sequence.pages)
    assert not any(sequence.pages for sequence in waiting), "a waiting sequence has pages"

    # Every page is in use, idle or blank, and in one of them once.
    everywhere = [*users, *idle, *blank]
    assert sorted(everywhere) == list(range(1, pool.num_pages + 1))
    assert ZERO_PAGE not in everywhere
    assert {page: pool.num_users(page) for page in everywhere} == {
        page: users[page] for page in everywhere
    }
    assert pool.num_free == len(idle) + len(blank)

    # What can be found is found from its beginning, under one key.
    assert set(idle) <= set(entries) <= {*users, *idle}
    assert len({entry.key for entry in entries.values()}) == len(entries)
    children: dict[bytes, list[int]] = {}
    for page, entry in entries.items():
        assert table.find(entry.key) == page
        if entry.parent is not None:
            assert table.find(entry.parent) is not None, "a page without the one that it follows"
            children.setdefault(entry.parent, []).append(page)

    # Whatever goes first is a leaf.
    order = {page: place for place, page in enumerate(idle)}
    for page, place in order.items():
        for child in children.get(entries[page].key, []):
            assert child in order, "a page in use follows one that nobody uses"
            assert order[child] < place, "a page goes before one that follows it"

    # Of a sequence: shared pages are full, and hold its own tokens.
    for sequence in running:
        assert len(set(sequence.pages)) == len(sequence.pages)
        num_full = sequence.num_computed // pool.page_tokens
        assert num_full <= len(sequence.pages)
        for number, page in enumerate(sequence.pages):
            if page not in entries and users[page] == 1:
                continue
            assert sequence.prefix_root is not None, "a page is shared that should not be"
            assert number < num_full, "a page is shared that may be written"
            if page in entries:
                assert entries[page].key == page_key(sequence, number, pool.page_tokens)
                assert number == 0 or sequence.pages[number - 1] in entries


class PageWatch:
    """Checks one engine after the other after each step, and that a page that can be found holds
    what it held when it was first found, also where it was computed again, by another request or
    from another token on."""

    def __init__(self) -> None:
        self._held: dict[bytes, list[torch.Tensor]] = {}
        self._engine: LLMEngine | None = None
        self._copies: list[torch.Tensor] = []  # of the engine's cache
        self._keys: dict[int, bytes] = {}  # by page, whose copies are made

    def __call__(self, engine: LLMEngine) -> None:
        check_engine(engine)
        tensors = [_bytes(tensor) for tensor in engine._runner.cache.tensors]
        if engine is not self._engine:
            self._engine, self._keys = engine, {}
            self._copies = [tensor.clone() for tensor in tensors]
        keys = {page: entry.key for page, entry in engine._pool.prefixes.entries.items()}
        for page, key in keys.items():
            if self._keys.get(page) != key:
                now = [tensor[:, page].clone() for tensor in tensors]
                before = self._held.setdefault(key, now)
                assert all(map(torch.equal, before, now)), "a page was computed otherwise"
                for copy, part in zip(self._copies, now, strict=True):
                    copy[:, page] = part
        self._keys = keys
        pages = torch.tensor(list(keys), dtype=torch.int64)
        for tensor, copy in zip(tensors, self._copies, strict=True):
            same = torch.equal(tensor.index_select(1, pages), copy.index_select(1, pages))
            assert same, "a page that can be found was written"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def check_engine(engine: LLMEngine) -> None:
    scheduler = engine._scheduler
    check_pages(engine._pool, scheduler.running, scheduler.waiting)

"""Which KV pages hold which beginnings of texts, so that later requests need not compute them.

A full page has a key: the hash of its tokens and of the key of the page before it, which makes it
the hash of the whole text up to the page's end. The first page hashes after a root instead: the
requester's salt and what the latents depend on beside the tokens, so that no two salts ever share a
page. Latents depend on tokens before them alone, bit for bit (linear.py, attention.py): whichever
sequence computed a page, the next one would have computed the same.

The table has a key only where it has the key of the page before, too. pages.py says who uses a
page; a page without users stays here, idle, until its room is needed, and the one that was used
longest ago goes first. A page gets idle before the page that it follows: so the first to go is a
leaf, and what is left can always be found from its beginning. Pure bookkeeping: no tensors, no
clock.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from deepseek.engine.request import Sequence


def root_key(salt: str, engine_digest: str, kv_cache: str) -> bytes:
    """What the key of a first page begins with."""
    mixed = json.dumps([salt, engine_digest, kv_cache])
    return blake2b(mixed.encode(), digest_size=32).digest()


def page_key(sequence: Sequence, number: int, page_tokens: int) -> bytes:
    """Key of a page of the sequence, which keeps it. The tokens up to the page's end are known and
    change no more; `prefix_root` is not None."""
    keys = sequence.page_keys
    while len(keys) <= number:
        before = keys[-1] if keys else sequence.prefix_root
        assert before is not None
        start = len(keys) * page_tokens
        tokens = sequence.tokens(start, start + page_tokens)
        assert len(tokens) == page_tokens
        keys.append(blake2b(before + array("I", tokens).tobytes(), digest_size=32).digest())
    return keys[number]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a page is found by, and the key of the page before it, None for a first one."""

    key: bytes
    parent: bytes | None


class PrefixTable:
    """Pages by key. The pool (pages.py) says which of them nobody uses."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._entries: dict[int, Entry] = {}  # in order of registration: parents before children
        # In order of eviction. A dict would look through what was removed to find its first key.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def idle_pages(self) -> list[int]:
        """Pages that nobody uses, the next to go first."""
        return list(self._idle)

    @property
    def entries(self) -> dict[int, Entry]:
        return dict(self._entries)

    def find(self, key: bytes) -> int | None:
        return self._pages.get(key)

    def holds(self, page: int) -> bool:
        return page in self._entries

    def register(self, page: int, key: bytes, parent: bytes | None) -> None:
        """Let a page that is in use be found."""
        assert key not in self._pages
        assert page not in self._entries
        assert parent is None or parent in self._pages
        self._pages[key] = page
        self._entries[page] = Entry(key, parent)

    def add_idle(self, page: int) -> None:
        """The page's last user has gone. Of a sequence the last page comes first."""
        assert page in self._entries
        self._idle[page] = None

    def remove_idle(self, page: int) -> None:
        """The page has a user again."""
        del self._idle[page]

    def evict(self) -> int:
        """Forget the idle page that was used longest ago; returns it."""
        page = next(iter(self._idle))
        self._remove(page)
        return page

    def forget(self, pages: Iterable[int]) -> list[int]:
        """Let none of these pages be found any more, nor what follows them. Returns those that were
        idle: nobody has them now."""
        gone = {page for page in pages if page in self._entries}
        if gone:
            lost = {self._entries[page].key for page in gone}
            for page, entry in self._entries.items():
                if entry.parent in lost:
                    gone.add(page)
                    lost.add(entry.key)
        idle = [page for page in self._idle if page in gone]
        for page in gone:
            self._remove(page)
        return idle

    def _remove(self, page: int) -> None:
        del self._pages[self._entries.pop(page).key]
        self._idle.pop(page, None)

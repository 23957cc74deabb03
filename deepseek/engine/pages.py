"""Who uses which page of the KV cache. Pure bookkeeping: no tensors.

Page 0 is nobody's: it stays zero, and short page tables are padded with it, so that reading past
the end of a sequence reads zeros instead of a neighbor's latents.
"""

from __future__ import annotations

from deepseek.engine.prefix import PrefixTable, page_key
from deepseek.engine.request import Sequence
from deepseek.errors import DeployError

ZERO_PAGE = 0

#: Context tokens per attention block, a multiple of every page size. Fixed, so that a token's
#: result does not depend on how long its neighbors' contexts are; see attention.py.
BLOCK_TOKENS = 256


def check_page_tokens(page_tokens: int) -> None:
    """Check that a KV page of `page_tokens` tokens fits evenly into an attention block.

    Raises:
        DeployError: it does not.
    """
    if page_tokens < 1 or BLOCK_TOKENS % page_tokens:
        raise DeployError(f"page_tokens must divide {BLOCK_TOKENS}, which {page_tokens} does not")


class PagePool:
    """Pages 1..num_pages. Each is used by one or more sequences, or free; of the free ones, some
    are blank and some hold a prefix that can be found (prefix.py) until they are needed.

    A page with several users, or that can be found, is full: nobody writes it. Sequences whose
    `prefix_root` is None neither find pages nor let theirs be found.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0
        assert page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.prefixes = PrefixTable()
        self._blank = list(range(num_pages, 0, -1))  # the lowest page is handed out first
        self._users: dict[int, int] = {}  # number of sequences by page

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now, those that hold a prefix included."""
        return len(self._blank) + self.prefixes.num_idle

    @property
    def blank_pages(self) -> list[int]:
        """The free pages that hold nothing."""
        return list(self._blank)

    @property
    def capacity_tokens(self) -> int:
        return self.num_pages * self.page_tokens

    def num_users(self, page: int) -> int:
        return self._users.get(page, 0)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that this many tokens fill."""
        return -(-num_tokens // self.page_tokens)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that the sequence lacks to hold `num_tokens` tokens."""
        return max(0, self.pages_for(num_tokens) - len(sequence.pages))

    def room(self, sequence: Sequence) -> int:
        """Tokens that the sequence could compute now, with the free pages added to its own."""
        total = (len(sequence.pages) + self.num_free) * self.page_tokens
        return total - sequence.num_computed

    def find(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of a sequence that has none, in order. Never all of its
        tokens: the last one is computed, for its logits."""
        assert not sequence.pages
        found: list[int] = []
        if sequence.prefix_root is None:
            return found
        for number in range((sequence.num_tokens - 1) // self.page_tokens):
            page = self.prefixes.find(page_key(sequence, number, self.page_tokens))
            if page is None:
                break
            found.append(page)
        return found

    def share(self, sequence: Sequence, found: list[int]) -> None:
        """Give the sequence the pages that were found for it: their tokens are computed."""
        for page in found:
            self._use(page)
        sequence.pages.extend(found)
        sequence.num_computed = len(found) * self.page_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Give the sequence pages of its own for `num_tokens` tokens; returns the new ones."""
        count = self.missing(sequence, num_tokens)
        assert count <= self.num_free, "the scheduler must check before it grows a sequence"
        new = [self._blank.pop() if self._blank else self.prefixes.evict() for _ in range(count)]
        for page in new:
            self._users[page] = 1
        sequence.pages.extend(new)
        return new

    def record(self, sequence: Sequence, num_computed: int) -> None:
        """The sequence's first `num_computed` tokens are computed: let the pages be found that
        became full. Where one holds the same as a page that is there already, the sequence takes
        that one, and whoever holds a page holds all before it."""
        first = sequence.num_computed // self.page_tokens
        sequence.num_computed = num_computed
        if sequence.prefix_root is None:
            return
        for number in range(first, num_computed // self.page_tokens):
            parent = page_key(sequence, number - 1, self.page_tokens) if number else None
            if parent is not None and not self.prefixes.holds(sequence.pages[number - 1]):
                return  # it was forgotten
            page, key = sequence.pages[number], page_key(sequence, number, self.page_tokens)
            other = self.prefixes.find(key)
            if other is None:
                self.prefixes.register(page, key, parent)
            else:
                self._use(other)
                sequence.pages[number] = other
                del self._users[page]
                self._blank.append(page)

    def release(self, sequence: Sequence) -> None:
        """Take all pages back. What those hold that cannot be found is lost."""
        for page in reversed(sequence.pages):  # a page gets idle before the one that it follows
            self._users[page] -= 1  # KeyError: freed twice, a bug of ours
            if self._users[page]:
                continue
            del self._users[page]
            if self.prefixes.holds(page):
                self.prefixes.add_idle(page)
            else:
                self._blank.append(page)
        sequence.pages.clear()
        sequence.num_computed = 0

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the sequence's pages any more: they may hold what is wrong."""
        self._blank += self.prefixes.forget(sequence.pages)

    def _use(self, page: int) -> None:
        if page not in self._users:
            self.prefixes.remove_idle(page)
        self._users[page] = self._users.get(page, 0) + 1

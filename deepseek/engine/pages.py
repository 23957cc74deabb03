"""Who owns which page of the KV cache. Pure bookkeeping: no tensors.

Page 0 is nobody's: it stays zero, and short page tables are padded with it, so that reading past
the end of a sequence reads zeros instead of a neighbor's latents.
"""

from __future__ import annotations

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
    """Pages 1..num_pages, each free or owned by one sequence."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0
        assert page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages, 0, -1))  # the lowest page is handed out first
        self._owned: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_pages(self) -> list[int]:
        return list(self._free)

    @property
    def capacity_tokens(self) -> int:
        return self.num_pages * self.page_tokens

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

    def grow(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Give the sequence pages for `num_tokens` tokens; returns the new ones."""
        count = self.missing(sequence, num_tokens)
        assert count <= self.num_free, "the scheduler must check before it grows a sequence"
        new = [self._free.pop() for _ in range(count)]
        self._owned.update(new)
        sequence.pages.extend(new)
        return new

    def release(self, sequence: Sequence) -> None:
        """Take all pages back; what they hold is lost."""
        for page in reversed(sequence.pages):
            self._owned.remove(page)  # KeyError: freed twice, a bug of ours
            self._free.append(page)
        sequence.pages.clear()
        sequence.num_computed = 0

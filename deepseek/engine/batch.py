"""The tokens of one step as tensors, in the forms that the forward passes want them.

Single tokens (decodes) come first, longest context first. For PyTorch's kernels they are one
attention group, and each longer chunk is a group of its own: attention walks the context in blocks
of `BLOCK_TOKENS`, and the page tables and causal masks of all blocks are made once, for all layers.
The native kernels want the spans and their page tables alone. Neither pays for the other.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor

from deepseek.engine.pages import BLOCK_TOKENS, ZERO_PAGE


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence: their ids, the first's position, the sequence's pages."""

    token_ids: list[int]
    start: int
    pages: list[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of context for the first `num_active` sequences of a group.

    `pages` is int64 [num_active, BLOCK_TOKENS / S]; `hidden` is bool [num_active, T, BLOCK_TOKENS],
    true where a query must not look, None where every query may see the whole block.
    """

    num_active: int
    pages: Tensor
    hidden: Tensor | None


@dataclass(frozen=True, slots=True)
class Group:
    """`num_sequences` sequences with `length` tokens each, in rows [first, first + product)."""

    first: int
    num_sequences: int
    length: int
    blocks: list[Block]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.num_sequences * self.length)


class Batch:
    """T tokens: the spans in the order of their rows, and what a model needs of them, made when it
    is asked for. `last_rows[i]` is the row of the last token of the i-th span given."""

    def __init__(self, spans: list[Span], page_tokens: int, last_rows: list[int]) -> None:
        self.spans, self.page_tokens, self.last_rows = spans, page_tokens, last_rows

    @cached_property
    def token_ids(self) -> Tensor:
        """int64 [T]"""
        return torch.tensor([token for span in self.spans for token in span.token_ids])

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]"""
        return torch.tensor([p for span in self.spans for p in range(span.start, span.stop)])

    @cached_property
    def slots(self) -> Tensor:
        """Place in the cache of each token, page * S + offset, int64 [T]."""
        slots: list[int] = []
        for span in self.spans:
            for position in range(span.start, span.stop):
                page, offset = divmod(position, self.page_tokens)
                slots.append(span.pages[page] * self.page_tokens + offset)
        return torch.tensor(slots)

    @cached_property
    def groups(self) -> list[Group]:
        """The attention groups of PyTorch's kernels: all single tokens, then each chunk."""
        singles = [span for span in self.spans if len(span.token_ids) == 1]
        groups = [_make_group(0, singles, self.page_tokens)] if singles else []
        first = len(singles)
        for span in self.spans[len(singles) :]:
            groups.append(_make_group(first, [span], self.page_tokens))
            first += len(span.token_ids)
        return groups

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """For the native kernels, int32: number of tokens and position of the first of each span,
        [S, 2]; the pages of each span, [S, most pages of a span], filled up with the zero page."""
        pages = [span.pages[: -(-span.stop // self.page_tokens)] for span in self.spans]
        width = max(map(len, pages))
        # NumPy reads nested lists several times faster than torch.
        rows = np.array([row + [ZERO_PAGE] * (width - len(row)) for row in pages], np.int32)
        sizes = np.array([(len(span.token_ids), span.start) for span in self.spans], np.int32)
        return torch.from_numpy(sizes), torch.from_numpy(rows)


def make_batch(spans: Items[Span], page_tokens: int) -> Batch:
    """Lay the spans of one step out in rows."""
    assert BLOCK_TOKENS % page_tokens == 0
    order = sorted(range(len(spans)), key=lambda i: _rank(spans[i]))
    last_rows = [0] * len(spans)
    num_rows = 0
    for i in order:
        num_rows += len(spans[i].token_ids)
        last_rows[i] = num_rows - 1
    return Batch([spans[i] for i in order], page_tokens, last_rows)


def _rank(span: Span) -> tuple[bool, int]:
    """Single tokens first, and among them the longest context first."""
    single = len(span.token_ids) == 1
    return (not single, -span.stop if single else 0)


def _make_group(first: int, spans: list[Span], page_tokens: int) -> Group:
    length = len(spans[0].token_ids)
    starts = torch.tensor([span.start for span in spans])
    query = starts[:, None] + torch.arange(length)  # [B, T]
    per_block = BLOCK_TOKENS // page_tokens
    blocks = []
    for number in count():
        begin = number * BLOCK_TOKENS
        active = [span for span in spans if span.stop > begin]
        if not active:
            break
        rows = []
        for span in active:
            pages = span.pages[number * per_block : (number + 1) * per_block]
            rows.append(pages + [ZERO_PAGE] * (per_block - len(pages)))
        hidden = None
        if begin + BLOCK_TOKENS > min(span.start for span in active) + 1:
            key = torch.arange(begin, begin + BLOCK_TOKENS)
            hidden = key > query[: len(active), :, None]
        blocks.append(Block(len(active), torch.tensor(rows), hidden))
    return Group(first, len(spans), length, blocks)

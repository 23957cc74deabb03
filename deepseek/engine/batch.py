"""The tokens of one step as tensors, in the form that the forward pass wants them.

Single tokens (decodes) come first, longest context first, as one attention group; each longer chunk
is a group of its own. Attention walks the context in blocks of `BLOCK_TOKENS`, and the page tables
and causal masks of all blocks are made here once, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from deepseek.engine.pages import ZERO_PAGE
from deepseek.errors import DeployError

#: Context tokens per attention block. Fixed, so that a token's result does not depend on how long
#: its neighbors' contexts are; see attention.py. A KV page never crosses a block.
BLOCK_TOKENS = 256


def check_page_tokens(page_tokens: int) -> None:
    """Check that a KV page of `page_tokens` tokens fits evenly into an attention block.

    Raises:
        DeployError: it does not.
    """
    if page_tokens < 1 or BLOCK_TOKENS % page_tokens:
        raise DeployError(f"page_tokens must divide {BLOCK_TOKENS}, which {page_tokens} does not")


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


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens: ids, positions and cache slots, int64 [T] each, and their attention groups.

    `last_rows[i]` is the row of the last token of the i-th span given.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[Group]
    last_rows: list[int]


def make_batch(spans: Items[Span], page_tokens: int) -> Batch:
    """Lay the spans of one step out in rows."""
    assert BLOCK_TOKENS % page_tokens == 0
    order = sorted(range(len(spans)), key=lambda i: _rank(spans[i]))
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows = [0] * len(spans)
    for i in order:
        span = spans[i]
        token_ids += span.token_ids
        for position in range(span.start, span.stop):
            positions.append(position)
            page, offset = divmod(position, page_tokens)
            slots.append(span.pages[page] * page_tokens + offset)
        last_rows[i] = len(token_ids) - 1
    singles = [spans[i] for i in order if len(spans[i].token_ids) == 1]
    groups = [_make_group(0, singles, page_tokens)] if singles else []
    first = len(singles)
    for span in (spans[i] for i in order[len(singles) :]):
        groups.append(_make_group(first, [span], page_tokens))
        first += len(span.token_ids)
    return Batch(
        torch.tensor(token_ids),
        torch.tensor(positions),
        torch.tensor(slots),
        groups,
        last_rows,
    )


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

"""Runs of query blocks with the keys that they keep: what every streamed computation loops over, in O(T) memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.layout import BlockLayout
from tl_stream.masking import within

CHUNK_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class Chunk:
    """Query rows `start <= i < stop` (in blocks of `rows`; the last may run past the end) and their kept keys.

    Attributes:
        start: First query.
        stop: One past the last query.
        rows: Queries a block here.
        key_blocks: Kept key blocks, `[batch, head_index, block, slot]`; None where the rows read keys `0 <= j < n_keys`.
        key_pos: Position of each kept key, `[batch or 1, head_index or 1, block, key]`.
        placed: The same, with `masking.NEVER` where a key is padding or its slot unused.
        n_keys: Number of kept keys a row.
    """

    start: int
    stop: int
    rows: int
    key_blocks: Int[Tensor, "batch head_index block slot"] | None
    key_pos: Int[Tensor, "_ _ block key"]
    placed: Int[Tensor, "_ _ block key"]
    n_keys: int
    layout: BlockLayout

    @property
    def query_pos(self) -> Int[Tensor, "block rows"]:
        """Position of each query."""
        n_blocks = -(-(self.stop - self.start) // self.rows)
        positions = torch.arange(self.start, self.start + n_blocks * self.rows, device=self.placed.device)
        return positions.view(n_blocks, self.rows)

    def allowed(self) -> Bool[Tensor, "_ _ block rows key"]:
        """Which of the kept entries the mask allows."""
        return within(self.placed[:, :, :, None], *self.layout.mask.bounds(self.query_pos[:, :, None]))

    def partial_slots(self) -> tuple[Int[Tensor, " n"], ...]:
        """The kept blocks of which the mask forbids something: batch, head, block and slot index of each."""
        placed = self.placed.unflatten(-1, (-1, self.layout.block_k))
        start, stop = self.layout.mask.bounds(self.query_pos)
        partial = placed.amax(-1) >= stop.amin(-1)[:, None]
        if start is not None:
            partial = partial | (placed.amin(-1) < start.amax(-1)[:, None])
        return partial.nonzero().unbind(-1)

    def cut_queries(self, x: Tensor) -> Tensor:
        """Rows of `[batch, head_index, query_pos, ...]` as `[batch, head_index, block, rows, ...]`."""
        part = x[:, :, self.start : self.stop]
        missing = self.query_pos.numel() - part.shape[2]
        part = pad(part, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else part
        return part.unflatten(2, (-1, self.rows))

    def join_queries(self, x: Tensor) -> Tensor:
        """The inverse of `cut_queries`."""
        return x.flatten(2, 3)[:, :, : self.stop - self.start]


def chunks(layout: BlockLayout) -> Iterator[Chunk]:
    """All query rows, in chunks of about `CHUNK_ENTRIES` scores over batch and heads."""
    yield from (_full_chunks if layout.is_full else _kept_chunks)(layout, CHUNK_ENTRIES)


def whole(layout: BlockLayout) -> Chunk:
    """All query rows in one chunk, in blocks of `block_q`, with one slot a kept block."""
    return _kept_chunk(layout, 0, layout.n_q_blocks)


def _kept_chunks(layout: BlockLayout, entries: int) -> Iterator[Chunk]:
    per_block = layout.batch * layout.n_heads * layout.block_q * layout.block_k * max(layout.n_slots, 1)
    step = max(1, entries // per_block)
    for first in range(0, layout.n_q_blocks, step):
        yield _kept_chunk(layout, first, min(first + step, layout.n_q_blocks))


def _kept_chunk(layout: BlockLayout, first: int, last: int) -> Chunk:
    indices, _ = layout.rows(first, last)
    stop = min(last * layout.block_q, layout.mask.query_length)
    keys = layout.key_positions(first, last)
    return Chunk(
        first * layout.block_q, stop, layout.block_q, indices, keys, layout.placed_keys(first, last), keys.shape[-1], layout
    )


def _full_chunks(layout: BlockLayout, entries: int) -> Iterator[Chunk]:
    n_queries, n_keys = layout.seq_lengths
    step = max(1, entries // (layout.batch * layout.n_heads * n_keys))
    batch = torch.arange(layout.batch, device=layout.device)[:, None, None, None]
    for start in range(0, n_queries, step):
        stop = min(start + step, n_queries)
        seen = int(layout.mask.stop[start:stop].max())
        keys = torch.arange(seen, device=layout.device)[None, None, None]
        placed = layout.mask.place(batch, keys)
        yield Chunk(start, stop, stop - start, None, keys, placed, seen, layout)

"""Runs of query blocks with the keys that they keep: what every streamed computation loops over, in O(T) memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.attention.complement import Complement
from tl_stream.layout import BlockLayout
from tl_stream.masking import NEVER

CHUNK_ENTRIES = 2**20
COPIED_ENTRIES = 2**21


@dataclass(frozen=True, eq=False)
class Chunk:
    """Query rows `start <= i < stop` (in blocks of `rows`; the last may run past the end) and their kept keys.

    Attributes:
        start: First query.
        stop: One past the last query.
        rows: Queries a block here.
        key_blocks: Kept key blocks, `[batch, head_index, block, slot]`; None where the rows read keys `0 <= j < n_keys`.
        used: Which of them count, likewise.
        n_keys: Number of kept keys a row.
    """

    start: int
    stop: int
    rows: int
    key_blocks: Int[Tensor, "batch head_index block slot"] | None
    used: Bool[Tensor, "batch head_index block slot"] | None
    n_keys: int
    layout: BlockLayout

    @property
    def query_pos(self) -> Int[Tensor, "block rows"]:
        """Position of each query."""
        n_blocks = -(-(self.stop - self.start) // self.rows)
        positions = torch.arange(self.start, self.start + n_blocks * self.rows, device=self.layout.device)
        return positions.view(n_blocks, self.rows)

    @property
    def key_pos(self) -> Int[Tensor, "_ _ block key"]:
        """Position of each kept key; where nothing tells them apart, batch, head_index and block are of size 1."""
        if self.key_blocks is None:
            return torch.arange(self.n_keys, device=self.layout.device)[None, None, None]
        return self._positions(self.key_blocks).flatten(-2)

    def allowed(self) -> Bool[Tensor, "_ _ block rows key"]:
        """Which of the kept entries the mask allows."""
        batch = torch.arange(self.layout.batch, device=self.layout.device)[:, None, None, None, None]
        allowed = self.layout.mask.allows(batch, self.query_pos[:, :, None], self.key_pos[:, :, :, None])
        if isinstance(self.layout, Complement):
            return allowed & ~self.layout.dropped(self.start, self.stop, self.n_keys)[:, :, None]
        return allowed if self.used is None else allowed & self.used.repeat_interleave(self.layout.block_k, -1)[:, :, :, None]

    def partial_slots(self) -> tuple[tuple[Int[Tensor, " n"], ...], Bool[Tensor, "n rows block_k"]]:
        """The slots of which the mask forbids something, as batch, head, block and slot indices, and what it allows of each."""
        assert self.key_blocks is not None
        assert self.used is not None
        mask, batch = self.layout.mask, torch.arange(self.layout.batch, device=self.layout.device)
        start, stop = mask.bounds(self.query_pos)
        first = self.key_blocks * self.layout.block_k
        whole = self.used & (first + self.layout.block_k <= stop.amin(-1)[:, None])
        if start is not None:
            whole = whole & (first >= start.amax(-1)[:, None])
        if mask.key_valid is not None:
            placed = mask.place(batch[:, None, None, None, None], self._positions(self.key_blocks))
            whole = whole & (placed.amax(-1) < NEVER)
        index = (~whole).nonzero().unbind(-1)
        text, _, block, _ = index
        keys = self._positions(self.key_blocks[index])[:, None]
        allowed = mask.allows(text[:, None, None], self.query_pos[block][:, :, None], keys)
        return index, allowed & self.used[index][:, None, None]

    def _positions(self, key_blocks: Tensor) -> Int[Tensor, "*shape block_k"]:
        return key_blocks[..., None] * self.layout.block_k + torch.arange(self.layout.block_k, device=self.layout.device)

    def cut_queries(self, x: Tensor) -> Tensor:
        """Rows of `[batch, head_index, query_pos, ...]` as `[batch, head_index, block, rows, ...]`."""
        part = x[:, :, self.start : self.stop]
        missing = self.query_pos.numel() - part.shape[2]
        part = pad(part, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else part
        return part.unflatten(2, (-1, self.rows))

    def join_queries(self, x: Tensor) -> Tensor:
        """The inverse of `cut_queries`."""
        return x.flatten(2, 3)[:, :, : self.stop - self.start]


def chunks(layout: BlockLayout, width: int) -> Iterator[Chunk]:
    """All query rows, in chunks of at most about `CHUNK_ENTRIES` scores, and `COPIED_ENTRIES` numbers of the kept keys, over
    batch and heads: what is copied for a chunk should still be at hand when it is multiplied.

    Args:
        layout: What is kept.
        width: Numbers that are copied of each kept key, once a query block.
    """
    yield from _full_chunks(layout) if layout.is_full else _kept_chunks(layout, width)


def whole(layout: BlockLayout) -> Chunk:
    """All query rows in one chunk, in blocks of `block_q`, with one slot a kept block."""
    return _kept_chunk(layout, 0, layout.n_q_blocks, layout.n_slots)


def _kept_chunks(layout: BlockLayout, width: int) -> Iterator[Chunk]:
    assert layout.kv_num_blocks is not None
    n_kept = layout.kv_num_blocks.amax((0, 1)).tolist()
    keys = layout.batch * layout.n_heads * layout.block_k * max(layout.n_slots, 1)
    step = max(1, min(CHUNK_ENTRIES // (keys * layout.block_q), COPIED_ENTRIES // (keys * width)))
    for first in range(0, layout.n_q_blocks, step):
        last = min(first + step, layout.n_q_blocks)
        yield _kept_chunk(layout, first, last, max(1, *n_kept[first:last]))


def _kept_chunk(layout: BlockLayout, first: int, last: int, n_slots: int) -> Chunk:
    stop = min(last * layout.block_q, layout.mask.query_length)
    key_blocks, used = (x[..., :n_slots] for x in layout.rows(first, last))
    return Chunk(first * layout.block_q, stop, layout.block_q, key_blocks, used, n_slots * layout.block_k, layout)


def _full_chunks(layout: BlockLayout) -> Iterator[Chunk]:
    n_queries, n_keys = layout.seq_lengths
    step = max(1, CHUNK_ENTRIES // (layout.batch * layout.n_heads * n_keys))
    for start in range(0, n_queries, step):
        stop = min(start + step, n_queries)
        seen = int(layout.mask.stop[start:stop].max())
        yield Chunk(start, stop, stop - start, None, None, seen, layout)

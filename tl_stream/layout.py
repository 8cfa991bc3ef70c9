"""Which key blocks each query block keeps, in FlexAttention's language (`BlockMask`: kv_indices, kv_num_blocks)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_stream.masking import NEVER, AttentionMask, within

MAX_DENSE_ENTRIES = 2**28
_CHUNK_ENTRIES = 2**22


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The kept key blocks of each query block, per batch element and head.

    Query block i holds queries `i * block_q <= query_pos < (i + 1) * block_q`; key blocks likewise. A full layout keeps
    everything that the mask allows and stores no indices (they would be (T / block)^2).

    Args:
        kv_indices: Kept key blocks in ascending order, `[batch, head_index, q_block, slot]`, int32; only the first
            `kv_num_blocks` of a row count. None: a full layout.
        kv_num_blocks: Number of kept key blocks, `[batch, head_index, q_block]`, int32. None: a full layout.
        mask: Which token pairs may attend at all.
        block_q: Queries a block.
        block_k: Keys a block.
        batch: Number of batch elements.
        n_heads: Number of query heads.
    """

    kv_indices: Int[Tensor, "batch head_index q_block slot"] | None
    kv_num_blocks: Int[Tensor, "batch head_index q_block"] | None
    mask: AttentionMask
    block_q: int
    block_k: int
    batch: int
    n_heads: int

    @classmethod
    def full(cls, mask: AttentionMask, block_q: int, block_k: int, batch: int, n_heads: int) -> BlockLayout:
        """Keep whatever `mask` allows."""
        return cls(None, None, mask, block_q, block_k, batch, n_heads)

    def to_full(self) -> BlockLayout:
        """The layout of the same shape and blocks that keeps whatever the mask allows."""
        return BlockLayout.full(self.mask, self.block_q, self.block_k, self.batch, self.n_heads)

    @property
    def is_full(self) -> bool:
        """Whether everything that the mask allows is kept, without stored indices."""
        return self.kv_indices is None

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Number of queries and of keys, as `BlockMask.seq_lengths`."""
        return self.mask.query_length, self.mask.key_length

    @property
    def n_q_blocks(self) -> int:
        """Number of query blocks."""
        return -(-self.mask.query_length // self.block_q)

    @property
    def n_kv_blocks(self) -> int:
        """Number of key blocks."""
        return -(-self.mask.key_length // self.block_k)

    @property
    def n_slots(self) -> int:
        """Largest number of key blocks that a query block can keep here."""
        return self.n_kv_blocks if self.kv_indices is None else self.kv_indices.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, head_index, query_pos, key_pos)`."""
        return self.batch, self.n_heads, self.mask.query_length, self.mask.key_length

    @property
    def device(self) -> torch.device:
        """Where the indices live."""
        return self.mask.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored indices."""
        if self.kv_indices is None or self.kv_num_blocks is None:
            return 0
        return self.kv_indices.nbytes + self.kv_num_blocks.nbytes

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        if self.device == torch.device(device):
            return self
        return self._with_indices(lambda indices: indices.to(device), self.mask.to(device))

    def rows(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[Int[Tensor, "batch head_index q_block slot"], Bool[Tensor, "batch head_index q_block slot"]]:
        """Key blocks of the query blocks `start <= i < stop`, and which of them count (the others hold index 0)."""
        stop = self.n_q_blocks if stop is None else stop
        if self.kv_indices is None or self.kv_num_blocks is None:
            every = torch.arange(self.n_kv_blocks, device=self.device)
            indices = every.expand(self.batch, self.n_heads, stop - start, -1)
            return indices, torch.ones((), dtype=torch.bool, device=self.device).expand(indices.shape)
        indices = self.kv_indices[:, :, start:stop].long()
        slots = torch.arange(self.n_slots, device=self.device)
        return indices, slots < self.kv_num_blocks[:, :, start:stop, None]

    def key_positions(self, start: int = 0, stop: int | None = None) -> Int[Tensor, "batch head_index q_block key"]:
        """Token position of each kept key of the query blocks, `key = slot * block_k + offset in the block`."""
        indices, _ = self.rows(start, stop)
        offsets = torch.arange(self.block_k, device=self.device)
        return (indices[..., None] * self.block_k + offsets).flatten(-2)

    def query_positions(self, start: int = 0, stop: int | None = None) -> Int[Tensor, "q_block block_q"]:
        """Token position of each query of the query blocks; those of the last block may lie past the end."""
        stop = self.n_q_blocks if stop is None else stop
        return torch.arange(start * self.block_q, stop * self.block_q, device=self.device).view(-1, self.block_q)

    def placed_keys(self, start: int = 0, stop: int | None = None) -> Int[Tensor, "batch head_index q_block key"]:
        """`key_positions`, with `masking.NEVER` for padding and unused slots."""
        _, used = self.rows(start, stop)
        batch = torch.arange(self.batch, device=self.device)[:, None, None, None]
        placed = self.mask.place(batch, self.key_positions(start, stop))
        return placed.masked_fill(~used.repeat_interleave(self.block_k, -1), NEVER)

    def allowed(self, start: int = 0, stop: int | None = None) -> Bool[Tensor, "batch head_index q_block block_q key"]:
        """Which entries of the kept blocks the mask allows; block padding and unused slots are False."""
        first, last = self.mask.bounds(self.query_positions(start, stop)[:, :, None])
        return within(self.placed_keys(start, stop)[:, :, :, None], first, last)

    def find(
        self, batch: Tensor, head: Tensor, q_block: Tensor, kv_block: Tensor
    ) -> tuple[Int[Tensor, ...], Bool[Tensor, ...]]:
        """The slot in which each key block is kept, and whether it is kept; the index tensors broadcast."""
        if self.kv_indices is None:
            slot = kv_block.expand(torch.broadcast_shapes(batch.shape, head.shape, q_block.shape, kv_block.shape))
            return slot, torch.ones_like(slot, dtype=torch.bool)
        indices, used = self.rows()
        hits = (indices[batch, head, q_block] == kv_block[..., None]) & used[batch, head, q_block]
        if hits.shape[-1] == 0:
            missing = torch.zeros(hits.shape[:-1], dtype=torch.long, device=self.device)
            return missing, missing.bool()
        return hits.long().argmax(-1), hits.any(-1)

    @cached_property
    def n_kept_pairs(self) -> int:
        """Token pairs that are kept, over batch and heads."""
        if self.kv_indices is None:
            return self.n_pairs
        step = max(1, _CHUNK_ENTRIES // (self.batch * self.n_heads * self.block_q * max(self.n_slots, 1)))
        return sum(self._kept_pairs(i, min(i + step, self.n_q_blocks)) for i in range(0, self.n_q_blocks, step))

    @cached_property
    def n_pairs(self) -> int:
        """Token pairs that the mask allows, over batch and heads."""
        return self.mask.n_pairs(self.batch) * self.n_heads

    @property
    def density(self) -> float:
        """Share of the allowed token pairs that is kept; 1.0 where the mask allows none."""
        return self.n_kept_pairs / self.n_pairs if self.n_pairs else 1.0

    @property
    def pruned(self) -> float:
        """Share of the allowed token pairs that is dropped: 1 - density."""
        return 1.0 - self.density

    def to_dense(self) -> Bool[Tensor, "batch head_index query_pos key_pos"]:
        """True where a token pair is kept, mask included. Makes batch x head x T x T bytes.

        Raises:
            ValueError: More than `MAX_DENSE_ENTRIES` entries.
        """
        self.check_dense()
        batch = torch.arange(self.batch, device=self.device)[:, None, None, None]
        queries = torch.arange(self.mask.query_length, device=self.device)[:, None]
        keys = torch.arange(self.mask.key_length, device=self.device)
        allowed = self.mask.allows(batch, queries, keys).expand(self.shape)
        blocks = self.to_block_dense()
        kept = blocks.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        return allowed & kept[:, :, : self.mask.query_length, : self.mask.key_length]

    def to_block_dense(self) -> Bool[Tensor, "batch head_index q_block kv_block"]:
        """True where a key block is kept; causality within and between blocks is the mask's affair."""
        shape = (self.batch, self.n_heads, self.n_q_blocks, self.n_kv_blocks)
        if self.kv_indices is None:
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        indices, used = self.rows()
        counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return counts.scatter_add(-1, indices, used.int()) > 0

    def union(self, other: BlockLayout) -> BlockLayout:
        """Keep what either keeps. Both must describe the same batch, heads, lengths and blocks.

        Raises:
            ValueError: The two differ in shape or block sizes.
        """
        if (self.shape, self.block_q, self.block_k) != (other.shape, other.block_q, other.block_k):
            raise ValueError(
                f"other was a layout of shape {other.shape} in blocks of {other.block_q} x {other.block_k}; expected "
                f"{self.shape} in blocks of {self.block_q} x {self.block_k}."
            )
        if self.is_full or other.is_full:
            return replace(self, kv_indices=None, kv_num_blocks=None)
        (mine, my_use), (theirs, their_use) = self.rows(), other.rows()
        return self._from_candidates(torch.cat([mine, theirs], -1), torch.cat([my_use, their_use], -1))

    def with_blocks(self, batch: Tensor, head: Tensor, q_block: Tensor, kv_block: Tensor) -> BlockLayout:
        """Keep the listed blocks too. The index tensors are `[block]` each."""
        if self.kv_indices is None or not len(batch):
            return self
        row = (batch * self.n_heads + head) * self.n_q_blocks + q_block
        flat = (row * self.n_kv_blocks + kv_block).unique()
        row, kv_block = flat // self.n_kv_blocks, flat % self.n_kv_blocks
        counts = torch.bincount(row, minlength=self.batch * self.n_heads * self.n_q_blocks)
        slot = torch.arange(len(row), device=self.device) - (counts.cumsum(0) - counts)[row]
        extra = torch.zeros(len(counts), int(counts.max()), dtype=torch.long, device=self.device)
        extra[row, slot] = kv_block
        used = torch.arange(extra.shape[-1], device=self.device) < counts[:, None]
        rows = (self.batch, self.n_heads, self.n_q_blocks, -1)
        indices, mine = self.rows()
        return self._from_candidates(torch.cat([indices, extra.view(rows)], -1), torch.cat([mine, used.view(rows)], -1))

    def select(self, texts: Int[Tensor, " batch"], heads: Int[Tensor, " head_index"]) -> BlockLayout:
        """The layout of some batch elements and heads."""
        part = self._with_indices(lambda indices: indices[texts][:, heads], self.mask.of_texts(texts))
        return replace(part, batch=len(texts), n_heads=len(heads))

    def first_rows(self, n: int) -> BlockLayout:
        """The layout of the first `n` queries."""
        n_blocks = -(-n // self.block_q)
        mask = self.mask.part(range(n), range(self.mask.key_length))
        return self._with_indices(lambda indices: indices[:, :, :n_blocks], mask)

    def for_run(self, mask: AttentionMask, batch: int, n_heads: int) -> BlockLayout:
        """The same blocks under the mask of another run; a layout of one text serves every text.

        Raises:
            ValueError: The run is of another size.
        """
        check_run(self.shape, (batch, n_heads, mask.query_length, mask.key_length))
        texts = torch.arange(batch, device=self.device) % self.batch
        part = self if self.batch == batch else self.select(texts, torch.arange(n_heads, device=self.device))
        return replace(part.to(mask.device), mask=mask)

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.shape
        kept = "full" if self.is_full else f"k <= {self.n_slots} of {self.n_kv_blocks} key blocks"
        return (
            f"BlockLayout(batch={batch}, heads={heads}, query_pos={queries}, key_pos={keys}, "
            f"block_q={self.block_q}, block_k={self.block_k}, {kept}, pruned={self.pruned:.4f})"
        )

    def _with_indices(self, change: Callable[[Tensor], Tensor], mask: AttentionMask) -> BlockLayout:
        if self.kv_indices is None or self.kv_num_blocks is None:
            return replace(self, mask=mask)
        return replace(self, kv_indices=change(self.kv_indices), kv_num_blocks=change(self.kv_num_blocks), mask=mask)

    def _from_candidates(self, indices: Tensor, used: Tensor) -> BlockLayout:
        """A layout that keeps the used `indices`, sorted and without repetition."""
        ordered = indices.masked_fill(~used, self.n_kv_blocks).sort(-1).values
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
        ordered = ordered.masked_fill(repeated, self.n_kv_blocks).sort(-1).values
        number = (ordered < self.n_kv_blocks).sum(-1)
        width = int(number.max())
        ordered = ordered[..., :width].masked_fill(ordered[..., :width] == self.n_kv_blocks, 0)
        return replace(self, kv_indices=ordered.int(), kv_num_blocks=number.int())

    def _kept_pairs(self, start: int, stop: int) -> int:
        indices, used = self.rows(start, stop)
        batch = torch.arange(self.batch, device=self.device)[:, None, None, None, None]
        queries = self.query_positions(start, stop)[:, :, None]
        first = indices[:, :, :, None] * self.block_k
        counts = self.mask.counts(batch, queries, first, first + self.block_k)
        return int((counts * used[:, :, :, None]).sum())

    def check_dense(self) -> None:
        """Raise ValueError where a dense tensor of this shape would be larger than `MAX_DENSE_ENTRIES`."""
        batch, heads, queries, keys = self.shape
        entries = batch * heads * queries * keys
        if entries > MAX_DENSE_ENTRIES:
            raise ValueError(
                f"to_dense() would make {batch} x {heads} x {queries} x {keys} = {entries:,} entries; at most "
                f"{MAX_DENSE_ENTRIES:,} are made. Take fewer heads or a range of queries, or use to_block_dense()."
            )


def check_run(own: tuple[int, int, int, int], run: tuple[int, int, int, int]) -> None:
    """Raise ValueError where a layout of shape `own` can't serve a run of that shape."""
    if own[1:] != run[1:] or own[0] not in (1, run[0]):
        raise ValueError(
            f"layout_from held a layout of (batch, head_index, query_pos, key_pos) = {own}; expected {run}, the size of this "
            "run. Trace a text of the same length, or leave layout_from out."
        )

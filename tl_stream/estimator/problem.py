"""What every estimator is given: queries and keys in blocks, the mask, and what the model does to the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream import score_mod
from tl_stream.estimator.compiled import compiled
from tl_stream.estimator.pyramid import to_blocks
from tl_stream.masking import NEVER, AttentionMask, within
from tl_stream.score_mod import ScoreMod

CHUNK_ENTRIES = 2**21


class Problem(NamedTuple):
    """One layer's queries and keys.

    Attributes:
        queries: Scaled, in blocks, padded with zeros, `[batch, head_index, q_block, block_q, d_head]`.
        keys: In blocks, padded with zeros, `[batch, kv_head_index, kv_block, block_k, d_head]`.
        mask: Which token pairs may attend.
        mods: What the model does to their scores.
        real: False for a query that is padding, or past the end, `[q_block, block_q]`; the same in all texts
            (`tl_stream.estimator.texts`). Such a query weighs in nothing.
        first_key: First key that any query of a block may read, `[q_block]`.
        last_key: One past the last one, `[q_block]`.
        first_own: The first query's own position among the keys, `[q_block]`.
        first_block: Number of the first of the key blocks.
    """

    queries: Float[Tensor, "batch head_index q_block block_q d_head"]
    keys: Float[Tensor, "batch kv_head_index kv_block block_k d_head"]
    mask: AttentionMask
    mods: Sequence[ScoreMod]
    real: Bool[Tensor, "q_block block_q"]
    first_key: Int[Tensor, " q_block"]
    last_key: Int[Tensor, " q_block"]
    first_own: Int[Tensor, " q_block"]
    first_block: int = 0

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, mask: AttentionMask, block_q: int, block_k: int, scale: float, mods: Sequence[ScoreMod]
    ) -> Problem:
        """Cut q and k `[batch, heads, pos, d_head]` into blocks, in float32 or better. Padding is the same in all texts."""
        wide = torch.promote_types(k.dtype, torch.float32)
        rows = torch.arange(-(-q.shape[2] // block_q) * block_q, device=q.device)
        real, rows = rows < mask.query_length, rows.clamp(max=mask.query_length - 1)
        not_padding = mask.queries()
        if not_padding is not None:
            real = real & not_padding[0, rows]
            q = q * real[: q.shape[2], None]
        start, stop = mask.bounds(rows)
        start = torch.zeros_like(stop) if start is None else start
        first_key, first_own = (x.masked_fill(~real, NEVER).view(-1, block_q).amin(-1) for x in (start, stop - 1))
        last_key = stop.masked_fill(~real, 0).view(-1, block_q).amax(-1)
        queries, keys = to_blocks(q.to(wide) * scale, block_q), to_blocks(k.to(wide), block_k)
        return cls(queries, keys, mask, mods, real.view(-1, block_q), first_key, last_key, first_own)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(batch, head_index, q_block)`."""
        batch, heads, n_blocks = self.queries.shape[:3]
        return batch, heads, n_blocks

    @property
    def block_q(self) -> int:
        """Queries a block."""
        return self.queries.shape[3]

    @property
    def block_k(self) -> int:
        """Keys a block."""
        return self.keys.shape[3]

    @property
    def head_index(self) -> Int[Tensor, "head_index 1 1"]:
        """Query heads, shaped to broadcast over `[batch, head_index, q_block, ...]`."""
        return torch.arange(self.queries.shape[1], device=self.queries.device)[:, None, None]

    @property
    def batch_index(self) -> Int[Tensor, "batch 1 1 1"]:
        """Batch elements, shaped likewise."""
        return torch.arange(self.queries.shape[0], device=self.queries.device)[:, None, None, None]

    @property
    def diagonal(self) -> Int[Tensor, "q_block 1"]:
        """Each query block's last own key block: that of the last key it may read."""
        return ((self.last_key - 1).clamp(min=0) // self.block_k)[:, None]

    @property
    def sink(self) -> Int[Tensor, "batch 1 1 1"]:
        """The block of each text's first key that is no padding."""
        if self.mask.key_valid is None:
            return torch.zeros_like(self.batch_index)
        return self.mask.key_valid.int().argmax(-1)[:, None, None, None] // self.block_k

    def readable_blocks(self) -> tuple[Int[Tensor, "batch head_index q_block kv_block"], Bool[Tensor, "q_block kv_block"]]:
        """All key blocks, and which of them hold a key that some query of the block may read (padding aside)."""
        blocks = torch.arange(self.first_block, self.first_block + self.keys.shape[2], device=self.keys.device)
        return blocks.expand(*self.shape, -1), self.readable(blocks, self.block_k)

    def blocks_in_reach(self) -> tuple[Int[Tensor, "batch head_index q_block kv_block"], Bool[Tensor, "q_block kv_block"]]:
        """The same; of a text much longer than the window, each query block's own few instead of all key blocks."""
        blocks, readable = self.readable_blocks()
        n_blocks = self.keys.shape[2]
        if 2 * self.span >= n_blocks:  # selecting keys copies them
            return blocks, readable
        within = self.first_key[:, None] // self.block_k + torch.arange(self.span, device=blocks.device)
        blocks = within.clamp(max=n_blocks - 1)
        return blocks.expand(*self.shape, -1), self.readable(blocks, self.block_k) & (within < n_blocks)

    def readable(self, blocks: Tensor, size: int) -> Tensor:
        """Whether blocks of so many keys hold one that some query of the query block may read, padding aside."""
        return (blocks * size < self.last_key[:, None]) & ((blocks + 1) * size > self.first_key[:, None])

    def runs(self, entries: int, first: int = 0, last: int | None = None, most: int | None = None) -> list[tuple[int, int]]:
        """Runs `start <= i < stop` of query blocks (of those from `first` to `last`) that need about `CHUNK_ENTRIES` numbers.

        Args:
            entries: Numbers that a query block and head need.
            first: First query block.
            last: One past the last one; None: all of them.
            most: Query blocks in a run, at most; None: any number.
        """
        batch, heads, n_blocks = self.shape
        last = n_blocks if last is None else last
        step = max(1, CHUNK_ENTRIES // (batch * heads * entries))
        step = step if most is None else min(step, most)
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def slice(self, start: int, stop: int) -> Problem:
        """The same problem for the query blocks `start <= i < stop`. Query positions stay absolute (see `query_pos`)."""
        part = slice(start, stop)
        by_block = {name: getattr(self, name)[part] for name in ("real", "first_key", "last_key", "first_own")}
        return self._replace(queries=self.queries[:, :, part], **by_block)

    def with_readable_keys(self) -> Problem:
        """The same problem, less the key blocks before and behind all that any query may read."""
        first = min(int(self.first_key.min()) // self.block_k, self.keys.shape[2] - 1)
        stop = max(-(-int(self.last_key.max()) // self.block_k), first + 1)
        return self._replace(keys=self.keys[:, :, first:stop], first_block=first)

    @property
    def n_readable(self) -> Int[Tensor, " q_block"]:
        """How many key blocks hold a key that some query of the block may read."""
        first, last = self.first_key // self.block_k, (self.last_key - 1) // self.block_k
        return (last - first + 1).clamp(min=0)

    @property
    def span(self) -> int:
        """The most key blocks that a query block may read: of a window; else all of them."""
        return self.keys.shape[2] if self.mask.start is None else int(self.n_readable.max())

    def select(self, x: Float[Tensor, "batch kv_head_index node *rest"], nodes: Tensor) -> Tensor:
        """Rows of `x` by query head: `[batch, head_index, q_block, c, *rest]` for nodes `[batch, head_index, q_block, c]`."""
        _, kv_heads, n_nodes = x.shape[:3]
        kv_head = self.head_index[None] // (nodes.shape[1] // kv_heads)
        flat = (self.batch_index * kv_heads + kv_head) * n_nodes + nodes
        return x.flatten(0, 2).index_select(0, flat.flatten()).unflatten(0, nodes.shape)

    def products(self, blocks: Tensor | None) -> Float[Tensor, "batch head_index q_block block_q candidate block_k"]:
        """Each query's scaled q . k with the keys of candidate blocks, `[batch, head_index, q_block, candidate]`; None: all."""
        if blocks is not None:
            keys = self.select(self.keys, blocks).flatten(3, 4)
            return (self.queries @ keys.transpose(-1, -2)).unflatten(-1, (-1, self.block_k))
        grouped = self.queries.unflatten(1, (self.keys.shape[1], -1))
        products = grouped.flatten(2, 4) @ self.keys.flatten(2, 3).transpose(-1, -2)
        return products.unflatten(2, grouped.shape[2:5]).flatten(1, 2).unflatten(-1, (-1, self.block_k))

    def score(self, products: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """Score mods, on products `[batch, head_index, ...]` of any further shape."""
        if not self.mods:
            return products
        extra = (1,) * (products.dim() - 4)
        batch = self.batch_index.view(-1, 1, 1, 1, *extra)
        head = self.head_index.view(-1, 1, 1, *extra)
        return score_mod.apply(self.mods, products, batch, head, query_pos, key_pos)


def block_masses(
    problem: Problem,
    query_pos: Int[Tensor, "q_block block_q"],
    blocks: Tensor | None,
    used: Bool[Tensor, ...],
    *,
    compile: bool = False,
) -> Float[Tensor, "batch head_index q_block candidate"]:
    """The share of each query block's attention that each candidate key block holds, among the candidates.

    The exact logits of all the block's queries, softmax per query over the candidates' keys, summed within a key block
    and averaged over the queries. O(candidates * block_q * block_k * d_head) a query block, in runs whose keys and logits
    stay small.

    Args:
        problem: Queries `[batch, head_index, q_block, block_q, d_head]` and keys.
        query_pos: Position of each query.
        blocks: Candidate key blocks, `[batch, head_index, q_block, candidate]`; None: all of them, in order.
        used: Which candidates count, broadcastable to `[batch, head_index, q_block, candidate]`; the others get 0.
        compile: Run it through `torch.compile`.
    """
    run = compiled(_block_masses) if compile else _block_masses
    copied = 1 if blocks is None else problem.keys.shape[-1]  # selected keys are copies
    rows = problem.runs(used.shape[-1] * problem.block_k * max(problem.block_q, copied))
    parts = [
        run(problem.slice(i, j), query_pos[i:j], blocks if blocks is None else blocks[:, :, i:j], used[..., i:j, :])
        for i, j in rows
    ]
    return torch.cat(parts, 2)


def _block_masses(problem: Problem, query_pos: Tensor, blocks: Tensor | None, used: Tensor) -> Tensor:
    products = problem.products(blocks)
    if blocks is None:
        blocks = problem.first_block + torch.arange(used.shape[-1], device=used.device)[None, None, None]
    offsets = torch.arange(problem.block_k, device=blocks.device)
    key_pos = blocks[..., None] * problem.block_k + offsets
    rows = query_pos[:, :, None, None]
    logits = problem.score(products, rows, key_pos[:, :, :, None])
    placed = torch.where(used[..., None], problem.mask.place(problem.batch_index[..., None], key_pos), NEVER)
    allowed = within(placed[:, :, :, None], *problem.mask.bounds(rows))
    weights = logits.masked_fill_(~allowed, -torch.inf).flatten(-2).softmax(-1)
    # A query that may read nothing has NaN for shares, and adds nothing.
    shares = weights.unflatten(-1, (-1, problem.block_k)).sum(-1).nan_to_num(0.0)
    return (shares * problem.real[:, :, None]).sum(3) / problem.real.sum(-1).clamp(min=1)[:, None]

"""`JoinedLayout`: what is kept where the last query rows read everything and those before are sparse.

Those last rows can't be in a `BlockLayout`, whose query blocks all have room for as many key blocks: T / block_q of them with
room for T / block_k are O(T^2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_stream.layout import BlockLayout, check_run
from tl_stream.masking import AttentionMask


@dataclass(frozen=True, eq=False)
class JoinedLayout:
    """The layouts of consecutive queries (each of all keys) as one; the names are `BlockLayout`'s.

    Args:
        parts: The layouts, in the order of their queries.
    """

    parts: tuple[BlockLayout, ...]

    @property
    def mask(self) -> AttentionMask:
        """Which token pairs may attend at all."""
        masks = [part.mask for part in self.parts]
        starts = [mask.start for mask in masks if mask.start is not None]
        stop = torch.cat([mask.stop for mask in masks])
        return replace(masks[0], start=torch.cat(starts) if starts else None, stop=stop)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, head_index, query_pos, key_pos)`."""
        batch, heads, _, keys = self.parts[0].shape
        return batch, heads, sum(part.shape[2] for part in self.parts), keys

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.shape[2:]

    @property
    def batch(self) -> int:
        """Number of batch elements."""
        return self.parts[0].batch

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.parts[0].n_heads

    @property
    def block_q(self) -> int:
        """Queries a block, counted from the first query of all."""
        return self.parts[0].block_q

    @property
    def block_k(self) -> int:
        """Keys a block."""
        return self.parts[0].block_k

    @property
    def n_q_blocks(self) -> int:
        """Number of query blocks."""
        return -(-self.shape[2] // self.block_q)

    @property
    def n_kv_blocks(self) -> int:
        """Number of key blocks."""
        return self.parts[0].n_kv_blocks

    @property
    def is_full(self) -> bool:
        """Whether all rows keep everything."""
        return all(part.is_full for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the indices live."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored indices."""
        return sum(part.nbytes for part in self.parts)

    @property
    def n_kept_pairs(self) -> int:
        """Token pairs that are kept, over batch and heads."""
        return sum(part.n_kept_pairs for part in self.parts)

    @property
    def n_pairs(self) -> int:
        """Token pairs that the mask allows, over batch and heads."""
        return sum(part.n_pairs for part in self.parts)

    @property
    def density(self) -> float:
        """Share of the allowed token pairs that is kept; 1.0 where the mask allows none."""
        return self.n_kept_pairs / self.n_pairs if self.n_pairs else 1.0

    @property
    def pruned(self) -> float:
        """Share of the allowed token pairs that is dropped: 1 - density."""
        return 1.0 - self.density

    def to(self, device: torch.device | str) -> JoinedLayout:
        """The same layout on another device."""
        return JoinedLayout(tuple(part.to(device) for part in self.parts))

    def to_dense(self) -> Bool[Tensor, "batch head_index query_pos key_pos"]:
        """As `BlockLayout.to_dense`."""
        return torch.cat([part.to_dense() for part in self.parts], 2)

    def to_block_dense(self) -> Bool[Tensor, "batch head_index q_block kv_block"]:
        """True where some query of a block keeps a key block."""
        first = self.parts[0]
        kept = torch.ones(self.batch, self.n_heads, self.n_q_blocks, self.n_kv_blocks, dtype=torch.bool, device=self.device)
        whole = first.shape[2] // self.block_q  # the next block has queries of the second part, too
        kept[:, :, :whole] = first.to_block_dense()[:, :, :whole]
        return kept

    def select(self, texts: Int[Tensor, " batch"], heads: Int[Tensor, " head_index"]) -> JoinedLayout:
        """The layout of some batch elements and heads."""
        return JoinedLayout(tuple(part.select(texts, heads) for part in self.parts))

    def for_run(self, mask: AttentionMask, batch: int, n_heads: int) -> JoinedLayout:
        """As `BlockLayout.for_run`."""
        check_run(self.shape, (batch, n_heads, mask.query_length, mask.key_length))
        found, start = [], 0
        for part in self.parts:
            rows = range(start, start + part.shape[2])
            found.append(part.for_run(mask.part(rows, range(mask.key_length)), batch, n_heads))
            start = rows.stop
        return JoinedLayout(tuple(found))

    def __repr__(self) -> str:
        return f"JoinedLayout({', '.join(map(repr, self.parts))})"


def with_dense_queries(layout: BlockLayout | JoinedLayout, n: int) -> BlockLayout | JoinedLayout:
    """The same layout, whose last `n` queries (or more, where it has more such queries) keep whatever the mask allows.

    A full one is cut as well: what is computed of several layers of a run is carried out on each part.
    """
    if n <= (layout.parts[-1].shape[2] if isinstance(layout, JoinedLayout) else 0):
        return layout
    mask, start = layout.mask, layout.shape[2] - n
    if start <= 0:
        return BlockLayout.full(mask, layout.block_q, layout.block_k, layout.batch, layout.n_heads)
    first = layout.parts[0] if isinstance(layout, JoinedLayout) else layout
    rest = mask.part(range(start, mask.query_length), range(mask.key_length))
    full = BlockLayout.full(rest, min(layout.block_q, n), layout.block_k, layout.batch, layout.n_heads)
    return JoinedLayout((first.first_rows(start), full))

"""Everything that a layout leaves out: what full attention reads beside the kept blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_stream.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Complement(BlockLayout):
    """Whatever the mask allows, less the blocks that another layout keeps. It is streamed as a full layout is.

    Attributes:
        kept: The other layout.
    """

    kept: BlockLayout

    @classmethod
    def of(cls, layout: BlockLayout) -> Complement:
        """What `layout` leaves out."""
        return cls(None, None, layout.mask, layout.block_q, layout.block_k, layout.batch, layout.n_heads, layout)

    def dropped(self, start: int, stop: int, n_keys: int) -> Bool[Tensor, "batch head_index rows key"]:
        """Which entries of the queries `start <= i < stop` and keys `0 <= j < n_keys` the other layout keeps."""
        first, last = start // self.block_q, -(-stop // self.block_q)
        indices, used = self.kept.rows(first, last)
        counts = torch.zeros(*indices.shape[:3], self.n_kv_blocks, dtype=torch.int32, device=self.device)
        blocks = counts.scatter_add(-1, indices, used.int()) > 0
        rows = torch.arange(start, stop, device=self.device) // self.block_q - first
        keys = torch.arange(n_keys, device=self.device) // self.block_k
        return blocks[:, :, rows][..., keys]

    def to_dense(self) -> Bool[Tensor, "batch head_index query_pos key_pos"]:
        return super().to_dense() & ~self.kept.to_dense()

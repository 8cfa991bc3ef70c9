"""Values on some blocks, moved to other blocks of the same rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.masking import NEVER

Rows = tuple[Int[Tensor, "batch head_index q_block _"], Bool[Tensor, "batch head_index q_block _"]]  # as `BlockLayout.rows`


def relayout(values: Tensor, old: BlockLayout, new: BlockLayout, fill: float | bool) -> Tensor:
    """Values on the blocks of `new`: those of `old` where it keeps a block, else `fill`."""
    return move_blocks(values, old.rows(), new.rows(), fill, old.block_k)


def move_blocks(
    values: Shaped[Tensor, "batch head_index q_block block_q key"], old: Rows, new: Rows, fill: float | bool, block_k: int
) -> Shaped[Tensor, "batch head_index q_block block_q new_key"]:
    """Values on the key blocks `new`: those on the blocks `old` where it has one, else `fill`.

    Blocks are ascending. Indexes blocks, never entries.
    """
    (have, had), (want, used) = old, new
    if not have.shape[-1]:
        return values.new_full((*values.shape[:-1], want.shape[-1] * block_k), fill)
    have, want = have.masked_fill(~had, NEVER), want.contiguous()
    slot = torch.searchsorted(have, want).clamp(max=have.shape[-1] - 1)
    known = used & (have.gather(-1, slot) == want)
    blocks = values.unflatten(-1, (-1, block_k))
    index = slot[:, :, :, None, :, None].expand(*values.shape[:4], -1, block_k)
    found = torch.where(known[:, :, :, None, :, None], blocks.gather(-2, index), torch.as_tensor(fill, dtype=values.dtype))
    return found.flatten(-2)

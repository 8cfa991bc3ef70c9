"""Which row of each column holds its maximum or minimum: `max(-2)`, `argmax(-2)` and their kin."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.reductions import row_keys


def first_rows_of(
    tensor: BlockSparseTensor, best: Shaped[Tensor, "*batch_and_head key_pos"]
) -> Int[Tensor, "*batch_and_head key_pos"]:
    """The first row of each column that holds `best`, the column's extreme, as torch counts them. O(values) time."""
    keys, real = row_keys(tensor)
    values, n_rows = tensor.row_values(), tensor.shape[-2]
    index = keys.masked_fill(~real, 0).flatten(-2)
    extreme = best.gather(-1, index).unflatten(-1, keys.shape[-2:])
    found = real & ((values == extreme) | (values.isnan() & extreme.isnan()))
    rows = torch.arange(n_rows, device=tensor.device)[:, None].expand(keys.shape).masked_fill(~found, n_rows)
    kept = torch.full(best.shape, n_rows, device=tensor.device).scatter_reduce(-1, index, rows.flatten(-2), "amin")
    return torch.where(best == tensor.fill, torch.minimum(kept, _first_outside(tensor)), kept)


def _first_outside(tensor: BlockSparseTensor) -> Int[Tensor, "*batch_and_head key_pos"]:
    """The first row of each column that lies in no kept block; the number of rows, or more, where there is none.

    Of the query blocks that keep a key block, those lie before it that are the first, second, ... of all without a gap.
    """
    layout, shown = tensor.block_layout, tensor._view.rows
    start = shown.start // layout.block_q
    kv_block, used = layout.rows(start, -(-shown.stop // layout.block_q))
    batch, heads, n_blocks, n_slots = kv_block.shape
    q_block = torch.arange(n_blocks, device=layout.device)[:, None].expand(n_blocks, n_slots).reshape(-1)
    column = kv_block.masked_fill(~used, layout.n_kv_blocks).flatten(2)
    ordered, order = column.sort(dim=-1, stable=True)
    nth = torch.arange(ordered.shape[-1], device=layout.device) - torch.searchsorted(ordered, ordered)
    unbroken = (q_block[order] == nth).long()
    number = torch.zeros(batch, heads, layout.n_kv_blocks + 1, dtype=torch.long, device=layout.device)
    number = number.scatter_add(-1, ordered, unbroken)[..., :-1]
    first = ((number + start) * layout.block_q - shown.start).clamp(min=0)
    return tensor.drop_indexed(first.repeat_interleave(layout.block_k, -1)[..., : tensor.shape[-1]])

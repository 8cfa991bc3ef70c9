"""Sums and extremes over groups of query rows x groups of keys: what pooling and sums by sentence are made of."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.indexing import MAX_WINDOW

_ENTRIES_AT_ONCE = 2**20
_OVER_NOTHING = {"sum": 0.0, "amax": -torch.inf, "amin": torch.inf}


def check_groups(shape: tuple[int, ...], rows: Groups, keys: Groups) -> None:
    """Raise ValueError where the groups of a tensor of that shape are too many to come back dense."""
    *lead, n_rows, n_keys = shape
    size = (*lead, rows.n, keys.n)
    if prod(size) > max(MAX_WINDOW, 16 * prod(lead) * max(n_rows, n_keys)):
        raise ValueError(
            f"Pooling a sparse tensor of shape {tuple(shape)} to {size} would make {prod(size):,} numbers; at most "
            f"{MAX_WINDOW:,} come back dense. Pool more positions into one, or take fewer heads or a range of queries first."
        )


def grouped(
    tensor: BlockSparseTensor, rows: Groups, keys: Groups, how: How
) -> Shaped[Tensor, "*batch_and_head row_group key_group"]:
    """Sum, maximum or minimum of the entries in each pair of groups, as an ordinary tensor. O(values) time.

    A pair without entries gives 0, -inf or inf. Narrow floats are summed in float32, integers and bools as torch sums them.

    Raises:
        ValueError: More numbers than come back dense, or more values than are ever made at once.
    """
    check_groups(tuple(tensor.shape), rows, keys)
    values = tensor.shown_values()
    dtype = values.dtype if values.is_floating_point() else torch.long if how == "sum" else torch.double
    values = values.to(torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype)
    total = values.new_full((*values.shape[:2], (rows.n + 1) * (keys.n + 1)), _OVER_NOTHING[how])
    kept = torch.zeros_like(total, dtype=torch.long)
    has_outside = how != "sum" or tensor.fill != 0
    for blocks, index in _places(tensor, rows, keys):
        source = values[:, :, blocks].flatten(2)
        total = total.scatter_add(-1, index, source) if how == "sum" else total.scatter_reduce(-1, index, source, how)
        if has_outside:
            kept.scatter_add_(-1, index, torch.ones_like(index))
    total, kept = (x.unflatten(-1, (rows.n + 1, keys.n + 1))[..., :-1, :-1] for x in (total, kept))
    if has_outside:
        total = _with_outside(total, rows.counts[:, None] * keys.counts - kept, float(tensor.fill), how)
    return tensor.drop_indexed(total).to(dtype if how == "sum" else tensor.dtype)


def _with_outside(kept: Tensor, outside: Int[Tensor, "*_ row_group key_group"], fill: float, how: How) -> Tensor:
    """What was found in the kept blocks, and so many entries that hold the fill value beside them."""
    other = torch.full((), fill, dtype=kept.dtype, device=kept.device)
    match how:
        case "sum":
            both = kept + outside * other
        case "amax":
            both = torch.maximum(kept, other)
        case "amin":
            both = torch.minimum(kept, other)
    return torch.where(outside > 0, both, kept)


def _places(tensor: BlockSparseTensor, rows: Groups, keys: Groups) -> Iterator[tuple[slice, Tensor]]:
    """A few query blocks at a time: which ones, and the pair of groups of each of their entries as one number."""
    layout, shown = tensor.block_layout, tensor._view.rows
    end = layout.n_q_blocks * layout.block_q
    row = pad(rows.owner, (shown.start, end - shown.stop), value=rows.n).view(-1, layout.block_q)
    key = pad(keys.owner, (0, layout.n_kv_blocks * layout.block_k - len(keys.owner)), value=keys.n)
    entries = layout.batch * layout.n_heads * layout.block_q * layout.n_slots * layout.block_k
    step = max(1, _ENTRIES_AT_ONCE // max(1, entries))
    for start in range(0, layout.n_q_blocks, step):
        stop = min(start + step, layout.n_q_blocks)
        used = layout.rows(start, stop)[1].repeat_interleave(layout.block_k, -1)
        column = key[layout.key_positions(start, stop)].masked_fill(~used, keys.n)
        yield slice(start, stop), (row[start:stop, :, None] * (keys.n + 1) + column[:, :, :, None]).flatten(2)

"""Writing rows of one sparse tensor to rows of another whose layout differs, block by block: what patching does."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.relayout import Rows, move_blocks
from tl_stream.tensors.view import View


def fits(tensor: BlockSparseTensor, view: View, value: BlockSparseTensor) -> bool:
    """Whether `write_rows` can do it: equal rows (batch and head may broadcast) in blocks of the same size and place."""
    own, other = tensor._data.layout, value._data.layout
    same_blocks = (own.block_q, own.block_k) == (other.block_q, other.block_k)
    in_place = (view.rows.start - value._view.rows.start) % own.block_q == 0
    lead, target = value.shape[:-2], view.shape[:-2]
    broadcasts = len(lead) <= len(target) and all(a in (1, b) for a, b in zip(lead[::-1], target[::-1], strict=False))
    return same_blocks and in_place and broadcasts and value.shape[-2:] == view.shape[-2:] and value.fill == tensor.fill


def write_rows(tensor: BlockSparseTensor, view: View, value: BlockSparseTensor) -> None:
    """The rows of `value` in place of the rows `view` of `tensor`; blocks with anything in them are kept from here on.

    O(values) time and memory, and no index of single entries.
    """
    data, device = tensor._data, tensor.device
    texts, heads = view.texts(device), view.heads(device)
    blocks = _blocks(view.rows, data.layout)
    values, have = _source(value, view, data.layout.select(texts, heads))
    rows = data.layout.query_positions(blocks.start, blocks.stop)
    written = ((rows >= view.rows.start) & (rows < view.rows.stop))[:, :, None]
    _keep_blocks(data, (texts, heads, blocks), have, (values != value.fill) & written)
    want, used = (x[texts][:, heads] for x in data.layout.rows(blocks.start, blocks.stop))
    at = texts[:, None, None], heads[:, None], torch.arange(blocks.start, blocks.stop, device=device)
    before = data.block_values()
    moved = move_blocks(values, have, (want, used), value.fill, data.layout.block_k).to(before.dtype)
    data.values = before.index_put(at, torch.where(written, moved, before[at]))
    _write_outside(data, view, value)


def _write_outside(data: BlockData, view: View, value: BlockSparseTensor) -> None:
    """What was not recorded is edited with the rest of its rows; in a record of another run only what either recorded is."""
    if not data.hides_entries or value._data.origin is not data.origin:
        return
    new = value._data.edits.of_view(value._view, data.layout.device)
    rows = slice(value._view.rows.start, value._view.rows.stop)
    new = new.change(lambda x: x[:, :, rows] if isinstance(x, Tensor) else x)
    data.outside = data.edits.with_rows(view, data.layout, new)


def _blocks(rows: range, layout: BlockLayout) -> range:
    """The query blocks that hold `rows`."""
    return range(rows.start // layout.block_q, -(-rows.stop // layout.block_q))


def _source(value: BlockSparseTensor, view: View, target: BlockLayout) -> tuple[Tensor, Rows]:
    """Values of the query blocks that hold the rows of `value`, and their key blocks, for the batch and heads of `view`."""
    layout = value._narrow_layout()
    if value._data.hides_entries:  # 0 where the target keeps a block and `value` doesn't would be no value that it has
        layout = _common(layout, target, value._view.rows == view.rows)
    blocks = _blocks(value._view.rows, layout)
    lead = [len(axis) if isinstance(axis, range) else 1 for axis in (view.batch, view.head)]

    def place(x: Tensor) -> Tensor:
        rest = x.shape[2:]
        return x.reshape(*value.shape[:-2], *rest).expand(*view.shape[:-2], *rest).reshape(*lead, *rest)

    values = value.shown_values(layout)[:, :, blocks.start : blocks.stop]
    indices, used = layout.rows(blocks.start, blocks.stop)
    return place(values), (place(indices), place(used))


def _common(layout: BlockLayout, target: BlockLayout, same_rows: bool) -> BlockLayout:
    if layout.shape != target.shape or not same_rows:
        raise ValueError(
            f"A recorded tensor of (batch, head_index, query_pos, key_pos) = {layout.shape} can't be written to another place "
            f"or size, {target.shape}, with forward='exact': expected the same rows of as many texts and heads."
        )
    return layout if layout.kv_indices is target.kv_indices else layout.union(target)


def _keep_blocks(data: BlockData, place: tuple[Tensor, Tensor, range], blocks: Rows, matters: Tensor) -> None:
    """Keep those of `blocks` that hold an entry that matters, `[batch, head_index, q_block, block_q, key]`."""
    texts, heads, q_blocks = place
    indices, used = blocks
    if not indices.shape[-1]:
        return
    used = used & matters.any(-2).unflatten(-1, (-1, data.layout.block_k)).any(-1)
    text, head, row, _ = used.nonzero().unbind(-1)
    needed: list[Int[Tensor, " block"]] = [texts[text], heads[head], row + q_blocks.start, indices[used]]
    _, kept = data.layout.find(*needed)
    data.extend(data.layout.with_blocks(*(x[~kept] for x in needed)))

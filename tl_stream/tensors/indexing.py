"""Reading and writing parts of a sparse tensor by index.

Any index that torch knows is applied to the coordinates of the entries instead of to the entries: four expanded
`arange`s, which take no memory. What comes out says which entries are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.outside import Outside
from tl_stream.tensors.record import not_recorded, record
from tl_stream.tensors.row_writes import fits, write_rows
from tl_stream.tensors.slice_view import SliceView, Source
from tl_stream.tensors.view import Selection, is_integer

MAX_WINDOW = 2**24


def read(tensor: BlockSparseTensor, key: Any) -> Tensor:
    """`tensor[key]`: sparse for whole rows (ints and slices on the other axes), else a plain tensor of the entries.

    Raises:
        ValueError: The plain tensor would be larger than `MAX_WINDOW` entries and than 16 rows of every head.
    """
    selection = tensor._view.index(key)
    view = None if selection is None else selection.as_view(tensor.shape[-1])
    if view is not None:
        return tensor.alias(view)
    taken = _take(tensor, key)
    if taken is not None:
        return taken
    picked = Picked(tensor, lambda grid: grid[key])
    return SliceView.of(picked) if is_basic(key) else picked.read()


@dataclass(frozen=True, eq=False)
class Picked(Source):
    """The entries that a function of an ordinary tensor (indexing, diagonal, ...) picks out of a sparse one.

    Attributes:
        tensor: The sparse tensor.
        pick: The function.
    """

    tensor: BlockSparseTensor
    pick: Callable[[Tensor], Tensor]

    @property
    def version(self) -> int:
        return self.tensor.version

    def read(self) -> Tensor:
        """The entries as a plain tensor.

        Raises:
            ValueError: More than `MAX_WINDOW` of them and than 16 rows of every head.
        """
        tensor = self.tensor
        grids = [self.pick(grid) for grid in tensor._view.coordinates(tensor.device)]
        check_window(tensor._data.layout.shape, grids[0])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not tensor._detached):
            found = tensor._data.entries(*(grid.reshape(-1) for grid in grids)).to(tensor.dtype).view(grids[0].shape)
        return found.detach() if tensor._detached else found

    def write(self, value: Tensor, extend: bool = False) -> None:
        """Others in their place; `extend`: blocks that they need are kept from here on.

        Raises:
            ValueError: A value other than `fill` outside the kept blocks.
        """
        with _writing(self.tensor._data):
            write_picked(self.tensor, self.pick, value, extend)


def write(tensor: BlockSparseTensor, key: Any, value: Any) -> None:
    """`tensor[key] = value`, on kept entries; blocks that another sparse tensor brings along are kept from here on.

    Raises:
        ValueError: A value other than `fill` for an entry outside the kept blocks.
    """
    selection = tensor._view.index(key)
    with _writing(tensor._data):
        if isinstance(value, BlockSparseTensor):
            _write_sparse(tensor, key, value)
        elif selection is not None and is_scalar(value):
            _write_scalar(tensor._data, selection, value)
        else:
            write_picked(tensor, lambda grid: grid[key], value)


@contextmanager
def _writing(data: BlockData) -> Iterator[None]:
    """A write, which counts in `data.version` unless it touched no kept entry, and so changed nothing.

    Also under no_grad the graph goes on: one that has begun must not end at a write, or q and k would get no gradient at all.
    """
    data.check_writable()
    before = data.values, data.layout, data.outside
    with torch.set_grad_enabled(torch.is_grad_enabled() or data.in_graph):
        yield
    changed = any(a is not b for a, b in zip(before, (data.values, data.layout, data.outside), strict=True))
    data.version += int(changed)


def _write_scalar(data: BlockData, selection: Selection, value: Any) -> None:
    """One value for a product of indices: works on the blocks, so that it takes no memory beyond theirs."""
    number = value.item() if isinstance(value, Tensor) and not value.requires_grad else value
    if selection.numel == 0:
        return
    batch, head, rows, keys = selection.membership(data.layout.shape, data.layout.device)
    view = selection.as_view(data.layout.shape[-1])
    if data.hides_entries and view is not None and number == data.fill == 0:
        edits = data.edits
        data.outside = edits.with_rows(view, data.layout, Outside(edits.of, 0.0))
    elif data.hides_entries:
        record(data, batch, head, rows, keys)
    inside = _in_blocks(data, batch, head, rows, keys)
    if isinstance(number, Tensor) or not _same(number, data.fill):
        missing = selection.numel - int(inside.sum())
        if missing:
            raise _lost(data, missing, number)
    values = data.block_values()
    data.values = torch.where(inside, torch.as_tensor(number, dtype=values.dtype, device=values.device), values)


def _in_blocks(data: BlockData, batch: Tensor, head: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Which of the kept entries are members on all four axes, `[batch, head_index, q_block, block_q, key]`."""
    layout = data.layout
    _, used = layout.rows()
    key_pos = layout.key_positions()
    real = used.repeat_interleave(layout.block_k, -1) & (key_pos < layout.mask.key_length)
    columns = real & keys[key_pos.clamp(max=layout.mask.key_length - 1)]
    query_pos = layout.query_positions()
    queries = (query_pos < layout.mask.query_length) & rows[query_pos.clamp(max=layout.mask.query_length - 1)]
    inside = columns[:, :, :, None] & queries[:, :, None]
    return inside & batch[:, None, None, None, None] & head[:, None, None, None]


def write_picked(tensor: BlockSparseTensor, pick: Callable[[Tensor], Tensor], value: Any, extend: bool = False) -> None:
    """Values for the entries that `pick` takes; `extend`: blocks that they need are kept from here on."""
    data = tensor._data
    grids = [pick(grid) for grid in tensor._view.coordinates(data.layout.device)]
    check_window(tensor._data.layout.shape, grids[0])
    extend = extend or (isinstance(value, SliceView) and value.is_sparse_part)
    source = torch.as_tensor(value, device=data.layout.device)
    source = source.as_subclass(Tensor).expand(grids[0].shape).reshape(-1)
    coordinates = [grid.reshape(-1) for grid in grids]
    layout = data.layout
    blocks = (coordinates[0], coordinates[1], coordinates[2] // layout.block_q, coordinates[3] // layout.block_k)
    slot, kept = layout.find(*blocks)
    lost = ~kept & (layout.mask.allows(*coordinates[:1], *coordinates[2:]) | _differs(source, data.fill))
    if not data.hides_entries:
        lost = lost & _differs(source, data.fill)
    if bool(lost.any()):
        if data.hides_entries and not is_scalar(value):
            raise not_recorded(data, int(lost.sum()))
        if not extend and not data.hides_entries:
            raise _lost(data, int(lost.sum()), source[lost][0].item())
        data.extend(layout.with_blocks(*(x[lost] for x in blocks)))
        slot, kept = data.layout.find(*blocks)
    if not bool(kept.any()):
        return
    values = data.block_values()
    batch, head, query_pos, key_pos = (x[kept] for x in coordinates)
    at = data.locate(batch, head, query_pos, key_pos, slot[kept])
    data.values = values.index_put(at, source[kept].to(values.dtype))


def _write_sparse(tensor: BlockSparseTensor, key: Any, value: BlockSparseTensor) -> None:
    """The rows of another sparse tensor, with the blocks that it keeps."""
    selection = tensor._view.index(key)
    view = None if selection is None else selection.as_view(tensor.shape[-1])
    if view is not None and fits(tensor, view, value):
        write_rows(tensor, view, value)
    elif value._data.hides_entries:
        raise ValueError(
            "With forward='exact' a part of a recorded tensor can be written only to the same rows of one in blocks of the "
            "same size. Trace both with the same block_q and block_k."
        )
    elif value.numel() <= MAX_WINDOW:
        write_picked(tensor, lambda grid: grid[key], value.to_dense(), extend=value.fill == tensor.fill)
    else:
        raise ValueError(
            f"A sparse tensor of shape {tuple(value.shape)} in blocks of {value._data.layout.block_q} x "
            f"{value._data.layout.block_k} can't be written to {key!r} of one of shape {tuple(tensor.shape)} in blocks of "
            f"{tensor._data.layout.block_q} x {tensor._data.layout.block_k}: expected whole rows, as many, in blocks of the "
            "same size that begin at the same place. Trace both with the same block_q and block_k."
        )


def check_window(shape: tuple[int, int, int, int], grid: Tensor) -> None:
    """Raise ValueError where an index takes more entries than come back dense out of a tensor on data of that shape."""
    batch, heads, queries, keys = shape
    if grid.numel() > max(MAX_WINDOW, 16 * batch * heads * max(queries, keys)):
        raise ValueError(
            f"This index takes a dense window of {tuple(grid.shape)} = {grid.numel():,} entries out of a sparse tensor; at "
            f"most {MAX_WINDOW:,} come back dense. Index batch, head or query rows with ints and slices (those stay "
            "sparse), or take a smaller window."
        )


def _lost(data: BlockData, number: int, value: Any) -> ValueError:
    layout = data.layout
    return ValueError(
        f"{number:,} of the entries written to (first value: {value}) lie outside the kept blocks of layer "
        f"{data.origin.layer}, where every entry is {data.fill}; the write would be lost. Keep those blocks: raise "
        f"k (now at most {layout.n_slots} of {layout.n_kv_blocks} key blocks a row), force the first one with "
        "keep_sink, or put the layer into dense_layers. (A knock-out of scores is a write of -inf.)"
    )


def _take(tensor: BlockSparseTensor, key: Any) -> BlockSparseTensor | None:
    """`tensor[key]` for a list of batch elements or heads beside slices: a copy, as in torch. None for any other index."""
    items = list(key) if isinstance(key, tuple) else [key]
    lists = [i for i, item in enumerate(items) if is_list(item)]
    if len(lists) != 1:
        return None
    listed = lists[0]
    index, items[listed] = torch.as_tensor(items[listed], device=tensor.device), slice(None)
    dim = listed - len(items) + tensor.dim() if any(item is Ellipsis for item in items[:listed]) else listed
    selection = tensor._view.index(tuple(items))
    view = None if selection is None else selection.as_view(tensor.shape[-1])
    if view is None or dim >= tensor.dim() - 2:
        return None
    index = torch.arange(tensor.shape[dim], device=tensor.device)[index]
    texts, heads = view.texts(tensor.device), view.heads(tensor.device)
    is_batch = dim == 0 and isinstance(tensor._view.batch, range)
    data = tensor._data.select(texts[index], heads) if is_batch else tensor._data.select(texts, heads[index])
    return tensor.alias(view).with_data(data, tensor._detached)


def is_list(item: Any) -> bool:
    """Whether an index item is a list of indices, or a mask, along one dimension."""
    return isinstance(item, list) or getattr(item, "ndim", 0) == 1


def is_basic(key: Any) -> bool:
    """Whether torch gives a view for this index: ints, slices, None and Ellipsis only."""
    items = key if isinstance(key, tuple) else (key,)
    return all(x is None or x is Ellipsis or isinstance(x, slice) or is_integer(x) for x in items)


def is_scalar(value: Any) -> bool:
    """Whether a value is one number."""
    return not isinstance(value, Tensor) or value.dim() == 0


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


def _differs(values: Tensor, fill: float | bool) -> Tensor:
    if fill != fill:
        return ~values.isnan()
    return values != fill

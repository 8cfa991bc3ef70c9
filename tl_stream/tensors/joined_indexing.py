"""Reading and writing parts of a `JoinedTensor` by index: whole rows go to the parts, single entries by their coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import positions
from tl_stream.tensors.arranged import index
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.indexing import is_basic, is_list, is_scalar
from tl_stream.tensors.joined import JoinedTensor, join
from tl_stream.tensors.joined_entries import JoinedEntries
from tl_stream.tensors.slice_view import SliceView
from tl_stream.tensors.view import is_integer
from tl_stream.tensors.wrapper import SparseTensor


def read(tensor: Any, key: Any) -> Any:
    """`tensor[key]`, one of them joined: joined for whole rows, else as `indexing.read`."""
    if isinstance(key, JoinedTensor) and key.dtype == torch.bool:
        return tensor[nonzero(key, as_tuple=True)]
    if not isinstance(tensor, JoinedTensor):
        return NotImplemented
    items = _cut(key, tensor.dim())
    touched = None if items is None else _overlap(tensor, items[-2])
    if items is None or touched is None:
        new_axes = isinstance(key, tuple) and any(item is None for item in key)
        found = index(tensor, key) if key is None or new_axes else NotImplemented
        return _entries(tensor, key) if found is NotImplemented else found
    *lead, row, last = items
    if is_integer(row):
        ((part, _, own),) = touched
        return part[(*lead, own, last)]
    whole = isinstance(last, slice) and range(tensor.shape[-1])[last] == range(tensor.shape[-1])
    if not whole or sum(is_list(item) for item in lead) > 1:
        return _entries(tensor, key)
    return join([part[(*lead, own, slice(None))] for part, _, own in touched])


def _entries(tensor: JoinedTensor, key: Any) -> Tensor:
    entries = JoinedEntries(tensor, lambda grid: grid[key])
    return SliceView.of(entries) if is_basic(key) else entries.read()


def write(tensor: Any, key: Any, value: Any) -> None:
    """`tensor[key] = value`, at least one of the three joined; as `indexing.write`."""
    if isinstance(key, SparseTensor):
        tensor[...] = torch.where(key, value, tensor)
    elif isinstance(tensor, BlockSparseTensor):
        target = tensor[key]
        for part, rows in value.shown:
            target[..., rows.start : rows.stop, :] = part
    elif not isinstance(tensor, JoinedTensor):
        tensor[key] = value.to_dense()
    else:
        _write(tensor, key, value)


def _write(tensor: JoinedTensor, key: Any, value: Any) -> None:
    items = _cut(key, tensor.dim())
    touched = None if items is None else _overlap(tensor, items[-2])
    single_row = items is not None and is_integer(items[-2])
    if items is None or touched is None or not (single_row or is_scalar(value) or not any(map(is_list, items))):
        dense = value.to_dense() if isinstance(value, SparseTensor) else value
        JoinedEntries(tensor, lambda grid: grid[key]).write(dense)
        return
    *lead, _, last = items
    n_rows = sum(len(rows) for _, rows, _ in touched)
    for part, rows, own in touched:
        if single_row:
            part[(*lead, own, last)] = value
        elif rows:
            part[(*lead, own, last)] = rows_of(value, rows, n_rows, -2 if isinstance(last, slice) else -1)


def nonzero(tensor: Any, *, as_tuple: bool = False) -> Any:
    """Indices of the entries that are not 0, in order: `[entry, dim]`, or one tensor a dimension."""
    parts = []
    for part, rows in tensor.shown:
        parts.append(positions.nonzero(part))
        if parts[-1] is NotImplemented:
            return NotImplemented
        parts[-1][:, -2] += rows.start
    found = torch.cat(parts)
    place = found.new_zeros(len(found))
    for column, size in zip(found.unbind(-1), tensor.shape, strict=True):
        place = place * size + column
    found = found[place.argsort()]
    return found.unbind(-1) if as_tuple else found


def rows_of(x: Any, rows: range, n_rows: int, dim: int = -2) -> Any:
    """Some rows of an operand whose dimension `dim` (from the end) is that of the `n_rows` rows; others broadcast."""
    if not isinstance(x, Tensor) or x.dim() < -dim or x.shape[dim] != n_rows:
        return x
    if isinstance(x, JoinedTensor):
        part = next((part for part, own in x.shown if own == rows), None)
        return x[..., rows.start : rows.stop, :] if part is None else part
    return x.narrow(dim, rows.start, len(rows))


def _cut(key: Any, n_dims: int) -> list[Any] | None:
    """One item of an index for each dimension; None where an item stands for several, or for a new one."""
    items = list(key) if isinstance(key, tuple) else [key]
    if any(item is None or not (is_basic(item) or is_list(item)) for item in items):
        return None
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    given = len(items) - (at < len(items))
    if given > n_dims:
        raise IndexError(f"too many indices for a tensor of {n_dims} dimensions: {key!r}")
    return items[:at] + [slice(None)] * (n_dims - given) + items[at + 1 :]


def _overlap(tensor: JoinedTensor, item: Any) -> list[tuple[BlockSparseTensor, range, Any]] | None:
    """The parts that an index item of the rows touches: which rows of the result those are, and the part's own item.

    For a slice, all parts (of some, perhaps, no rows). None for a list and for a slice that skips rows.
    """
    n = tensor.shape[-2]
    if is_integer(item):
        if not -n <= int(item) < n:
            raise IndexError(f"index {item} is out of range for a dimension of size {n}")
        row = int(item) % n
        part, rows = next(each for each in tensor.placed if row in each[1])
        return [(part, range(1), row - rows.start)]
    if not isinstance(item, slice) or range(n)[item].step != 1:
        return None
    chosen, found = range(n)[item], []
    for part, rows in tensor.placed:
        start, stop = (min(max(end, rows.start), rows.stop) for end in (chosen.start, max(chosen.start, chosen.stop)))
        result = range(start - chosen.start, stop - chosen.start)
        found.append((part, result, slice(start - rows.start, stop - rows.start)))
    return found

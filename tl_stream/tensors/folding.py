"""Sums, variances and extremes over batch elements or heads: sparse again, on the blocks that any of them keeps.

Carried out on one batch element or head after the other, so that memory is that of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.relayout import relayout
from tl_stream.tensors.view import View

Parts = Callable[[], Iterator[Tensor]]


def folds(tensor: Any, dims: list[int]) -> bool:
    """Whether `dims` are batch or heads (or both), and nothing else."""
    return bool(dims) and max(dims) < tensor.dim() - 2


def total(tensor: BlockSparseTensor, dims: list[int], keepdim: bool = False) -> BlockSparseTensor:
    """Sum over batch or heads."""
    return _fold(tensor, dims, keepdim, lambda parts: reduce(torch.add, parts()))


def variance(tensor: BlockSparseTensor, dims: list[int], keepdim: bool, correction: float) -> BlockSparseTensor:
    """Variance over batch or heads, of `n - correction` degrees of freedom."""

    def combine(parts: Parts) -> Tensor:
        n = sum(1 for _ in parts())
        mean = reduce(torch.add, parts()) / n
        squares = reduce(torch.add, ((part - mean) ** 2 for part in parts()))
        return squares / (n - correction) if n > correction else squares / 0

    return _fold(tensor, dims, keepdim, combine)


def extreme(tensor: BlockSparseTensor, dims: list[int], keepdim: bool, largest: bool) -> BlockSparseTensor:
    """Maximum or minimum over batch or heads."""
    return _fold(tensor, dims, keepdim, lambda parts: reduce(torch.maximum if largest else torch.minimum, parts()))


def position_of_extreme(tensor: BlockSparseTensor, dim: int, keepdim: bool, largest: bool) -> BlockSparseTensor:
    """Which batch element or head holds the maximum or minimum; the first of equal ones."""

    def combine(parts: Parts) -> Tensor:
        best = next(parts())
        position = torch.zeros_like(best, dtype=torch.long)
        for i, part in enumerate(parts()):
            better = part > best if largest else part < best
            position, best = position.masked_fill(better, i), torch.where(better, part, best)
        return position

    return _fold(tensor, [dim], keepdim, combine)


def _fold(tensor: BlockSparseTensor, dims: list[int], keepdim: bool, combine: Callable[[Parts], Tensor]) -> BlockSparseTensor:
    """`combine` entry by entry over the parts of which each shows one of the batch elements or heads folded."""
    view = tensor._view
    shown = [axis for axis, choice in enumerate((view.batch, view.head)) if isinstance(choice, range)]
    folded = {shown[dim] for dim in dims}
    members = [tensor.alias(member) for member in _members(view, folded)]
    layout = _common(members)
    data = BlockData(layout, 0.0, tensor._data.origin)
    data.check_size()

    def values() -> Iterator[Tensor]:
        return (relayout(part.shown_values(), part.block_layout, layout, tensor.fill) for part in members)

    def outside() -> Iterator[Tensor]:
        return (torch.full((1,), tensor.fill, dtype=tensor.dtype) for _ in members)

    data.values, data.fill = combine(values), float(combine(outside))
    batch, head = (0 if axis in folded and not keepdim else choice for axis, choice in enumerate((view.batch, view.head)))
    return tensor.alias(replace(view, batch=batch, head=head)).with_data(data)


def _members(view: View, folded: set[int]) -> list[View]:
    """Views that each show one element of the folded axes."""
    choices = [
        [range(i, i + 1) for i in choice] if axis in folded and isinstance(choice, range) else [choice]
        for axis, choice in enumerate((view.batch, view.head))
    ]
    return [replace(view, batch=batch, head=head) for batch, head in product(*choices)]


def _common(members: list[BlockSparseTensor]) -> BlockLayout:
    """What any of the parts keeps, under a mask that hides a key only where all of them do."""
    layouts = [part.block_layout for part in members]
    layout = reduce(BlockLayout.union, layouts)
    valid = [each.mask.key_valid for each in layouts if each.mask.key_valid is not None]
    return replace(layout, mask=replace(layout.mask, key_valid=torch.stack(valid).any(0))) if valid else layout

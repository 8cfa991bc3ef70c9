"""`StackedTensor`: sparse tensors of equal shape along a new first dimension, as `torch.stack` of several layers' patterns.

It holds the tensors. A function is carried out on each of them, and what comes out stacked again: sparse where those are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tl_stream.layout import MAX_DENSE_ENTRIES
from tl_stream.tensors import elementwise, everywhere, of_parts, slicing
from tl_stream.tensors.arranged import REARRANGING, rearrange
from tl_stream.tensors.densify import flatten, make_dense
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.names import CONVERSIONS, is_in_place, normalised, reduction
from tl_stream.tensors.of_parts import TensorOfParts
from tl_stream.tensors.slice_view import SliceView, Source
from tl_stream.tensors.view import is_integer
from tl_stream.tensors.wrapper import TO_LOOK_AT, SparseTensor


class StackedTensor(TensorOfParts):
    """See the module."""

    rank = 3

    @staticmethod
    def __new__(cls, parts: tuple[SparseTensor, ...]) -> StackedTensor:
        """Stack tensors of the same shape and dtype; writes go to them."""
        self = cls.empty((len(parts), *parts[0].shape), parts[0].dtype, parts[0].device)
        self.parts = parts
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = normalised(args, kwargs)
        leader = next(x for x in flatten((args, kwargs)) if isinstance(x, StackedTensor))
        result = NotImplemented
        if name in REARRANGING:
            result = rearrange(leader, lambda x: func(x, *args[1:], **kwargs))
        elif name in _HANDLERS:
            result = _HANDLERS[name](*args, **kwargs)
        elif name in elementwise.NAMES or name in CONVERSIONS or is_in_place(name, kwargs):
            result = _entrywise(leader, name, func, args, kwargs)
        elif (reduced := reduction(name, args, kwargs)) is not None and args[0] is leader:
            result = _reduce(leader, name, func, *reduced)
        return make_dense(name, func, args, kwargs) if result is NotImplemented else result

    def to_dense(self) -> Tensor:  # type: ignore[override]
        if self.numel() > MAX_DENSE_ENTRIES:
            raise ValueError(
                f"to_dense() would make {tuple(self.shape)} = {self.numel():,} entries; at most {MAX_DENSE_ENTRIES:,} are "
                f"made. Take one layer, fewer heads or a range of queries. {TO_LOOK_AT}"
            )
        return torch.stack([part.to_dense() for part in self.parts])

    def product(self, x: Tensor, transposed: bool) -> Any:
        each = x.dim() == self.dim()
        results = [part.product(x[i if len(x) > 1 else 0] if each else x, transposed) for i, part in enumerate(self.parts)]
        return NotImplemented if any(x is NotImplemented for x in results) else torch.stack(results)

    def grouped(self, rows: Groups, keys: Groups, how: How) -> Any:
        results = [part.grouped(rows, keys, how) for part in self.parts]
        return NotImplemented if any(x is NotImplemented for x in results) else torch.stack(results)


def stack(tensors: Any, dim: int = 0) -> Any:
    """`torch.stack`, of sparse tensors only: a copy, as there."""
    if not all(isinstance(x, SparseTensor) and x.shape == tensors[0].shape for x in tensors):
        return NotImplemented
    return _stacked([x.clone() for x in tensors]).movedim(0, dim)


def cat(tensors: Any, dim: int = 0) -> Any:
    """`torch.cat` along a dimension before query and key, of sparse tensors only."""
    if not all(isinstance(x, SparseTensor) for x in tensors) or dim % tensors[0].dim() >= tensors[0].dim() - 2:
        return NotImplemented
    return stack([part for x in tensors for part in x.unbind(dim)], dim)


@dataclass(frozen=True, eq=False)
class _Pieces(Source):
    """What was taken out of each part, where that is plain; changes go back to the parts."""

    pieces: list[Tensor]
    stack: StackedTensor

    @property
    def version(self) -> int:
        return self.stack.version

    def read(self) -> Tensor:
        return torch.stack([piece.clone() for piece in self.pieces])

    def write(self, value: Tensor) -> None:
        for piece, new in zip(self.pieces, value, strict=True):
            if isinstance(piece, SliceView):
                piece.copy_(new)


def _stacked(results: list[Any]) -> Any:
    """Results of the parts, stacked: sparse or plain, or such tuples as `max` gives."""
    if isinstance(results[0], tuple):
        return type(results[0])([_stacked(list(column)) for column in zip(*results, strict=True)])
    if isinstance(results[0], SparseTensor):
        return StackedTensor(tuple(results))
    return torch.stack(results)


def _split(tensor: StackedTensor, key: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The index of the stacked dimension and that of each part; None where what torch gives isn't a stack of the parts'."""
    items = list(key) if isinstance(key, tuple) else [key]
    if items and items[0] is Ellipsis:
        given = sum(item is not None for item in items) - 1
        items = items[1:] if given == tensor.dim() else [slice(None), *items]
    first: Any = items[0] if items else slice(None)
    rest = tuple(items[1:])
    lists = [i for i, item in enumerate(rest) if not isinstance(item, slice) and item is not None and item is not Ellipsis]
    if not all(is_integer(rest[i]) for i in lists):
        listed = first is not None and not isinstance(first, slice) and not is_integer(first)
        if listed or lists[-1] - lists[0] >= len(lists):  # torch pairs the lists, or puts what they take first
            return None
    return (int(first) if is_integer(first) else first), rest


def _getitem(tensor: Any, key: Any) -> Any:
    split = _split(tensor, key) if isinstance(tensor, StackedTensor) else None
    if split is None:
        return NotImplemented
    first, rest = split
    if first is None:
        return tensor[rest].unsqueeze(0)
    if isinstance(first, int):
        return tensor.parts[first][rest]
    chosen = tensor.parts[first] if isinstance(first, slice) else [tensor.parts[i].clone() for i in _listed(first)]
    if not chosen:
        return NotImplemented
    results = [part[rest] for part in chosen]
    return _stacked(results) if isinstance(results[0], SparseTensor) else SliceView.of(_Pieces(results, tensor))


def _listed(index: Any) -> list[int]:
    """A list of layers, as ints."""
    return torch.as_tensor(index).tolist()


def _setitem(tensor: Any, key: Any, value: Any) -> Any:
    if not isinstance(tensor, StackedTensor):
        tensor[key] = value.to_dense()
        return None
    split = _split(tensor, key)
    if split is None or not isinstance(split[0], int | slice):
        return NotImplemented
    first, rest = split
    if isinstance(first, int):
        tensor.parts[first][rest] = value
        return None
    parts = tensor.parts[first]
    each = parts[0][rest].dim() if parts else 0
    spread = isinstance(value, Tensor) and value.dim() > each
    for i, part in enumerate(parts):
        part[rest] = value[i if len(value) > 1 else 0] if spread else value
    return None


def _entrywise(leader: StackedTensor, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Entry by entry, in place or not, on each part; other tensors broadcast."""
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
    if any(isinstance(x, SparseTensor) and x.shape not in (leader.shape, leader.shape[1:]) for x in operands):
        return NotImplemented if is_in_place(name, kwargs) else elementwise.broadcast(func, args, kwargs)
    if any(torch.broadcast_shapes(x.shape, leader.shape) != leader.shape for x in operands):
        return NotImplemented

    def part_of(x: Any, i: int) -> Any:
        if isinstance(x, StackedTensor) and x.shape == leader.shape:
            return x.parts[i]
        if isinstance(x, Tensor) and x.dim() == leader.dim():
            return x[i if len(x) > 1 else 0]
        return x

    results = [
        func(*(part_of(x, i) for x in args), **{key: part_of(x, i) for key, x in kwargs.items()})
        for i in range(len(leader.parts))
    ]
    return args[0] if is_in_place(name, kwargs) else _stacked(results)


def _reduce(tensor: StackedTensor, name: str, func: Any, dim: Any, keepdim: bool, options: dict[str, Any]) -> Any:
    if dim is None and name in ("max", "min"):
        return func(torch.stack([func(part) for part in tensor.parts]))
    dims = slicing.dimensions(tensor, dim)
    inner = [d - 1 for d in dims if d]
    if 0 not in dims:
        own = inner[0] if isinstance(dim, int) else inner
        return _stacked([func(part, dim=own, keepdim=keepdim, **options) for part in tensor.parts])
    if not inner:
        result = _over_parts(tensor, name, **options)
        return result.unsqueeze(0) if keepdim and result is not NotImplemented else result
    if name not in ("sum", "mean", "amax", "amin", "any", "all"):
        return NotImplemented
    result = _stacked([func(part, dim=inner, keepdim=True, **options) for part in tensor.parts])
    result = func(result, dim=0, keepdim=True)
    return result if keepdim else result.squeeze(tuple(dims))


def _over_parts(tensor: StackedTensor, name: str, unbiased: bool = True, correction: Any = None) -> Any:
    """Over the stacked dimension itself: sparse again."""
    parts: tuple[Tensor, ...] = tensor.parts
    n = len(parts)
    match name:
        case "sum":
            return reduce(torch.add, parts)
        case "mean":
            return reduce(torch.add, parts) / n
        case "amax":
            return reduce(torch.maximum, parts)
        case "amin":
            return reduce(torch.minimum, parts)
        case "var":
            mean = reduce(torch.add, parts) / n
            squares = reduce(torch.add, [(part - mean) ** 2 for part in parts])
            return squares / (n - (unbiased if correction is None else correction))
        case "std":
            return _over_parts(tensor, "var", unbiased, correction).sqrt()
    return NotImplemented


def _topk(tensor: Any, k: int, dim: int = -1, **kwargs: Any) -> Any:
    (position,) = slicing.dimensions(tensor, dim)
    return _stacked([part.topk(k, position - 1, **kwargs) for part in tensor.parts]) if position else NotImplemented


def _diagonal(tensor: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    first, second = (d % tensor.dim() for d in (dim1, dim2))
    if not first or not second:
        return NotImplemented
    return SliceView.of(_Pieces([part.diagonal(offset, first - 1, second - 1) for part in tensor.parts], tensor))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "diagonal": _diagonal,
    "topk": _topk,
    "stack": stack,
    "cat": cat,
    **of_parts.HANDLERS,
    **everywhere.HANDLERS,
}

"""What torch's functions do on a `JoinedTensor`: they are carried out on each part's rows, and what comes out is joined."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import (
    attention_ops,
    backward_hooks,
    elementwise,
    everywhere,
    gradients,
    of_parts,
    positions,
    reductions,
    sink,
    slicing,
)
from tl_stream.tensors.arranged import REARRANGING, rearrange
from tl_stream.tensors.densify import flatten, make_dense
from tl_stream.tensors.joined import JoinedTensor, join
from tl_stream.tensors.joined_entries import JoinedEntries
from tl_stream.tensors.joined_indexing import nonzero, read, rows_of, write
from tl_stream.tensors.names import CONVERSIONS, is_in_place, normalised, reduction
from tl_stream.tensors.slice_view import picking
from tl_stream.tensors.stacked import stack

_BY_ROW = {"softmax", "dropout"}
_OVER_PARTS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": operator.add, "nansum": operator.add, "any": torch.logical_or, "all": torch.logical_and,
    **dict.fromkeys(("max", "amax"), torch.maximum), **dict.fromkeys(("min", "amin"), torch.minimum),
}  # fmt: skip


def run(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out `func`, which is called `name` and was called with at least one joined tensor."""
    args, kwargs = normalised(args, kwargs)
    leader = next(x for x in flatten((args, kwargs)) if isinstance(x, JoinedTensor))
    reduced = reduction(name, args, kwargs)
    result = NotImplemented
    if name in REARRANGING:
        result = rearrange(leader, lambda x: func(x, *args[1:], **kwargs))
    elif name in _HANDLERS:
        result = _HANDLERS[name](*args, **kwargs)
    elif name in CONVERSIONS:
        return JoinedTensor(tuple(func(part, *args[1:], **kwargs) for part in leader.parts))
    elif reduced is not None and args[0] is leader:
        result = _reduce(leader, name, func, *reduced)
    if result is NotImplemented and (name in _ENTRYWISE or is_in_place(name, kwargs)) and name not in ("setitem", "getitem"):
        result = _entrywise(leader, name, func, args, kwargs)
    return make_dense(name, func, args, kwargs) if result is NotImplemented else result


_ENTRYWISE = elementwise.NAMES | _BY_ROW | {"max", "min"}


def _entrywise(leader: JoinedTensor, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Entry by entry or row by row, in place or not."""
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    in_place = is_in_place(name, kwargs)
    if any(torch.broadcast_shapes(x.shape, leader.shape) != leader.shape for x in operands):
        return NotImplemented
    if in_place and not isinstance(args[0], JoinedTensor):
        return NotImplemented
    n = leader.shape[-2]
    results = [
        func(*(rows_of(x, rows, n) for x in args), **{key: rows_of(x, rows, n) for key, x in kwargs.items()})
        for _, rows in leader.shown
    ]
    return args[0] if in_place else join(results)


def _reduce(tensor: JoinedTensor, name: str, func: Any, dim: Any, keepdim: bool, options: dict[str, Any]) -> Any:
    dims, n = slicing.dimensions(tensor, dim), tensor.dim()
    own = dims[0] if isinstance(dim, int) else dims
    if n - 2 not in dims:
        at = -1 if n - 1 in dims and not keepdim else -2
        return join([func(part, dim=own, keepdim=keepdim, **options) for part, _ in tensor.shown], at)
    if name == "mean":
        return tensor.sum(own, keepdim, **options) / prod(tensor.shape[d] for d in dims)
    if name in ("var", "std"):
        return reductions.HANDLERS[name](tensor, dim, keepdim=keepdim, **options)
    if dim is None:
        if name in ("argmax", "argmin"):
            return _argument(tensor, name, keepdim)
        parts = [func(part, **options) for part, _ in tensor.shown]
    elif name in ("max", "min", "argmax", "argmin"):
        return _in_columns(tensor, name, keepdim)
    else:
        parts = [func(part, dim=own, keepdim=keepdim, **options) for part, _ in tensor.shown]
    return reduce(_OVER_PARTS[name], parts) if name in _OVER_PARTS else NotImplemented


def _in_columns(tensor: JoinedTensor, name: str, keepdim: bool) -> Any:
    """The extreme of each column and its row, or the latter alone: the first of equal ones."""
    largest = name.endswith("max")

    def better(first: Any, second: Any) -> Any:
        is_second = second.values > first.values if largest else second.values < first.values
        return make(
            (torch.where(is_second, second.values, first.values), torch.where(is_second, second.indices, first.indices))
        )

    make = torch.return_types.max if largest else torch.return_types.min
    found = []
    for part, rows in tensor.shown:
        values, indices = part.max(-2, keepdim) if largest else part.min(-2, keepdim)
        found.append(make((values, indices + rows.start)))
    best = reduce(better, found)
    return best.indices if name.startswith("arg") else best


def _argument(tensor: JoinedTensor, name: str, keepdim: bool) -> Any:
    """Position of the extreme in the flattened tensor."""
    found = []
    for part, rows in tensor.shown:
        place = torch.unravel_index(getattr(part, name)(), part.shape)
        found.append((part[place], place[-2] + rows.start, place))
    best = (max if name == "argmax" else min)(found, key=lambda each: each[0].item())
    place = (*best[2][:-2], best[1], best[2][-1])
    strides = [prod(tensor.shape[d + 1 :]) for d in range(tensor.dim())]
    return sum(i * stride for i, stride in zip(place, strides, strict=True)) if not keepdim else NotImplemented


def _where(condition: Any, *choices: Any) -> Any:
    return NotImplemented if choices else nonzero(condition, as_tuple=True)


def _triangle(name: str) -> Callable[..., Any]:
    """tril or triu: the diagonal as each part's rows count it."""

    def handler(tensor: Any, diagonal: int = 0) -> Any:
        return join([getattr(part, name)(diagonal + rows.start) for part, rows in tensor.shown])

    return handler


def _triangle_in_place(name: str) -> Callable[..., Any]:
    def handler(tensor: Any, diagonal: int = 0) -> Any:
        tensor[...] = getattr(tensor, name)(diagonal)
        return tensor

    return handler


def _topk(tensor: Any, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    if slicing.dimensions(tensor, dim) != [tensor.dim() - 1]:
        return NotImplemented
    return join([part.topk(k, -1, *args, **kwargs) for part, _ in tensor.shown])


def _along_keys(name: str, place: int) -> Callable[..., Any]:
    """A quantile, median or product of each row; `place` of `dim` among the arguments."""

    def handler(tensor: Any, *args: Any, **options: Any) -> Any:
        dim = options.get("dim", args[place] if len(args) > place else None)
        keepdim = options.get("keepdim", args[place + 1] if len(args) > place + 1 else False)
        if dim is None or slicing.dimensions(tensor, dim) != [tensor.dim() - 1]:
            return NotImplemented
        return join([getattr(part, name)(*args, **options) for part, _ in tensor.shown], -2 if keepdim else -1)

    return handler


def _histc(tensor: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    low, high = (float(tensor.min()), float(tensor.max())) if min == max else (min, max)
    return sum(part.histc(bins, low, high) for part, _ in tensor.shown)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "getitem": read,
    "setitem": write,
    "diagonal": picking(JoinedEntries, "diagonal", True),
    "gather": picking(JoinedEntries, "gather", False),
    "take_along_dim": picking(JoinedEntries, "take_along_dim", False),
    "where": _where,
    "masked_fill": attention_ops.HANDLERS["masked_fill"],
    "nonzero": nonzero,
    "argwhere": nonzero,
    "topk": _topk,
    "quantile": _along_keys("quantile", 1),
    "median": _along_keys("median", 0),
    "prod": _along_keys("prod", 0),
    "histc": _histc,
    **{name: _triangle(name) for name in ("tril", "triu")},
    **{f"{name}_": _triangle_in_place(name) for name in ("tril", "triu")},
    "fill_diagonal_": positions.HANDLERS["fill_diagonal_"],
    "stack": stack,
    "cat": sink.cat,
    **of_parts.HANDLERS,
    **everywhere.HANDLERS,
    **gradients.HANDLERS,
    **backward_hooks.HANDLERS,
}

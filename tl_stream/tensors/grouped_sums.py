"""Sums by sentence and the like, into an ordinary tensor: `index_add`, `scatter_add`, `index_put` and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.slicing import dimensions
from tl_stream.tensors.wrapper import SparseTensor

_HOW: dict[str, How] = {"sum": "sum", "mean": "sum", "amax": "amax", "amin": "amin"}


def _index_add(target: Any, dim: int, index: Tensor, source: Any, *, alpha: Any = 1) -> Any:
    return _into(target, dim, index, source, "sum", alpha=alpha)


def _index_reduce(target: Any, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    return _into(target, dim, index, source, reduce, include_self)


def _scatter_add(target: Any, dim: int, index: Tensor, src: Any) -> Any:
    return _scatter_reduce(target, dim, index, src, "sum")


def _scatter_reduce(target: Any, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True) -> Any:
    if isinstance(index, SparseTensor) or not isinstance(src, SparseTensor) or index.shape != src.shape:
        return NotImplemented
    (place,) = dimensions(src, dim)
    varies = [d for d in range(index.dim()) if index.stride(d) and index.shape[d] > 1]
    if varies not in ([place], []):  # each row or key has its own groups: as many indices as entries
        return NotImplemented
    vector = index[tuple(slice(None) if d == place else 0 for d in range(index.dim()))]
    return _into(target, dim, vector, src, reduce, include_self)


def _into(
    target: Any,
    dim: int,
    index: Int[Tensor, " pos"],
    source: Any,
    reduce: str,
    include_self: bool = True,
    alpha: Any = 1,
) -> Any:
    """`target` with the rows (or keys) of `source` that share an index put together in it."""
    if isinstance(target, SparseTensor) or not isinstance(source, SparseTensor) or reduce not in _HOW:
        return NotImplemented
    (place,) = dimensions(source, dim)
    if place < source.dim() - 2:
        return NotImplemented
    axes = [Groups.single(n, source.device) for n in source.shape[-2:]]
    groups = _groups(index, source.shape[place], target.shape[dim])
    axes[place - source.dim()] = groups
    expected = [groups.n if d == place else n for d, n in enumerate(source.shape)]
    if list(target.shape) != expected or target.dtype != source.dtype:
        raise ValueError(
            f"The tensor that is added to was of shape {tuple(target.shape)} and {target.dtype}; expected {tuple(expected)} "
            f"and {source.dtype}, as the sparse tensor that is added has."
        )
    found = source.grouped(axes[0], axes[1], _HOW[reduce])
    if found is NotImplemented:
        return found
    sizes = [1] * target.dim()
    sizes[place] = groups.n
    return _combine(target, found * alpha, groups.counts.view(sizes), reduce, include_self)


def _combine(target: Tensor, found: Tensor, counts: Tensor, reduce: str, include_self: bool) -> Tensor:
    """What each group gave, and what was there, put together; groups of no positions stay."""
    if not include_self:
        return torch.where(counts > 0, found / counts if reduce == "mean" else found, target)
    if reduce in ("amax", "amin"):
        return (torch.maximum if reduce == "amax" else torch.minimum)(target, found)
    return (target + found) / (counts + 1) if reduce == "mean" else target + found


def _index_put(target: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """`target[rows[:, None], keys] += values` of one head, summed."""
    plain = not isinstance(target, SparseTensor) and isinstance(values, SparseTensor)
    if not plain or not accumulate or target.dim() != 2 or values.dim() != 2 or len(indices) != 2:
        return NotImplemented
    rows, keys = indices
    n_rows, n_keys = values.shape
    if rows.shape != (n_rows, 1) or keys.shape not in ((n_keys,), (1, n_keys)):
        return NotImplemented
    groups = _groups(rows[:, 0], n_rows, target.shape[0]), _groups(keys.reshape(-1), n_keys, target.shape[1])
    found = values.grouped(*groups, "sum")
    return found if found is NotImplemented else target + found


def _groups(index: Int[Tensor, " pos"], n_positions: int, n: int) -> Groups:
    """An index as groups. Raises IndexError where it isn't one index from 0 to n - 1 for each position."""
    index = index.long()
    if index.shape != (n_positions,) or (n_positions and not 0 <= int(index.min()) <= int(index.max()) < n):
        raise IndexError(
            f"index was of shape {tuple(index.shape)}, from {index.min()} to {index.max()}; expected [{n_positions}], one of "
            f"the {n} places, 0 to {n - 1}, for each position."
        )
    return Groups(index, n)


def _in_place(handler: Callable[..., Any]) -> Callable[..., Any]:
    def write(target: Any, *args: Any, **kwargs: Any) -> Any:
        result = handler(target, *args, **kwargs)
        return result if result is NotImplemented else target.copy_(result)

    return write


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "index_add": _index_add,
    "index_reduce": _index_reduce,
    "scatter_add": _scatter_add,
    "scatter_reduce": _scatter_reduce,
    "index_put": _index_put,
}
HANDLERS: dict[str, Callable[..., Any]] = {
    **_OPERATIONS,
    **{f"{name}_": _in_place(handler) for name, handler in _OPERATIONS.items()},
}

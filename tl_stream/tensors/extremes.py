"""Maxima, minima, their positions, and the k greatest entries, on the kept values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_stream.masking import NEVER
from tl_stream.tensors import folding
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.columns import first_rows_of
from tl_stream.tensors.reductions import row_keys
from tl_stream.tensors.slicing import dimensions


def _candidates(tensor: BlockSparseTensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Values and keys among which the k greatest (or least) of each row are: the kept ones, and k that are not kept."""
    keys, real = row_keys(tensor)
    worst = -torch.inf if largest else torch.inf
    kept = tensor.row_values().masked_fill(~real, worst)
    between = gaps(keys, real, k)
    outside = torch.full(between.shape, tensor.fill, dtype=kept.dtype, device=kept.device)
    values = torch.cat([kept, outside.masked_fill(between >= tensor.shape[-1], worst)], -1)
    return values, torch.cat([keys.masked_fill(~real, NEVER), between], -1)


def gaps(keys: Int[Tensor, "*row key"], real: Bool[Tensor, "*row key"], k: int) -> Int[Tensor, "*row k"]:
    """The first k keys of each row that are not kept, counted on past the last key. Kept keys come in ascending order."""
    nth = torch.arange(k, device=keys.device).expand(*keys.shape[:-1], k).contiguous()
    if not keys.shape[-1]:
        return nth
    before = keys.masked_fill(~real, NEVER) - torch.arange(keys.shape[-1], device=keys.device)
    return nth + torch.searchsorted(before, nth, right=True)


def _topk(tensor: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if dimensions(tensor, dim) != [tensor.dim() - 1] or not tensor.dtype.is_floating_point:
        return NotImplemented
    values, keys = _candidates(tensor, k, largest)
    best = values.topk(k, largest=largest, sorted=sorted)
    return torch.return_types.topk((best.values, keys.gather(-1, best.indices)))


def _along_keys(tensor: Any, largest: bool) -> tuple[Tensor, Tensor]:
    """The greatest (or least) entry of each row and its key; the first of equal ones, as torch has it."""
    values, keys = _candidates(tensor, 1, largest)
    best = values.amax(-1) if largest else values.amin(-1)
    is_best = (values == best[..., None]) | values.isnan()
    return best, keys.masked_fill(~is_best, NEVER).amin(-1)


def _along_queries(tensor: Any, largest: bool) -> Tensor:
    """Maximum or minimum of each column."""
    keys, real = row_keys(tensor)
    worst = -torch.inf if largest else torch.inf
    values = tensor.row_values().masked_fill(~real, worst).flatten(-2)
    index = keys.masked_fill(~real, 0).flatten(-2)
    start = values.new_full((*values.shape[:-1], tensor.shape[-1]), worst)
    found = start.scatter_reduce(-1, index, values, "amax" if largest else "amin")
    kept = torch.zeros_like(found).scatter_add(-1, index, real.flatten(-2).to(values.dtype))
    fill = torch.full((), tensor.fill, dtype=values.dtype, device=values.device)
    with_fill = torch.maximum(found, fill) if largest else torch.minimum(found, fill)
    return torch.where(kept < tensor.shape[-2], with_fill, found)


def _values(largest: bool) -> Callable[..., Any]:
    """amax or amin."""

    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        dims, n = dimensions(tensor, dim), tensor.dim()
        if not tensor.dtype.is_floating_point:
            return NotImplemented
        if folding.folds(tensor, dims):
            return folding.extreme(tensor, dims, keepdim, largest)
        done = n - 1 if n - 1 in dims else n - 2
        found = _along_keys(tensor, largest)[0] if done == n - 1 else _along_queries(tensor, largest)
        found = found.unsqueeze(done)
        rest = [d for d in dims if d != done]
        if rest:
            found = found.amax(rest, keepdim=True) if largest else found.amin(rest, keepdim=True)
        return found if keepdim else found.squeeze(tuple(dims))

    return handler


def _position(largest: bool) -> Callable[..., Any]:
    """argmax or argmin; over everything, the position in the flattened tensor."""

    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if not tensor.dtype.is_floating_point:
            return NotImplemented
        if dim is None:
            values, keys = _along_keys(tensor, largest)
            row = values.argmax() if largest else values.argmin()
            return row * tensor.shape[-1] + keys.flatten()[row]
        if folding.folds(tensor, dimensions(tensor, dim)):
            return folding.position_of_extreme(tensor, dimensions(tensor, dim)[0], keepdim, largest)
        (d,) = dimensions(tensor, dim)
        if d == tensor.dim() - 1:
            found = _along_keys(tensor, largest)[1]
        else:
            found = first_rows_of(tensor, _along_queries(tensor, largest))
        return found.unsqueeze(d) if keepdim else found

    return handler


def _both(largest: bool) -> Callable[..., Any]:
    """max or min: of everything, of two tensors, or values and positions along a dimension."""
    values, position = _values(largest), _position(largest)
    make = torch.return_types.max if largest else torch.return_types.min

    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return torch.maximum(tensor, dim) if largest else torch.minimum(tensor, dim)
        if dim is None:
            return values(tensor)
        if not isinstance(tensor, BlockSparseTensor) or not tensor.dtype.is_floating_point:
            return NotImplemented
        if dimensions(tensor, dim) == [tensor.dim() - 1]:
            found = _along_keys(tensor, largest)
            best, keys = (x[..., None] if keepdim else x for x in found)
            return make((best, keys))
        where = position(tensor, dim, keepdim)
        return where if where is NotImplemented else make((values(tensor, dim, keepdim), where))

    return handler


HANDLERS: dict[str, Callable[..., Any]] = {
    "max": _both(True),
    "min": _both(False),
    "amax": _values(True),
    "amin": _values(False),
    "argmax": _position(True),
    "argmin": _position(False),
    "topk": _topk,
}

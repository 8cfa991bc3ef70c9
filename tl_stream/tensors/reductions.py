"""Sums, means, variances and the like, on the kept values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_stream.tensors import folding
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.slicing import dimensions


def row_keys(tensor: BlockSparseTensor) -> tuple[Int[Tensor, ...], Bool[Tensor, ...]]:
    """Key position and whether it is a real key, for `tensor.row_values()`, one row each a query."""
    layout = tensor._narrow_layout()
    _, used = layout.rows()
    keys = layout.key_positions()
    real = used.repeat_interleave(layout.block_k, -1) & (keys < layout.mask.key_length)
    rows = torch.arange(tensor._view.rows.start, tensor._view.rows.stop, device=layout.device) // layout.block_q
    return tensor.drop_indexed(keys[:, :, rows]), tensor.drop_indexed(real[:, :, rows])


def _row_sum(tensor: BlockSparseTensor) -> Shaped[Tensor, ...]:
    values = tensor.row_values()
    _, real = row_keys(tensor)
    total = values.masked_fill(~real, 0).sum(-1)
    if tensor.fill == 0:
        return total
    outside = tensor.shape[-1] - real.sum(-1)
    return torch.where(outside > 0, total + outside * tensor.fill, total)


def _column_sum(tensor: BlockSparseTensor) -> Shaped[Tensor, ...]:
    values = tensor.row_values()
    values = values if values.is_floating_point() else values.long()
    keys, real = row_keys(tensor)
    total = values.new_zeros(*values.shape[:-2], tensor.shape[-1])
    flat_keys = keys.masked_fill(~real, 0).flatten(-2)
    total = total.scatter_add(-1, flat_keys, values.masked_fill(~real, 0).flatten(-2))
    if tensor.fill == 0:
        return total
    kept = torch.zeros_like(total, dtype=torch.long).scatter_add(-1, flat_keys, real.flatten(-2).long())
    outside = tensor.shape[-2] - kept
    return torch.where(outside > 0, total + outside * tensor.fill, total)


def _sum(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = dimensions(tensor, dim)
    n = tensor.dim()
    if n - 1 in dims:
        total, done = _row_sum(tensor), n - 1
    elif n - 2 in dims:
        total, done = _column_sum(tensor), n - 2
    else:
        result = folding.total(tensor, dims, keepdim)
        return result if dtype is None else result.to(dtype)
    total = total.unsqueeze(done)
    rest = [d for d in dims if d != done]
    total = total.sum(rest, keepdim=True) if rest else total
    if not keepdim:
        total = total.squeeze(tuple(dims))
    return total if dtype is None else total.to(dtype)


def _mean(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _sum(tensor, dim, keepdim, dtype=dtype) / _count(tensor, dimensions(tensor, dim))


def _count(tensor: Any, dims: list[int]) -> int:
    """How many entries each sum over `dims` is of."""
    return math.prod(tensor.shape[d] for d in dims)


def _variance(tensor: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    if isinstance(dim, bool):  # as in x.var(unbiased)
        dim, unbiased = None, dim
    dims, lost = dimensions(tensor, dim), float(unbiased) if correction is None else correction
    if folding.folds(tensor, dims):
        return folding.variance(tensor, dims, keepdim, lost)
    n, mean, squares = _count(tensor, dims), tensor.mean(dims, keepdim), (tensor**2).sum(dims, keepdim)
    return (squares - n * mean**2).clamp(min=0) / max(n - lost, 0)


def _deviation(*args: Any, **kwargs: Any) -> Any:
    variance = _variance(*args, **kwargs)
    return variance if variance is NotImplemented else variance.sqrt()


def _nansum(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return _sum(tensor.nan_to_num(0.0, torch.inf, -torch.inf), *args, **kwargs)


def _logsumexp(tensor: Any, dim: Any, keepdim: bool = False) -> Any:
    """Along the keys of scores, where what isn't kept counts nothing."""
    if dimensions(tensor, dim) != [tensor.dim() - 1] or tensor.fill != -torch.inf:
        return NotImplemented
    _, real = row_keys(tensor)
    return tensor.row_values().masked_fill(~real, -torch.inf).logsumexp(-1, keepdim)


def _any(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _sum(tensor != 0, dim, keepdim) != 0 if dim is not None else _sum(tensor != 0) != 0


def _all(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _sum(tensor == 0, dim, keepdim) == 0 if dim is not None else _sum(tensor == 0) == 0


HANDLERS: dict[str, Callable[..., Any]] = {
    "sum": _sum,
    "mean": _mean,
    "var": _variance,
    "std": _deviation,
    "nansum": _nansum,
    "logsumexp": _logsumexp,
    "any": _any,
    "all": _all,
}

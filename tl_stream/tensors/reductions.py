"""Sums, means, maxima and the like along keys, queries or everything, on the kept values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor


def _keys(tensor: BlockSparseTensor) -> tuple[Int[Tensor, ...], Bool[Tensor, ...]]:
    """Key position and whether it is a real key, for `tensor.row_values()`, one row each a query."""
    layout = tensor._narrow_layout()
    _, used = layout.rows()
    keys = layout.key_positions()
    real = used.repeat_interleave(layout.block_k, -1) & (keys < layout.mask.key_length)
    rows = torch.arange(tensor._view.rows.start, tensor._view.rows.stop, device=layout.device) // layout.block_q
    return tensor.drop_indexed(keys[:, :, rows]), tensor.drop_indexed(real[:, :, rows])


def _row_sum(tensor: BlockSparseTensor) -> Shaped[Tensor, ...]:
    values = tensor.row_values()
    _, real = _keys(tensor)
    total = values.masked_fill(~real, 0).sum(-1)
    if tensor.fill == 0:
        return total
    outside = tensor.shape[-1] - real.sum(-1)
    return torch.where(outside > 0, total + outside * tensor.fill, total)


def _column_sum(tensor: BlockSparseTensor) -> Any:
    if tensor.fill != 0:
        return NotImplemented
    values = tensor.row_values()
    keys, real = _keys(tensor)
    total = values.new_zeros(*values.shape[:-2], tensor.shape[-1])
    flat_keys = keys.masked_fill(~real, 0).flatten(-2)
    return total.scatter_add(-1, flat_keys, values.masked_fill(~real, 0).flatten(-2))


def _sum(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = dimensions(tensor, dim)
    n = tensor.dim()
    if n - 1 in dims:
        total, done = _row_sum(tensor), n - 1
    elif n - 2 in dims:
        total, done = _column_sum(tensor), n - 2
    else:
        return NotImplemented
    if total is NotImplemented:
        return NotImplemented
    total = total.unsqueeze(done)
    rest = [d for d in dims if d != done]
    total = total.sum(rest, keepdim=True) if rest else total
    if not keepdim:
        total = total.squeeze(tuple(dims))
    return total if dtype is None else total.to(dtype)


def _mean(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    total = _sum(tensor, dim, keepdim, dtype=dtype)
    if total is NotImplemented:
        return NotImplemented
    count = 1
    for d in dimensions(tensor, dim):
        count *= tensor.shape[d]
    return total / count


def _extreme(largest: bool) -> Callable[..., Any]:
    """max or min along the keys, or over everything."""
    worst = -torch.inf if largest else torch.inf

    def along_keys(tensor: Any) -> tuple[Tensor, Tensor]:
        values = tensor.row_values()
        if not values.shape[-1]:
            return values.new_full(values.shape[:-1], tensor.fill), torch.zeros(values.shape[:-1], dtype=torch.long)
        keys, real = _keys(tensor)
        kept = values.masked_fill(~real, worst)
        best = kept.max(-1) if largest else kept.min(-1)
        position = keys.gather(-1, best.indices[..., None]).squeeze(-1)
        gap = _first_gap(keys, real, tensor.shape[-1])
        # Outside the kept blocks every entry is `fill`; the first such key stands for them, as in torch for ties.
        beats = best.values < tensor.fill if largest else best.values > tensor.fill
        outside = (gap < tensor.shape[-1]) & (beats | ((best.values == tensor.fill) & (gap < position)))
        return torch.where(outside, torch.as_tensor(tensor.fill, dtype=kept.dtype), best.values), torch.where(
            outside, gap, position
        )

    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor) or not tensor.dtype.is_floating_point:
            return NotImplemented
        if dim is None:
            values, _ = along_keys(tensor)
            return values.max() if largest else values.min()
        if dim not in (-1, tensor.dim() - 1):
            return NotImplemented
        pair = along_keys(tensor)
        make = torch.return_types.max if largest else torch.return_types.min
        values, indices = (x[..., None] if keepdim else x for x in pair)
        return make((values, indices))

    return handler


def _first_gap(keys: Tensor, real: Tensor, n_keys: int) -> Tensor:
    """First key of each row that is not kept; `n_keys` where all are. Kept keys come in ascending order."""
    in_order = real & (keys == torch.arange(keys.shape[-1], device=keys.device))
    return in_order.long().cumprod(-1).sum(-1).clamp(max=n_keys)


def _values_only(extreme: Callable[..., Any]) -> Callable[..., Any]:
    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        result = extreme(tensor, dim, keepdim)
        return result if result is NotImplemented or dim is None else result.values

    return handler


def _indices_only(extreme: Callable[..., Any]) -> Callable[..., Any]:
    def handler(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
        result = NotImplemented if dim is None else extreme(tensor, dim, keepdim)
        return result if result is NotImplemented else result.indices

    return handler


def _any(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _sum(tensor != 0, dim, keepdim) != 0 if dim is not None else _sum(tensor != 0) != 0


def _all(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _sum(tensor == 0, dim, keepdim) == 0 if dim is not None else _sum(tensor == 0) == 0


def _topk(tensor: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The k greatest kept entries of each row; NotImplemented where a row's k-th is no greater than `fill`."""
    if dim not in (-1, tensor.dim() - 1) or not largest:
        return NotImplemented
    values = tensor.row_values()
    keys, real = _keys(tensor)
    if k > values.shape[-1]:
        return NotImplemented
    best = values.masked_fill(~real, -torch.inf).topk(k, sorted=sorted)
    if bool((best.values.amin(-1) <= tensor.fill).any()):
        return NotImplemented
    return torch.return_types.topk((best.values, keys.gather(-1, best.indices)))


def dimensions(tensor: Any, dim: Any) -> list[int]:
    """The dimensions that `dim` names, counted from 0; all of them for None."""
    n = tensor.dim()
    if dim is None or dim == ():
        return list(range(n))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if any(not -n <= d < n for d in dims):
        raise IndexError(f"dim was {dim}; expected dimensions from {-n} to {n - 1}.")
    return sorted({d % n for d in dims})


_max, _min = _extreme(True), _extreme(False)
HANDLERS: dict[str, Callable[..., Any]] = {
    "sum": _sum,
    "mean": _mean,
    "max": _max,
    "min": _min,
    "amax": _values_only(_max),
    "amin": _values_only(_min),
    "argmax": _indices_only(_max),
    "argmin": _indices_only(_min),
    "any": _any,
    "all": _all,
    "topk": _topk,
}

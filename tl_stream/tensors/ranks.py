"""Medians, quantiles, products and histograms: what takes how many entries hold the fill value, beside the kept ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.extremes import gaps
from tl_stream.tensors.reductions import row_keys
from tl_stream.tensors.slicing import dimensions


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Rows in ascending order: the kept values below the fill, so many times the fill, the other kept values.

    Attributes:
        kept: The kept values, ascending, and inf.
        below: How many of them are less than the fill.
        outside: How many entries aren't kept.
        fill: What those hold.
        has_nan: Whether a row holds NaN.
    """

    kept: Shaped[Tensor, "*row kept"]
    below: Int[Tensor, "*row"]
    outside: Int[Tensor, "*row"]
    fill: float
    has_nan: Shaped[Tensor, "*row"]

    @classmethod
    def of(cls, tensor: BlockSparseTensor, dim: Any) -> _Sorted:
        """Each row; for no `dim`, all entries as one."""
        _, real = row_keys(tensor)
        values, n = tensor.row_values(), tensor.shape[-1]
        if dim is None:
            values, n = values[real], tensor.numel()
            real = torch.ones_like(values, dtype=torch.bool)
        nan, below = (values.isnan() & real).any(-1), ((values < tensor.fill) & real).sum(-1)
        kept = values.masked_fill(~real, torch.inf).sort(-1).values
        return cls(kept, below, n - real.sum(-1), float(tensor.fill), nan)

    def at(self, rank: int) -> Shaped[Tensor, "*row"]:
        """The entry of that rank in each row, from 0; NaN where a row holds NaN."""
        is_fill = (self.below <= rank) & (rank < self.below + self.outside)
        found = self.kept.new_full(self.below.shape, self.fill)
        if self.kept.shape[-1]:
            place = torch.where(self.below > rank, rank, rank - self.outside).clamp(0, self.kept.shape[-1] - 1)
            found = self.kept.gather(-1, place[..., None])[..., 0].masked_fill(is_fill, self.fill)
        return found.masked_fill(self.has_nan, torch.nan)


def _quantile(tensor: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear") -> Any:
    if not _takes(tensor, dim) or interpolation not in _WEIGHTS or (dim is None and keepdim):
        return NotImplemented
    share = torch.as_tensor(q, dtype=tensor.dtype, device=tensor.device)
    if bool(((share < 0) | (share > 1)).any()):
        raise ValueError(f"q was {q}; expected shares between 0 and 1.")
    rows, last = _Sorted.of(tensor, dim), (tensor.numel() if dim is None else tensor.shape[-1]) - 1
    found = torch.stack([_between(rows, x * last, _WEIGHTS[interpolation]) for x in share.reshape(-1).double().tolist()])
    found = found if share.dim() else found[0]
    return found.unsqueeze(-1) if keepdim else found


def _between(rows: _Sorted, place: float, weight: Callable[[float], float]) -> Tensor:
    low, high = rows.at(int(place)), rows.at(-int(-place // 1))
    return torch.where(low == high, low, torch.lerp(low, high, weight(place % 1)))  # of -inf, too


_WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x, "lower": lambda x: 0.0, "higher": lambda x: 1.0, "midpoint": lambda x: 0.5, "nearest": round,
}  # fmt: skip


def _median(tensor: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """The lower of two medians, as torch has it; along the keys with the position of such an entry."""
    if not _takes(tensor, dim):
        return NotImplemented
    rows = _Sorted.of(tensor, dim)
    if dim is None:
        return rows.at((tensor.numel() - 1) // 2)
    found = rows.at((tensor.shape[-1] - 1) // 2)
    keys, real = row_keys(tensor)
    values = tensor.row_values()
    same = real & ((values == found[..., None]) | (values.isnan() & found.isnan()[..., None]))
    first = keys.masked_fill(~same, tensor.shape[-1]).amin(-1) if keys.shape[-1] else keys.new_full(found.shape, 0)
    where = torch.where(same.any(-1), first, gaps(keys, real, 1)[..., 0])
    return torch.return_types.median((found[..., None], where[..., None]) if keepdim else (found, where))


def _prod(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not _takes(tensor, dim):
        return NotImplemented
    _, real = row_keys(tensor)
    kept = tensor.row_values().masked_fill(~real, 1).prod(-1, dtype=dtype)
    found = kept * torch.full_like(kept, tensor.fill) ** (tensor.shape[-1] - real.sum(-1))  # 0 ** 0 is 1
    return found.prod() if dim is None else found.unsqueeze(-1) if keepdim else found


def _histc(tensor: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    if not _takes(tensor, None):
        return NotImplemented
    low, high = (float(tensor.min()), float(tensor.max())) if min == max else (min, max)
    _, real = row_keys(tensor)
    kept = tensor.row_values()[real]
    fill = torch.histc(torch.full_like(kept[:1], tensor.fill), bins, low, high)
    return torch.histc(kept, bins, low, high) + fill * (tensor.numel() - kept.numel())


def _takes(tensor: Any, dim: Any) -> bool:
    """Whether these are entries along the keys, or all."""
    if not isinstance(tensor, BlockSparseTensor) or not tensor.dtype.is_floating_point:
        return False
    return dim is None or dimensions(tensor, dim) == [tensor.dim() - 1]


HANDLERS: dict[str, Callable[..., Any]] = {"quantile": _quantile, "median": _median, "prod": _prod, "histc": _histc}

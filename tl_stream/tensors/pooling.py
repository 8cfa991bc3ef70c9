"""`torch.nn.functional`'s pooling of rows and keys: sums and maxima over windows, as ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from tl_stream.tensors.groups import Groups, How


@dataclass(frozen=True, eq=False)
class Windows:
    """The positions `start <= pos < stop` of each window on an axis, in ascending order; they may overlap and stand out.

    Attributes:
        start: First position of each.
        stop: One past the last position of each.
        n_positions: Length of the axis.
    """

    start: Int[Tensor, " window"]
    stop: Int[Tensor, " window"]
    n_positions: int

    @classmethod
    def each(cls, n: int, device: torch.device) -> Windows:
        """Each position for itself."""
        first = torch.arange(n, device=device)
        return cls(first, first + 1, n)

    @classmethod
    def sliding(cls, n: int, n_windows: int, size: int, stride: int, padding: int, device: torch.device) -> Windows:
        """Windows of one size, the first of which begins `padding` positions before the axis."""
        start = torch.arange(n_windows, device=device) * stride - padding
        return cls(start, start + size, n)

    @classmethod
    def adaptive(cls, n: int, n_windows: int, device: torch.device) -> Windows:
        """So many windows that cover the axis, as adaptive pooling lays them."""
        i = torch.arange(n_windows, device=device)
        return cls(i * n // n_windows, -(-(i + 1) * n // n_windows), n)

    def groups(self) -> list[Groups]:
        """Groups of positions that together put each one into all windows that hold it: one `Groups` where none overlap."""
        pos = torch.arange(self.n_positions, device=self.start.device)
        first, last = torch.searchsorted(self.stop, pos, right=True), torch.searchsorted(self.start, pos, right=True) - 1
        n, depth = len(self.start), int((last - first + 1).clamp(min=1).max())
        return [Groups(torch.where(last - j >= first, last - j, n), n) for j in range(depth)]

    def lengths(self, padding: int = 0) -> Int[Tensor, " window"]:
        """Positions in each window, with so many positions of padding on both sides of the axis."""
        return self.stop.clamp(max=self.n_positions + padding) - self.start.clamp(min=-padding)


def _pooled(tensor: Any, rows: Windows, keys: Windows, how: How, counts: tuple[Any, Any]) -> Any:
    """Maximum over each pair of windows, or sum divided by the product of two counts; NotImplemented for some arrangements."""
    results = [tensor.grouped(row, key, how) for row in rows.groups() for key in keys.groups()]
    if any(x is NotImplemented for x in results):
        return NotImplemented
    return reduce(torch.add, results) / (counts[0] * counts[1]) if how == "sum" else reduce(torch.maximum, results)


def _probed(name: str, tensor: Any, *args: Any, **options: Any) -> torch.Size:
    """The shape of what torch gives; or torch's own error."""
    return getattr(F, name)(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), *args, **options).shape


def _pool(name: str) -> Callable[..., Any]:
    """avg_pool1d, avg_pool2d, max_pool1d or max_pool2d; those of one dimension pool the keys."""
    how: How = "amax" if name.startswith("max") else "sum"
    n_axes = int(name[-2])

    def handler(tensor: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **options: Any) -> Any:
        given = dict(zip(_OPTIONS[how], rest, strict=False)) | options
        out = _probed(name, tensor, kernel_size, stride, padding, **given)
        if given.get("return_indices") or given.get("dilation", 1) not in (1, (1, 1), [1, 1]):
            return NotImplemented
        sizes, strides, paddings = (_each(x, n_axes) for x in (kernel_size, stride or kernel_size, padding))
        axes = [Windows.each(n, tensor.device) for n in tensor.shape[-2:]]
        counted = [0, 0]
        for d in range(-n_axes, 0):
            axes[d] = Windows.sliding(tensor.shape[d], out[d], sizes[d], strides[d], paddings[d], tensor.device)
            counted[d] = paddings[d] if given.get("count_include_pad", True) else 0
        counts: tuple[Any, Any] = axes[0].lengths(counted[0])[:, None], axes[1].lengths(counted[1])
        if given.get("divisor_override"):
            counts = 1, given["divisor_override"]
        return _pooled(tensor, axes[0], axes[1], how, counts)

    return handler


def _adaptive(name: str) -> Callable[..., Any]:
    """The adaptive forms, which are told how many windows there are."""
    how: How = "amax" if "max" in name else "sum"
    n_axes = int(name[-2])

    def handler(tensor: Any, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices:
            return NotImplemented
        out = _probed(name, tensor, output_size)
        axes = [Windows.each(n, tensor.device) for n in tensor.shape[-2:]]
        for d in range(-n_axes, 0):
            axes[d] = Windows.adaptive(tensor.shape[d], out[d], tensor.device)
        return _pooled(tensor, axes[0], axes[1], how, (axes[0].lengths()[:, None], axes[1].lengths()))

    return handler


def _each(x: Any, n: int) -> list[int]:
    """One number an axis."""
    return [x] * n if isinstance(x, int) else list(x) * (n if len(x) == 1 else 1)


_OPTIONS = {
    "sum": ("ceil_mode", "count_include_pad", "divisor_override"),
    "amax": ("dilation", "ceil_mode", "return_indices"),
}
HANDLERS: dict[str, Callable[..., Any]] = {
    **{name: _pool(name) for name in ("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d")},
    **{f"adaptive_{how}_pool{n}d": _adaptive(f"adaptive_{how}_pool{n}d") for how in ("avg", "max") for n in (1, 2)},
}

"""Functions that are another way to write `tensor[key]`, for every kind of sparse tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dimensions(tensor: Any, dim: Any) -> list[int]:
    """The dimensions that `dim` names, counted from 0; all of them for None."""
    n = tensor.dim()
    if dim is None or dim == ():
        return list(range(n))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if any(not -n <= d < n for d in dims):
        raise IndexError(f"dim was {dim}; expected dimensions from {-n} to {n - 1}.")
    return sorted({d % n for d in dims})


def at(tensor: Any, dim: int, item: Any) -> Any:
    """`tensor[..., item, ...]`, with `item` at dimension `dim` and everything of the others."""
    (position,) = dimensions(tensor, dim)
    return tensor[(*[slice(None)] * position, item)]


def _unbind(tensor: Any, dim: int = 0) -> Any:
    return tuple(at(tensor, dim, i) for i in range(tensor.shape[dim]))


def _iterate(tensor: Any) -> Any:
    return iter(_unbind(tensor))


def _squeeze(tensor: Any, dim: Any = None) -> Any:
    positions = dimensions(tensor, dim)
    return tensor[tuple(0 if d in positions and tensor.shape[d] == 1 else slice(None) for d in range(tensor.dim()))]


def _narrow(tensor: Any, dim: int, start: int, length: int) -> Any:
    start = start + tensor.shape[dim] if start < 0 else start
    return at(tensor, dim, slice(start, start + length))


def _pieces(name: str) -> Callable[..., Any]:
    """`split`, `chunk` and `tensor_split`: ranges of one dimension, cut as torch cuts an ordinary tensor of that length."""

    def handler(tensor: Any, size: Any, dim: int = 0) -> Any:
        pieces = getattr(torch.arange(tensor.shape[dim]), name)(size)
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
        return tuple(at(tensor, dim, slice(end - len(piece), end)) for end, piece in zip(ends, pieces, strict=True))

    return handler


def _index_select(tensor: Any, dim: int, index: Tensor) -> Any:
    return at(tensor, dim, index)


HANDLERS: dict[str, Callable[..., Any]] = {
    "select": at,
    "unbind": _unbind,
    "iter": _iterate,
    "squeeze": _squeeze,
    "narrow": _narrow,
    "split": _pieces("split"),
    "chunk": _pieces("chunk"),
    "tensor_split": _pieces("tensor_split"),
    "index_select": _index_select,
}

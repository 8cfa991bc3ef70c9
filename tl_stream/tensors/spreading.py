"""Texts, heads and layers repeated, reversed and put together: `expand`, `repeat`, `flip`, `roll`, `hstack` and their kin.

Rows and keys stay as they are: a sparse tensor with those repeated or reversed would no longer be one in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.of_parts import TensorOfParts
from tl_stream.tensors.slicing import at, dimensions
from tl_stream.tensors.wrapper import SparseTensor


def expand(tensor: Any, *sizes: Any) -> Any:
    """`tensor.expand(...)`, where rows and keys keep their number; NotImplemented else."""
    if not isinstance(tensor, SparseTensor):
        return NotImplemented
    target, numel = _sizes(sizes), tensor.numel()
    new = len(target) - tensor.dim()
    wanted = [n if size == -1 else size for size, n in zip(target[new:], tensor.shape, strict=True)] if new >= 0 else []
    if new < 0 or any(size != n != 1 for size, n in zip(wanted, tensor.shape, strict=True)):
        raise RuntimeError(f"expand: the sizes were {target}; expected some to which {tuple(tensor.shape)} broadcasts.")
    for d, (size, n) in enumerate(zip(wanted, tensor.shape, strict=True)):
        tensor = tensor if size == n else _chosen(tensor, d, [0] * size)
        if tensor is NotImplemented:
            return tensor
    found = _in_front(tensor, target[:new])
    return found if found.numel() == numel else _refusing_writes(found)


def _expand_as(tensor: Any, other: Any) -> Any:
    return tensor.expand(*other.shape)


def _repeat(tensor: Any, *sizes: Any) -> Any:
    """`tensor.repeat(...)` and `torch.tile`, of what comes before rows and keys."""
    times = _sizes(sizes)
    times = [1] * (tensor.dim() - len(times)) + times
    new = len(times) - tensor.dim()
    for d, n in enumerate(times[new:]):
        tensor = tensor if n == 1 else _chosen(tensor, d, list(range(tensor.shape[d])) * n)
        if tensor is NotImplemented:
            return tensor
    return _in_front(tensor, times[:new])


def _repeat_interleave(tensor: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Any:
    if not isinstance(repeats, int) or dim is None:
        return NotImplemented
    (d,) = dimensions(tensor, dim)
    return _chosen(tensor, d, [i for i in range(tensor.shape[d]) for _ in range(repeats)])


def _flip(tensor: Any, *dims: Any) -> Any:
    for d in dimensions(tensor, _sizes(dims)):
        tensor = _chosen(tensor, d, list(range(tensor.shape[d]))[::-1])
        if tensor is NotImplemented:
            return tensor
    return tensor


def _roll(tensor: Any, shifts: Any, dims: Any = None) -> Any:
    if not isinstance(shifts, int) or not isinstance(dims, int):
        return NotImplemented
    (d,) = dimensions(tensor, dims)
    return _chosen(tensor, d, torch.arange(tensor.shape[d]).roll(shifts).tolist())


def _sizes(sizes: tuple[Any, ...]) -> list[int]:
    """Numbers that were given one by one or as a list."""
    return [int(n) for n in (sizes[0] if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes)]


def _chosen(tensor: Any, d: int, index: list[int]) -> Any:
    """Some members of a dimension, in any order, as a copy; NotImplemented for rows and keys."""
    if d in tensor.row_and_key_dims():
        return NotImplemented
    if isinstance(tensor, BlockSparseTensor | JoinedTensor):
        return at(tensor, d, index)
    if isinstance(tensor, TensorOfParts) and d:
        return type(tensor)(tuple(_chosen(part, d - 1, index) for part in tensor.parts))
    return torch.stack([at(tensor, d, i) for i in index], d)


def _in_front(tensor: Any, sizes: list[int]) -> Any:
    """The tensor repeated along new first dimensions."""
    for n in reversed(sizes):
        tensor = tensor.unsqueeze(0) if n == 1 else torch.stack([tensor] * n)
    return tensor


def _refusing_writes(tensor: Any) -> Any:
    """A copy that stands for a view of one text or head shown several times: what is written to it would be lost."""
    if isinstance(tensor, BlockSparseTensor):
        tensor._data.is_expanded = True
    elif isinstance(tensor, TensorOfParts):
        for part in tensor.parts:
            _refusing_writes(part)
    else:
        _refusing_writes(tensor.base)
    return tensor


def _put_together(dim: int | None = None) -> Callable[..., Any]:
    """`torch.cat` under its other names."""

    def handler(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.cat(tensors, *args, **kwargs) if dim is None else torch.cat(tensors, dim)

    return handler


HANDLERS: dict[str, Callable[..., Any]] = {
    "expand": expand,
    "broadcast_to": expand,
    "expand_as": _expand_as,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "flip": _flip,
    "flipud": lambda tensor: _flip(tensor, 0),
    "fliplr": lambda tensor: _flip(tensor, 1),
    "roll": _roll,
    "concat": _put_together(),
    "concatenate": _put_together(),
    "vstack": _put_together(0),
    "hstack": _put_together(1),
}

"""Which function of torch is carried out how on a sparse tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import attention_ops, elementwise, gradients, indexing, reductions, sink
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.names import is_in_place
from tl_stream.tensors.slice_view import SliceView

Handler = Callable[..., Any]


def run(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Carry out `func`, which is called `name` and was called with at least one sparse tensor."""
    args, kwargs = _normalised(args, kwargs)
    if isinstance(kwargs.get("out"), BlockSparseTensor) or kwargs.get("inplace") or name.startswith("set "):
        raise NotImplementedError(
            f"{name}: writing to a sparse tensor by out=, inplace=True or an attribute; assign to x[...]."
        )
    handler = _HANDLERS.get(name)
    result = handler(*args, **kwargs) if handler else NotImplemented
    if result is NotImplemented and name in elementwise.NAMES:
        result = elementwise.run(name, func, args, kwargs)
    if result is NotImplemented and is_in_place(name, kwargs):
        result = elementwise.run_in_place(name, args, kwargs)
    return make_dense(name, func, args, kwargs) if result is NotImplemented else result


def make_dense(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Carry `func` out on ordinary tensors, where they are small enough; in-place results are written back.

    Raises:
        NotImplementedError: A sparse tensor has more than `config.max_dense` entries.
    """
    sparse = [x for x in _flatten((args, kwargs)) if isinstance(x, BlockSparseTensor)]
    if not sparse:
        raise NotImplementedError(f"{name}() got sparse tensors in a place where they can't be found: {args!r}, {kwargs!r}.")
    for tensor in sparse:
        origin = tensor._data.origin
        if tensor.numel() > origin.config.max_dense:
            raise NotImplementedError(
                f"{name}() is not known to {type(tensor).__name__} of layer {origin.layer}, and making it dense would take "
                f"{tuple(tensor.shape)} = {tensor.numel():,} entries (config.max_dense is {origin.config.max_dense:,}). "
                "Take a part first (a head and some rows, or a window), call .to_dense() where that is meant, or work on "
                ".row_values()."
            )
    sparse[0]._data.origin.fallbacks[name] += 1
    copies: list[tuple[BlockSparseTensor, Tensor]] = []
    dense_args, dense_kwargs = _map((args, kwargs), copies)
    result = func(*dense_args, **dense_kwargs)
    if is_in_place(name, kwargs) and isinstance(args[0], BlockSparseTensor):
        indexing.write(args[0], (..., slice(None)), dense_args[0])
        return args[0]
    for tensor, dense in copies:
        result = SliceView.of(dense, tensor, lambda grid: grid)._follow(result)
    return result


def _normalised(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """numpy's `axis` for `dim`, and `input=` as the first argument, as torch takes them."""
    if "axis" in kwargs:
        kwargs = {**{key: value for key, value in kwargs.items() if key != "axis"}, "dim": kwargs["axis"]}
    if "input" in kwargs and not args:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    return args, kwargs


def _flatten(x: Any) -> list[Any]:
    if isinstance(x, tuple | list):
        return [leaf for item in x for leaf in _flatten(item)]
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in _flatten(item)]
    return [x]


def _map(x: Any, copies: list[tuple[BlockSparseTensor, Tensor]]) -> Any:
    """`x` with every sparse tensor made dense; `copies` notes them."""
    if isinstance(x, BlockSparseTensor):
        copies.append((x, x.to_dense()))
        return copies[-1][1]
    if isinstance(x, tuple | list):
        return type(x)(_map(item, copies) for item in x)
    if isinstance(x, dict):
        return {key: _map(value, copies) for key, value in x.items()}
    return x


def _getitem(tensor: Any, key: Any) -> Any:
    return indexing.read(tensor, key) if isinstance(tensor, BlockSparseTensor) else NotImplemented


def _setitem(tensor: Any, key: Any, value: Any) -> Any:
    if isinstance(tensor, BlockSparseTensor):
        return indexing.write(tensor, key, value)
    tensor[key] = value.to_dense() if isinstance(value, BlockSparseTensor) else value
    return None


def _by_coordinates(name: str, is_view: bool) -> Handler:
    """Functions that only pick entries; `is_view`: what torch's gives is a view."""
    take = indexing.part if is_view else indexing.window

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return take(tensor, lambda grid: getattr(grid, name)(*args, **kwargs))

    return handler


def _select(tensor: Any, dim: int, index: int) -> Any:
    key: list[Any] = [slice(None)] * tensor.dim()
    key[dim] = index
    return indexing.read(tensor, tuple(key))


def _index_select(tensor: Any, dim: int, index: Tensor) -> Any:
    key: list[Any] = [slice(None)] * tensor.dim()
    key[dim] = index
    return indexing.read(tensor, tuple(key))


def _unbind(tensor: Any, dim: int = 0) -> Any:
    return tuple(_select(tensor, dim, i) for i in range(tensor.shape[dim]))


def _squeeze(tensor: Any, dim: Any = None) -> Any:
    positions = reductions.dimensions(tensor, dim)
    key = tuple(0 if d in positions and tensor.shape[d] == 1 else slice(None) for d in range(tensor.dim()))
    return indexing.read(tensor, key)


def _same_data(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _detach(tensor: Any) -> Any:
    return tensor.alias(detached=True)


def _clone(tensor: Any, *, memory_format: Any = None) -> Any:
    return type(tensor)(tensor._data.fork(), tensor._view, tensor.dtype, tensor._detached)


def _deepcopy(tensor: Any, memo: dict[int, Any]) -> Any:
    return memo.setdefault(id(tensor), _clone(tensor))


def _convert(name: str) -> Handler:
    """`.to`, `.float`, `.cpu` and the like."""

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        probe = getattr(torch.empty(0, dtype=tensor.dtype, device=tensor.device), name)(*args, **kwargs)
        if probe.device != tensor.device:
            moved = tensor._data.to(probe.device)
            return type(tensor)(moved, tensor._view, probe.dtype, tensor._detached)
        if probe.dtype == tensor.dtype:
            return tensor
        data = tensor._data.fork()
        if data.values is not None and not data.values.is_floating_point():
            data.values, data.fill = data.values.to(probe.dtype), float(data.fill)
        return type(tensor)(data, tensor._view, probe.dtype, tensor._detached)

    return handler


def _iterate(tensor: Any) -> Any:
    return iter(_unbind(tensor))


_CONVERSIONS = ("to", "float", "double", "half", "bfloat16", "cpu", "cuda")
_HANDLERS: dict[str, Handler] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "select": _select,
    "unbind": _unbind,
    "iter": _iterate,
    "squeeze": _squeeze,
    "diagonal": _by_coordinates("diagonal", True),
    "index_select": _index_select,
    "gather": _by_coordinates("gather", False),
    "take_along_dim": _by_coordinates("take_along_dim", False),
    "detach": _detach,
    "data": _detach,
    "clone": _clone,
    "deepcopy": _deepcopy,
    "contiguous": _same_data,
    **{name: _convert(name) for name in _CONVERSIONS},
    **attention_ops.HANDLERS,
    **reductions.HANDLERS,
    **gradients.HANDLERS,
    **sink.HANDLERS,
}

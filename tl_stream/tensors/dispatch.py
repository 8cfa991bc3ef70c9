"""Which function of torch is carried out how on a sparse tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tl_stream.tensors import (
    attention_ops,
    backward_hooks,
    elementwise,
    everywhere,
    extremes,
    gradients,
    indexing,
    positions,
    ranks,
    reductions,
    sink,
)
from tl_stream.tensors.arranged import REARRANGING, index, rearrange
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.densify import make_dense
from tl_stream.tensors.names import CONVERSIONS, is_in_place, normalised
from tl_stream.tensors.slice_view import picking
from tl_stream.tensors.stacked import stack

Handler = Callable[..., Any]


def run(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Carry out `func`, which is called `name` and was called with at least one sparse tensor."""
    args, kwargs = normalised(args, kwargs)
    if isinstance(kwargs.get("out"), BlockSparseTensor) or kwargs.get("inplace") or name.startswith("set "):
        raise NotImplementedError(
            f"{name}: writing to a sparse tensor by out=, inplace=True or an attribute; assign to x[...]."
        )
    if name in REARRANGING:
        return rearranged(name, func, args, kwargs)
    handler = _HANDLERS.get(name)
    result = handler(*args, **kwargs) if handler else NotImplemented
    if result is NotImplemented and name in elementwise.NAMES:
        result = elementwise.run(name, func, args, kwargs)
    if result is NotImplemented and is_in_place(name, kwargs):
        result = elementwise.run_in_place(name, args, kwargs)
    return make_dense(name, func, args, kwargs) if result is NotImplemented else result


def rearranged(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Permuted, reshaped and the like."""
    result = rearrange(args[0], lambda x: func(x, *args[1:], **kwargs))
    return make_dense(name, func, args, kwargs) if result is NotImplemented else result


def _getitem(tensor: Any, key: Any) -> Any:
    if isinstance(key, BlockSparseTensor) and key.dtype == torch.bool:
        chosen = positions.nonzero(key, as_tuple=True)
        return chosen if chosen is NotImplemented else tensor[chosen]
    if not isinstance(tensor, BlockSparseTensor):
        return NotImplemented
    new_axes = key is None or (isinstance(key, tuple) and any(item is None for item in key))
    found = index(tensor, key) if new_axes else NotImplemented
    return indexing.read(tensor, key) if found is NotImplemented else found


def _setitem(tensor: Any, key: Any, value: Any) -> Any:
    if isinstance(key, BlockSparseTensor) and isinstance(tensor, BlockSparseTensor):
        indexing.write(tensor, ..., torch.where(key, value, tensor))
    elif isinstance(tensor, BlockSparseTensor):
        indexing.write(tensor, key, value)
    else:
        tensor[key] = value.to_dense() if isinstance(value, BlockSparseTensor) else value


def _where(condition: Any, *choices: Any) -> Any:
    return NotImplemented if choices else positions.nonzero(condition, as_tuple=True)


def _same_data(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _detach(tensor: Any) -> Any:
    return tensor.alias(detached=True)


def _clone(tensor: Any, *, memory_format: Any = None) -> Any:
    data = tensor._selected()
    if data is tensor._data or tensor._data.is_lazy:
        return type(tensor)(tensor._data.fork(), tensor._view, tensor.dtype, tensor._detached)
    return tensor.with_data(data, tensor._detached)


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


_HANDLERS: dict[str, Handler] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "diagonal": picking(indexing.Picked, "diagonal", True),
    "gather": picking(indexing.Picked, "gather", False),
    "take_along_dim": picking(indexing.Picked, "take_along_dim", False),
    "detach": _detach,
    "data": _detach,
    "clone": _clone,
    "deepcopy": _deepcopy,
    "contiguous": _same_data,
    "where": _where,
    **{name: _convert(name) for name in CONVERSIONS - {"detach", "data"}},
    **attention_ops.HANDLERS,
    **everywhere.HANDLERS,
    **extremes.HANDLERS,
    **positions.HANDLERS,
    **ranks.HANDLERS,
    **reductions.HANDLERS,
    **gradients.HANDLERS,
    **backward_hooks.HANDLERS,
    "stack": stack,
    "cat": sink.cat,
}

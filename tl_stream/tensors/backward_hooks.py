"""Hooks on the gradients of sparse tensors: those of HookPoints, `register_hook` and `retain_grad`.

They act on the values of the kept blocks, which are made for them; on those of all parts of a joined tensor at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.joined import JoinedTensor, join, parts_of
from tl_stream.tensors.relayout import relayout

Sparse = BlockSparseTensor | JoinedTensor


class _Place(NamedTuple):
    """A tensor without parts, and the blocks that its values are on."""

    tensor: BlockSparseTensor
    layout: BlockLayout

    @classmethod
    def all_of(cls, tensor: Sparse) -> list[_Place]:
        """Of each part."""
        return [cls(part, part._data.layout) for part in parts_of(tensor)]

    def gradient(self, values: Tensor) -> BlockSparseTensor:
        return as_gradient(self.tensor, values, self.layout)


class Watch:
    """Notes the gradient of one tensor where its values are used, after the forward hooks of `point` have edited them."""

    def __init__(self, place: _Place, point: Module) -> None:
        self.place, self.point = place, point
        self.noted: list[BlockSparseTensor] = []

    def note(self, grad: Tensor, layout: BlockLayout) -> None:
        """Remember the gradient."""
        self.noted.append(as_gradient(self.place.tensor, grad, layout))

    def output(self, grad: Tensor) -> BlockSparseTensor:
        """What was noted; if nothing was, `grad`, the gradient where the values were made."""
        return self.noted.pop() if self.noted else self.place.gradient(grad)


def watch(tensor: Sparse, hook_point: Module) -> None:
    """Let the backward hooks of `hook_point` fire with the gradient of `tensor` (a full backward hook's grad_output).

    They are called with grad_input and grad_output once the gradient has come back to where the values were made. What a hook
    returns replaces the gradient that flows on, as for any module.
    """
    places, hooks = _Place.all_of(tensor), list(hook_point._backward_hooks.values())
    watched = any(other.point is hook_point for each in places for other in each.tensor._data.watches)
    if watched or not hooks or not torch.is_grad_enabled() or not places[0].tensor._data.requires_grad:
        return
    watches = [Watch(each, hook_point) for each in places]

    def deliver(*grads: Tensor) -> Sequence[Tensor]:
        output = join([each.output(grad) for each, grad in zip(watches, grads, strict=True)])
        for hook in hooks:
            result = hook(hook_point, (_gradient(places, grads),), (output,))
            if result is not None:
                grads = _values_of(result[0] if isinstance(result, tuple) else result, places, grads)
        return grads

    _on_values(places, [each.tensor._data.block_values() for each in places], deliver)
    for each, new in zip(places, watches, strict=True):
        each.tensor._data.watches = (*each.tensor._data.watches, new)


def at_use(data: BlockData, values: Tensor) -> Tensor:
    """`values`, on their way into the model: their gradient is shown to those who watch."""
    if not values.requires_grad:
        return values
    layout = data.layout
    for each in data.watches:
        values = values.view_as(values)
        values.register_hook(lambda grad, each=each: each.note(grad, layout))
    return values


def as_gradient(like: BlockSparseTensor, values: Tensor, layout: BlockLayout) -> BlockSparseTensor:
    """Gradient values on the blocks of `layout`, as a tensor of the shape of `like`; 0 elsewhere."""
    data = BlockData(layout, 0.0, like._data.origin, values.masked_fill(~layout.allowed(), 0))
    return BlockSparseTensor(data, like._view, like.dtype)


class _Together(torch.autograd.Function):
    """The identity on several tensors, whose gradients pass through the hooks at once."""

    @staticmethod
    def forward(ctx, hooks, *values):
        ctx.hooks = hooks
        return tuple(x.view_as(x) for x in values)

    @staticmethod
    def backward(ctx, *grads):
        for hook in list(ctx.hooks.values()):
            grads = hook(*grads)
        return None, *grads


def _on_values(places: Sequence[_Place], values: Sequence[Tensor], hook: Callable[..., Sequence[Tensor]]) -> RemovableHandle:
    """Let the gradients of the values of all parts pass through `hook`."""
    if len(places) == 1:
        return values[0].register_hook(lambda grad: hook(grad)[0])
    hooks: OrderedDict[int, Any] = OrderedDict()
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    for each, together in zip(places, _Together.apply(hooks, *values), strict=True):
        each.tensor._data.values = together
    return handle


def _gradient(places: Sequence[_Place], grads: Sequence[Tensor]) -> Sparse:
    return join([each.gradient(grad) for each, grad in zip(places, grads, strict=True)])


def _values_of(result: Any, places: Sequence[_Place], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The values of what a hook returned in place of the gradients `like`, on the same blocks."""
    parts = parts_of(result)
    shapes = [part._data.layout.shape if isinstance(part, BlockSparseTensor) else None for part in parts]
    if shapes != [each.layout.shape for each in places]:
        raise TypeError(
            f"A backward hook on attention scores or pattern returned {type(result).__name__}; expected the sparse gradient "
            "that it was given, changed, or None."
        )
    found = []
    for part, (_, layout), grad in zip(parts, places, like, strict=True):
        values, own = part._data.block_values().to(grad.dtype), part._data.layout
        found.append(values if own.kv_indices is layout.kv_indices else relayout(values, own, layout, 0.0))
    return tuple(found)


def _register_hook(tensor: Sparse, hook: Callable[[Any], Any]) -> RemovableHandle:
    """`tensor.register_hook(f)`: f gets the sparse gradient; what it returns replaces it."""
    places = _Place.all_of(tensor)

    def on_values(*grads: Tensor) -> Sequence[Tensor]:
        result = hook(_gradient(places, grads))
        return grads if result is None else _values_of(result, places, grads)

    return _on_values(places, [_in_graph(each.tensor) for each in places], on_values)


def _retain_grad(tensor: Sparse) -> None:
    for part in parts_of(tensor):
        _in_graph(part).retain_grad()


def _requires_grad_(tensor: Sparse, requires_grad: bool = True) -> Any:
    if not requires_grad and not any(part._data.in_graph for part in parts_of(tensor)):
        return tensor
    raise NotImplementedError("requires_grad_() is not supported on a sparse tensor: it has no values of its own in a graph.")


def _in_graph(tensor: BlockSparseTensor) -> Tensor:
    if tensor._data.is_used:
        raise RuntimeError(
            "This sparse tensor was used by the model already, so that a hook would not see its gradient. Do this inside a "
            "forward hook, or take torch.autograd.grad(loss, tensor)."
        )
    values = tensor._data.block_values() if tensor._data.requires_grad and not tensor._detached else None
    if values is None or not values.requires_grad:
        raise RuntimeError("This sparse tensor is not part of a graph: run the model with gradients enabled.")
    return values


HANDLERS: dict[str, Callable[..., Any]] = {
    "register_hook": _register_hook,
    "retain_grad": _retain_grad,
    "requires_grad_": _requires_grad_,
}

"""Gradients of sparse tensors: `torch.autograd.grad`, `register_hook`, `retain_grad`, and HookPoints' backward hooks.

A lazy pattern has no values in the graph. Its gradient is that of z times v^T, on the kept blocks; the one of the scores
follows by the softmax rule `dS = P * (dP - sum(P * dP))`. Where backward hooks wait, the values are made and are
part of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tl_stream.attention.gather import value_products, weigh_values
from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData, PatternData, ScoresData
from tl_stream.tensors.view import View


class Tap:
    """The z that a lazy pattern gave, while the graph lives: enough for the gradient of the pattern."""

    def __init__(self, z: Tensor, v: Tensor) -> None:
        self.z, self.v = z, v


class _KeepAlive(torch.autograd.Function):
    """The identity; its node in the graph holds the tap, so that a cached pattern need not hold the graph."""

    @staticmethod
    def forward(ctx, z, tap):
        ctx.tap = tap
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def weigh(data: BlockData, v: Tensor) -> Tensor:
    """`pattern @ v`, `[batch, head_index, query_pos, d_v]`, watched by whoever wants the pattern's gradient."""
    if not isinstance(data, PatternData) or not data.is_lazy:
        return weigh_values(at_use(data, data.block_values()), v, data.layout)
    z = data.weigh(v)
    if not z.requires_grad:
        return z
    tap = Tap(z, v.detach())
    data.tap = weakref.ref(tap)
    return _KeepAlive.apply(z, tap)


def watch(tensor: BlockSparseTensor, hook_point: Module) -> None:
    """Let the backward hooks of `hook_point` fire with the gradient of `tensor` (a full backward hook's grad_output).

    What a hook returns replaces the gradient that flows on, as for any module.
    """
    data, hooks = tensor._data, list(hook_point._backward_hooks.values())
    if not hooks or not torch.is_grad_enabled() or not data.requires_grad:
        return
    at_output: list[Tensor] = []

    def deliver(grad: Tensor) -> Tensor:
        output = as_gradient(tensor, at_output.pop() if at_output else grad)
        for hook in hooks:
            result = hook(hook_point, (as_gradient(tensor, grad),), (output,))
            if result is not None:
                grad = _values_of(result[0] if isinstance(result, tuple) else result, data.layout, grad)
        return grad

    data.block_values().register_hook(deliver)
    data.watches = (*data.watches, at_output.append)


def at_use(data: BlockData, values: Tensor) -> Tensor:
    """`values`, on their way into the model: their gradient is shown to those who watch."""
    if not values.requires_grad:
        return values
    for note in data.watches:
        values = values.view_as(values)
        values.register_hook(lambda grad, note=note: note(grad))
    return values


def as_gradient(like: BlockSparseTensor, values: Tensor) -> BlockSparseTensor:
    """Gradient values on the kept blocks of `like`, as a tensor of its shape; 0 elsewhere."""
    layout = like._data.layout
    data = BlockData(layout, 0.0, like._data.origin, values.masked_fill(~layout.allowed(), 0))
    return BlockSparseTensor(data, like._view, like.dtype)


def narrowed_view(tensor: BlockSparseTensor, data: BlockData) -> View:
    """The view of `tensor` on data that holds only its batch elements and heads."""
    view = tensor._view
    batch = 0 if isinstance(view.batch, int) else range(data.layout.batch)
    head = 0 if isinstance(view.head, int) else range(data.layout.n_heads)
    return View(batch, head, view.rows, view.n_keys)


def _values_of(grad: Any, layout: BlockLayout, like: Tensor) -> Tensor:
    if isinstance(grad, BlockSparseTensor) and grad._data.layout.kv_indices is layout.kv_indices:
        return grad._data.block_values().to(like.dtype)
    raise TypeError(
        f"A backward hook on attention scores or pattern returned {type(grad).__name__}; expected the sparse gradient that it "
        "was given, changed, or None."
    )


def _leaf(data: BlockData) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensor in the graph that stands for `data`, and how its gradient becomes that of `data`."""
    if data.values is not None and data.values.requires_grad:
        return data.values, lambda grad: grad
    if isinstance(data, ScoresData) and data.pattern is not None:
        pattern = data.pattern
        leaf, finish = _leaf(pattern)
        return leaf, lambda grad: _through_softmax(pattern, finish(grad))
    tap = data.tap() if data.tap is not None else None
    if tap is None:
        raise RuntimeError(
            "This sparse tensor is not part of a graph (any more): run the model with gradients enabled, keep the "
            "output alive, and take the gradient of something that was computed from it."
        )
    return tap.z, lambda grad: value_products(grad, tap.v, data.layout)


def _through_softmax(pattern: PatternData, grad: Tensor) -> Tensor:
    with torch.no_grad():
        weights = pattern.block_values()
    return weights * (grad - (weights * grad).sum(-1, keepdim=True))


def _grad(*args: Any, **kwargs: Any) -> Any:
    """`tensor.grad`, and `torch.autograd.grad(outputs, inputs)` with sparse tensors among the inputs."""
    if isinstance(args[0], BlockSparseTensor):
        values = args[0]._data.values
        return None if values is None or values.grad is None else as_gradient(args[0], values.grad)
    outputs, inputs, *rest = args
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    leaves = [_leaf(x._data) if isinstance(x, BlockSparseTensor) else (x, lambda grad: grad) for x in inputs]
    grads = torch.autograd.grad(outputs, [leaf for leaf, _ in leaves], *rest, **kwargs)
    return tuple(
        as_gradient(x, finish(grad)) if isinstance(x, BlockSparseTensor) and grad is not None else grad
        for x, grad, (_, finish) in zip(inputs, grads, leaves, strict=True)
    )


def _register_hook(tensor: BlockSparseTensor, hook: Callable[[Any], Any]) -> Any:
    """`tensor.register_hook(f)`: f gets the sparse gradient; what it returns replaces it."""

    def on_values(grad: Tensor) -> Tensor | None:
        result = hook(as_gradient(tensor, grad))
        return None if result is None else _values_of(result, tensor._data.layout, grad)

    return _in_graph(tensor).register_hook(on_values)


def _retain_grad(tensor: BlockSparseTensor) -> None:
    _in_graph(tensor).retain_grad()


def _in_graph(tensor: BlockSparseTensor) -> Tensor:
    values = tensor._data.block_values() if tensor._data.requires_grad else None
    if values is None or not values.requires_grad:
        raise RuntimeError("This sparse tensor is not part of a graph: run the model with gradients enabled.")
    return values


HANDLERS: dict[str, Callable[..., Any]] = {
    "grad": _grad,
    "register_hook": _register_hook,
    "retain_grad": _retain_grad,
}

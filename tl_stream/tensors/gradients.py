"""Gradients of sparse tensors: `torch.autograd.grad`, `register_hook`, `retain_grad`, and HookPoints' backward hooks.

A lazy pattern has no values in the graph. Its gradient is that of z times v^T, on the kept blocks; the one of the scores
follows by the softmax rule `dS = P * (dP - sum(P * dP))`. Where backward hooks wait, the values are made and are
part of the graph.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from tl_stream.attention.chunks import whole
from tl_stream.attention.gather import value_products, weigh_values
from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData, PatternData, ScoresData, relayout
from tl_stream.tensors.joined import JoinedTensor, join, parts_of

Sparse = BlockSparseTensor | JoinedTensor


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


class Watch:
    """Notes the gradient of one sparse tensor where its values are used, after the forward hooks of `point` edited them."""

    def __init__(self, tensor: BlockSparseTensor, point: Module) -> None:
        self.tensor, self.point = tensor, point
        self.layout = tensor._data.layout
        self.at_output: list[BlockSparseTensor] = []

    def note(self, grad: Tensor, layout: BlockLayout) -> None:
        """Remember the gradient."""
        self.at_output.append(as_gradient(self.tensor, grad, layout))

    def output(self, grad: Tensor) -> BlockSparseTensor:
        """What was noted; `grad`, the gradient where the values were made, where nothing was."""
        return self.at_output.pop() if self.at_output else as_gradient(self.tensor, grad, self.layout)


def watch(tensor: Sparse, hook_point: Module) -> None:
    """Let the backward hooks of `hook_point` fire with the gradient of `tensor` (a full backward hook's grad_output).

    They are called with grad_input and grad_output once the gradient has come back to where the values were made. What a hook
    returns replaces the gradient that flows on, as for any module.
    """
    parts, hooks = parts_of(tensor), list(hook_point._backward_hooks.values())
    watched = any(other.point is hook_point for part in parts for other in part._data.watches)
    if watched or not hooks or not torch.is_grad_enabled() or not any(part._data.requires_grad for part in parts):
        return
    watches = [Watch(part, hook_point) for part in parts]

    def deliver(*grads: Tensor) -> Sequence[Tensor]:
        output = join([each.output(grad) for each, grad in zip(watches, grads, strict=True)])
        for hook in hooks:
            result = hook(hook_point, (_as_gradients(watches, grads),), (output,))
            if result is not None:
                grads = _values_of(result[0] if isinstance(result, tuple) else result, watches, grads)
        return grads

    _on_values(parts, [part._data.block_values() for part in parts], deliver)
    for part, new in zip(parts, watches, strict=True):
        part._data.watches = (*part._data.watches, new)


def _on_values(
    parts: Sequence[BlockSparseTensor], values: Sequence[Tensor], hook: Callable[..., Sequence[Tensor]]
) -> RemovableHandle:
    """Let the gradients of the values of all parts pass through `hook`, at once."""
    if len(parts) == 1:
        return values[0].register_hook(lambda grad: hook(grad)[0])
    hooks: OrderedDict[int, Any] = OrderedDict()
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    for part, together in zip(parts, _Together.apply(hooks, *values), strict=True):
        part._data.values = together
    return handle


def at_use(data: BlockData, values: Tensor) -> Tensor:
    """`values`, on their way into the model: their gradient is shown to those who watch."""
    if not values.requires_grad:
        return values
    layout = data.layout
    for each in data.watches:
        values = values.view_as(values)
        values.register_hook(lambda grad, each=each: each.note(grad, layout))
    return values


def weigh(data: BlockData, v: Tensor, detached: bool) -> Tensor:
    """`pattern @ v`, `[batch, head_index, query_pos, d_v]`, watched by whoever wants the pattern's gradient."""
    if isinstance(data, PatternData):
        data.follow()
    if not isinstance(data, PatternData) or not data.is_lazy or data.rest is not None:
        values = data.block_values()
        z = weigh_values(values.detach() if detached else at_use(data, values), v, data.layout)
        rest = data.find_rest() if data.is_complete else None
        return z if rest is None else z + (rest.detach() if detached else rest).weigh(v, data.layout)
    z = data.weigh(v, detached)
    if detached or not z.requires_grad:
        return z
    tap = Tap(z, v.detach())
    for each in data.lineage:
        each.taps = (*each.taps, weakref.ref(tap))
    return _KeepAlive.apply(z, tap)


def as_gradient(like: BlockSparseTensor, values: Tensor, layout: BlockLayout) -> BlockSparseTensor:
    """Gradient values on the blocks of `layout`, as a tensor of the shape of `like`; 0 elsewhere."""
    data = BlockData(layout, 0.0, like._data.origin, values.masked_fill(~layout.allowed(), 0))
    return BlockSparseTensor(data, like._view, like.dtype)


def _as_gradients(watches: Sequence[Watch], grads: Sequence[Tensor]) -> Sparse:
    return join([as_gradient(each.tensor, grad, each.layout) for each, grad in zip(watches, grads, strict=True)])


def _values_of(result: Any, watches: Sequence[Watch], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a hook returned in place of the gradients, on the same blocks."""
    parts = parts_of(result)
    if len(parts) != len(watches):
        raise _wrong_gradient(result)
    return tuple(_part_values(x, each.layout, grad) for x, each, grad in zip(parts, watches, grads, strict=True))


def _part_values(grad: Any, layout: BlockLayout, like: Tensor) -> Tensor:
    if not isinstance(grad, BlockSparseTensor) or grad._data.layout.shape != layout.shape:
        raise _wrong_gradient(grad)
    values = grad._data.block_values().to(like.dtype)
    own = grad._data.layout
    return values if own.kv_indices is layout.kv_indices else relayout(values, own, layout, 0.0)


def _wrong_gradient(grad: Any) -> TypeError:
    return TypeError(
        f"A backward hook on attention scores or pattern returned {type(grad).__name__}; expected the sparse gradient "
        "that it was given, changed, or None."
    )


Leaf = tuple[Tensor, Callable[[Tensor], Tensor]]


def _leaves(data: BlockData) -> list[Leaf]:
    """The tensors in the graph that stand for `data`, and how the gradient of each becomes part of that of `data`."""
    if data.read_late:
        raise RuntimeError(
            "Values of this sparse tensor were read with gradients after the model had used it; its gradient would miss "
            "one of the two. Read values inside the hook, or under torch.no_grad()."
        )
    if data.values is not None and data.values.requires_grad:
        return [(data.values, lambda grad: grad)]
    if isinstance(data, ScoresData):
        return [leaf for pattern in data.patterns for leaf in _leaves_before_softmax(pattern)]
    return [(tap.z, partial(value_products, v=tap.v, layout=data.layout)) for tap in _living_taps(data)]


def _living_taps(data: BlockData) -> list[Tap]:
    return [tap for tap in (ref() for ref in data.taps) if tap is not None]


def _leaves_before_softmax(pattern: PatternData) -> list[Leaf]:
    leaves = _leaves(pattern)
    if pattern.scores_in_graph is not None:
        return [(pattern.scores_in_graph, _unchanged)]
    if pattern.is_lazy:
        return [(tap.z, partial(_through_attention, pattern, tap)) for tap in _living_taps(pattern)]
    return [(leaf, partial(_through_softmax, pattern, finish)) for leaf, finish in leaves]


def _through_softmax(pattern: PatternData, finish: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    with torch.no_grad():
        weights, grad = pattern.block_values(), finish(grad)
    return weights * (grad - (weights * grad).sum(-1, keepdim=True))


def _through_attention(pattern: PatternData, tap: Tap, grad: Tensor) -> Tensor:
    """As `_through_softmax`, from z: `sum(P * dP)` over everything that a row reads is `z . dz`."""
    with torch.no_grad():
        weights = pattern.block_values()
        mean = whole(pattern.layout).cut_queries((tap.z * grad).sum(-1, keepdim=True))
    return weights * (value_products(grad, tap.v, pattern.layout) - mean)


def _grad(*args: Any, **kwargs: Any) -> Any:
    """`tensor.grad`, and `torch.autograd.grad(outputs, inputs)` with sparse tensors among the inputs."""
    if len(args) > 1 or kwargs:
        return _autograd_grad(*args, **kwargs)
    values = [part._data.values for part in parts_of(args[0])]
    grads = [[x.grad] if x is not None and x.grad is not None else [] for x in values]
    return _joined_total(args[0], grads) if any(grads) else None


def _autograd_grad(outputs: Any, inputs: Any, *, allow_unused: bool | None = None, **kwargs: Any) -> Any:
    if any(isinstance(x, Sparse) for x in (outputs if isinstance(outputs, tuple | list) else (outputs,))):
        raise NotImplementedError("torch.autograd.grad of a sparse tensor: expected ordinary outputs; reduce it first.")
    if kwargs.get("create_graph"):
        raise NotImplementedError("create_graph=True is not supported for sparse attention; gradients are of first order.")
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    leaves = [[_leaves_of(part) for part in parts_of(x)] for x in inputs]
    flat = [leaf for parts in leaves for group in parts for leaf, _ in group]
    found = iter(torch.autograd.grad(outputs, flat, allow_unused=True, **kwargs) if flat else ())
    return tuple(_gather(x, parts, found, bool(allow_unused)) for x, parts in zip(inputs, leaves, strict=True))


def _leaves_of(x: Any) -> list[Leaf]:
    return _leaves(x._data) if isinstance(x, BlockSparseTensor) else [(x, _unchanged)]


def _gather(x: Any, leaves: list[list[Leaf]], found: Iterator[Tensor | None], allow_unused: bool) -> Tensor | None:
    """The gradient of one input: for each part the sum over the tensors that stand for it."""
    sums = [[finish(grad) for _, finish in group if (grad := next(found)) is not None] for group in leaves]
    if not any(sums) and not allow_unused:
        raise RuntimeError(
            "One of the inputs is not part of the graph of the outputs (any more): run the model with gradients enabled, "
            "keep the output alive, and take the gradient of something computed from it. allow_unused=True gives None."
        )
    if not any(sums):
        return None
    return _joined_total(x, sums)


def _joined_total(x: Any, grads: list[list[Tensor]]) -> Any:
    return join([_total(part, each) for part, each in zip(parts_of(x), grads, strict=True)])


def _total(part: Tensor, grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros_like(part)
    total = sum(grads[1:], grads[0])
    return as_gradient(part, total, part._data.layout) if isinstance(part, BlockSparseTensor) else total


def _unchanged(grad: Tensor) -> Tensor:
    return grad


def _register_hook(tensor: Sparse, hook: Callable[[Any], Any]) -> Any:
    """`tensor.register_hook(f)`: f gets the sparse gradient; what it returns replaces it."""
    parts = parts_of(tensor)
    places = [Watch(part, Module()) for part in parts]

    def on_values(*grads: Tensor) -> Sequence[Tensor]:
        result = hook(_as_gradients(places, grads))
        return grads if result is None else _values_of(result, places, grads)

    return _on_values(parts, [_in_graph(part) for part in parts], on_values)


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
    "grad": _grad,
    "register_hook": _register_hook,
    "retain_grad": _retain_grad,
    "requires_grad_": _requires_grad_,
}

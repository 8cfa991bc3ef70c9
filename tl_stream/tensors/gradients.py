"""Gradients of sparse tensors: `torch.autograd.grad` and `.grad`.

A lazy pattern has no values in the graph. Its gradient is that of z times v^T, on the kept blocks; the one of the scores
follows by the softmax rule `dS = P * (dP - sum(P * dP))`. Where backward hooks wait (`backward_hooks`), the values are made and
are part of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_stream.attention.chunks import whole
from tl_stream.attention.gather import value_products, weigh_values
from tl_stream.tensors.backward_hooks import Sparse, as_gradient, at_use
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.joined import join, parts_of
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.scores_data import ScoresData


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


HANDLERS: dict[str, Callable[..., Any]] = {"grad": _grad}

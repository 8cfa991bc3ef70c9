"""`SplitTensor`: a sparse tensor whose rows or keys are shown cut into several dimensions, on the way to being pooled.

`p.reshape(batch, heads, q, s, k, t)` and `einops.reduce(p, "b h (q s) (k t) -> b h q k")` begin so. Reductions over the pieces
give ordinary tensors; what is merged again is the sparse tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import composite, elementwise, reductions, slicing
from tl_stream.tensors.arranged import REARRANGING, ArrangedTensor, arrange, rearrange
from tl_stream.tensors.arrangement import Arrangement
from tl_stream.tensors.densify import flatten, make_dense
from tl_stream.tensors.groups import Groups
from tl_stream.tensors.names import CONVERSIONS, is_in_place, normalised, reduction
from tl_stream.tensors.of_parts import TensorOfBase
from tl_stream.tensors.stacked import StackedTensor
from tl_stream.tensors.wrapper import SparseTensor

Sizes = tuple[tuple[int, ...], ...]


class SplitTensor(TensorOfBase):
    """See the module.

    Attributes:
        sizes: Into what each dimension of `base` (query and key last) is cut; those before the last two stay whole.
            `arrangement` shows the pieces of all dimensions, counted through.
    """

    rank = 4
    sizes: Sizes

    @staticmethod
    def __new__(cls, base: SparseTensor, sizes: Sizes, arrangement: Arrangement) -> SplitTensor:
        """Show `base` cut and arranged so."""
        self = cls.empty(arrangement.shape, base.dtype, base.device)
        self.base, self.sizes, self.arrangement = base, sizes, arrangement
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = normalised(args, kwargs)
        leader = next(x for x in flatten((args, kwargs)) if isinstance(x, SplitTensor))
        result = NotImplemented
        if name in REARRANGING:
            result = _change(leader.base, leader.sizes, leader.arrangement, lambda x: func(x, *args[1:], **kwargs))
        elif name in _HANDLERS:
            result = _HANDLERS[name](*args, **kwargs)
        elif (name in elementwise.NAMES or name in CONVERSIONS) and not is_in_place(name, kwargs):
            result = _entrywise(leader, func, args, kwargs)
        elif (reduced := reduction(name, args, kwargs)) is not None and args[0] is leader:
            result = _reduce(leader, name, func, *reduced)
        return make_dense(name, func, args, kwargs) if result is NotImplemented else result

    def to_dense(self) -> Tensor:  # type: ignore[override]
        return self.arrangement.apply(self.base.to_dense().reshape(self.arrangement.own))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SplitTensor(shape={tuple(self.shape)}, sizes={self.sizes}, of={self.base!r})"


def split(tensor: SparseTensor, view: Callable[[Tensor], Tensor]) -> Any:
    """What a function that rearranges and cuts dimensions makes of a sparse tensor; NotImplemented where it can't be said."""
    before, base = Arrangement.plain(tuple(tensor.shape)), tensor
    if isinstance(tensor, ArrangedTensor):
        before, base = tensor.arrangement, tensor.base
    cut = _cut(before, view)
    heads = [d for d, sizes in enumerate((cut or [])[:-2]) if len(sizes) > 1]
    if cut is None or not heads:
        return _change(base, tuple((n,) for n in base.shape), before, view)
    if (heads[0],) not in before.groups:
        return NotImplemented
    return rearrange(
        _stacked(tensor, before.groups.index((heads[0],)), cut[heads[0]][0]), lambda x: view(x.reshape(before.shape))
    )


def _stacked(tensor: Any, dim: int, n: int) -> Any:
    """A dimension of heads (or texts, or layers) as `n` groups of equal size: a stack of those, which writes go through."""
    return StackedTensor(tensor.chunk(n, dim)).movedim(0, dim)


def _change(base: SparseTensor, sizes: Sizes, before: Arrangement, view: Callable[[Tensor], Tensor]) -> Any:
    cut = _cut(before, view)
    if cut is None:
        return NotImplemented
    pieces, start = [], 0  # numbers of the new pieces of each old one
    for parts in cut:
        pieces.append(tuple(range(start, start + len(parts))))
        start += len(parts)
    own = tuple(n for parts in cut for n in parts)
    groups = tuple(tuple(piece for d in group for piece in pieces[d]) for group in before.groups)
    after = Arrangement(own, groups).change(view)
    rest, new_sizes = iter(cut), []
    for parts in sizes:
        new_sizes.append(tuple(n for _ in parts for n in next(rest)))
    if after is None or any(len(parts) > 1 for parts in new_sizes[:-2]):
        return NotImplemented
    return _shown(base, tuple(new_sizes), after.groups)


def _cut(before: Arrangement, view: Callable[[Tensor], Tensor]) -> list[tuple[int, ...]] | None:
    """Into what each own dimension has to be cut for `view`, which the strides of its result tell; None where it can't be."""
    parts = [d for group in before.groups for d in group if before.own[d] != 1]
    result = view(torch.empty([before.own[d] for d in parts], device="meta").reshape(before.shape))
    ends = {end for n, stride in zip(result.shape, result.stride(), strict=True) if n > 1 for end in (stride, stride * n)}
    found: list[tuple[int, ...]] = [(n,) for n in before.own]
    inner = 1
    for d in reversed(parts):
        outer = inner * before.own[d]
        bounds = [inner, *sorted(end for end in ends if inner < end < outer), outer]
        if any(high % low for low, high in pairwise(bounds)):
            return None
        found[d] = tuple(high // low for low, high in pairwise(bounds))[::-1]
        inner = outer
    return found


def _shown(base: SparseTensor, sizes: Sizes, groups: tuple[tuple[int, ...], ...]) -> SparseTensor:
    """`base` with its pieces in those groups: cut only where they don't come together again."""
    own = tuple(n for parts in sizes for n in parts)
    first, start = {}, 0  # the dimension whose pieces begin with one
    for d, parts in enumerate(sizes):
        first[start] = d
        start += len(parts)
    merged = []
    for group in groups:
        left, dims = list(group), []
        while left and left[0] in first:
            d = first[left[0]]
            run = list(range(left[0], left[0] + len(sizes[d])))
            if left[: len(run)] != run:
                break
            dims.append(d)
            left = left[len(run) :]
        if left:
            return SplitTensor(base, sizes, Arrangement(own, groups))
        merged.append(tuple(dims))
    return arrange(base, tuple(merged))


def _entrywise(leader: SplitTensor, func: Any, args: tuple, kwargs: dict) -> Any:
    """Entry by entry, with numbers and with tensors that are cut and arranged in the same way."""

    def fits(x: Any) -> bool:
        same = isinstance(x, SplitTensor) and (x.sizes, x.arrangement) == (leader.sizes, leader.arrangement)
        return same or not isinstance(x, Tensor) or (x.dim() == 0 and not isinstance(x, SparseTensor))

    if not all(map(fits, (*args, *kwargs.values()))):
        return NotImplemented
    result = func(
        *(x.base if isinstance(x, SplitTensor) else x for x in args),
        **{key: x.base if isinstance(x, SplitTensor) else x for key, x in kwargs.items()},
    )
    return SplitTensor(result, leader.sizes, leader.arrangement)


def _reduce(tensor: SplitTensor, name: str, func: Any, dim: Any, keepdim: bool, options: dict[str, Any]) -> Any:
    """A reduction over shown dimensions: pooled over pieces of rows and keys, then over what comes before those."""
    if dim is None:
        return NotImplemented if name.startswith("arg") else func(tensor.base, **options)
    dims = slicing.dimensions(tensor, dim)
    if isinstance(dim, int) and name in ("max", "min"):
        return NotImplemented
    match name:
        case "sum" | "amax" | "amin":
            found = _pooled(tensor, dims, name)
        case "mean":
            total = _pooled(tensor, dims, "sum")
            found = total if total is NotImplemented else total / prod(tensor.shape[d] for d in dims)
        case "any":
            return tensor.count_nonzero(dims) != 0 if not keepdim else NotImplemented
        case "var" | "std":
            return reductions.HANDLERS[name](tensor, dim, keepdim=keepdim, **options)
        case _:
            return NotImplemented
    if found is NotImplemented:
        return found
    found = found if options.get("dtype") is None else found.to(options["dtype"])
    return found if keepdim else found.squeeze(tuple(dims))


def _pooled(tensor: SplitTensor, dims: list[int], how: Any) -> Any:
    """Over some shown dimensions, which stay with size 1."""
    reduced = set(tensor.arrangement.own_dims(dims))
    n = tensor.base.dim()
    if not any(piece >= n - 2 for piece in reduced):
        return NotImplemented
    (rows, row_sizes), (keys, key_sizes) = (_groups(tensor, d, reduced) for d in (n - 2, n - 1))
    found = tensor.base.grouped(rows, keys, how)
    lead = [d for d in range(n - 2) if d in reduced]
    if found is NotImplemented or not lead:
        pass
    elif how == "sum":
        found = found.sum(lead, keepdim=True)
    else:
        found = getattr(found, how)(lead, keepdim=True)
    if found is NotImplemented:
        return found
    return tensor.arrangement.apply(found.reshape(*found.shape[:-2], *row_sizes, *key_sizes))


def _groups(tensor: SplitTensor, d: int, reduced: set[int]) -> tuple[Groups, list[int]]:
    """The groups of a base dimension's positions that differ only in reduced pieces, and what is left of each piece."""
    start, sizes = sum(map(len, tensor.sizes[:d])), tensor.sizes[d]
    left = [1 if start + i in reduced else n for i, n in enumerate(sizes)]
    owner = torch.arange(prod(left), device=tensor.device).view(left).expand(sizes).reshape(-1)
    return Groups(owner, prod(left)), left


_HANDLERS: dict[str, Callable[..., Any]] = {
    "nansum": reductions.HANDLERS["nansum"],
    **composite.HANDLERS,
}

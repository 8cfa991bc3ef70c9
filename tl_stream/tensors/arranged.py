"""`ArrangedTensor`: a sparse tensor whose dimensions are shown permuted, merged or beside new ones of size 1.

It holds the sparse tensor and an `Arrangement`. Every function is carried out on the former, and what comes out arranged.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import attention_ops, elementwise, everywhere, slicing
from tl_stream.tensors.arrangement import Arrangement
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.densify import flatten, make_dense
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.indexing import MAX_WINDOW, Picked
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.joined_entries import JoinedEntries
from tl_stream.tensors.names import CONVERSIONS, is_in_place, normalised, reduction
from tl_stream.tensors.of_parts import TensorOfBase
from tl_stream.tensors.slice_view import SliceView
from tl_stream.tensors.wrapper import SparseTensor

REARRANGING = {
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT", "t", "adjoint", "reshape", "view",
    "flatten", "ravel", "unflatten", "unsqueeze",
}  # fmt: skip


class ArrangedTensor(TensorOfBase):
    """See the module. `base` is sparse by blocks, or a stack of such tensors."""

    rank = 2

    @staticmethod
    def __new__(cls, base: SparseTensor, arrangement: Arrangement) -> ArrangedTensor:
        """Show `base` in that arrangement."""
        self = cls.empty(arrangement.shape, base.dtype, base.device)
        self.base, self.arrangement = base, arrangement
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = normalised(args, kwargs)
        leader = next(x for x in flatten((args, kwargs)) if isinstance(x, ArrangedTensor))
        result = NotImplemented
        if name in REARRANGING:
            result = rearrange(leader, lambda x: func(x, *args[1:], **kwargs))
        elif name in _HANDLERS:
            result = _HANDLERS[name](*args, **kwargs)
        elif name in elementwise.NAMES or name in CONVERSIONS or is_in_place(name, kwargs):
            result = _entrywise(leader, name, func, args, kwargs)
        elif (reduced := reduction(name, args, kwargs)) is not None and args[0] is leader:
            result = _reduce(leader, name, func, *reduced)
        return make_dense(name, func, args, kwargs) if result is NotImplemented else result

    def to_dense(self) -> Tensor:  # type: ignore[override]
        return self.arrangement.apply(self.base.to_dense())

    def in_own_order(self, letters: str) -> tuple[Any, str] | None:
        order = [group[0] for group in self.arrangement.groups if len(group) == 1]
        hidden = [d for d, n in enumerate(self.arrangement.own) if n == 1 and d not in order]
        if len(order) != len(letters) or sorted(order + hidden) != list(range(self.base.dim())):
            return None
        base = self.base[tuple(0 if d in hidden else slice(None) for d in range(self.base.dim()))] if hidden else self.base
        return base, "".join(letters[order.index(d)] for d in sorted(order))

    @property
    def own_shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def row_and_key_dims(self) -> set[int]:
        own = self.base.row_and_key_dims()
        return {d for d, group in enumerate(self.arrangement.groups) if own & set(group)}

    def product(self, x: Tensor, transposed: bool) -> Any:
        n, groups = self.base.dim(), self.arrangement.groups
        if groups[-2:] == ((n - 1,), (n - 2,)):
            transposed = not transposed
        elif groups[-2:] != ((n - 2,), (n - 1,)):
            return NotImplemented
        lead = (*groups[:-2], (n - 2,), (n - 1,))
        result = self.base.product(Arrangement((*self.base.shape[:-2], *x.shape[-2:]), lead).undo(x), transposed)
        return result if result is NotImplemented else _shown(result, lead)

    def grouped(self, rows: Groups, keys: Groups, how: How) -> Any:
        n, groups = self.base.dim(), self.arrangement.groups
        if groups[-2:] == ((n - 1,), (n - 2,)):
            rows, keys = keys, rows
        elif groups[-2:] != ((n - 2,), (n - 1,)):
            return NotImplemented
        result = self.base.grouped(rows, keys, how)
        return result if result is NotImplemented else _shown(result, groups)

    def __copy__(self) -> ArrangedTensor:
        return ArrangedTensor(copy(self.base), self.arrangement)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ArrangedTensor(shape={tuple(self.shape)}, dimensions={self.arrangement.groups}, of={self.base!r})"


def arrange(base: SparseTensor, groups: tuple[tuple[int, ...], ...]) -> SparseTensor:
    """`base` with its dimensions shown in those groups; itself where that is how they are."""
    arrangement = Arrangement(tuple(base.shape), groups)
    return base if arrangement.is_plain else ArrangedTensor(base, arrangement)


def rearrange(tensor: SparseTensor, view: Callable[[Tensor], Tensor]) -> Any:
    """What a function that only rearranges dimensions makes of a sparse tensor; NotImplemented where it can't be said."""
    from tl_stream.tensors.split import split

    before, base = Arrangement.plain(tuple(tensor.shape)), tensor
    if isinstance(tensor, ArrangedTensor):
        before, base = tensor.arrangement, tensor.base
    after = before.change(view)
    return split(tensor, view) if after is None else arrange(base, after.groups)


def _shown(result: Any, groups: tuple[tuple[int, ...], ...]) -> Any:
    """What was computed on the base, sparse or plain, as it is shown."""
    if isinstance(result, tuple):
        return type(result)([_shown(x, groups) for x in result])
    if isinstance(result, SparseTensor):
        return arrange(result, groups)
    return Arrangement(tuple(result.shape), groups).apply(result)


def _entrywise(leader: ArrangedTensor, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Entry by entry, in place or not: plain operands are turned to fit the base."""

    def own(x: Any) -> Any:
        if isinstance(x, ArrangedTensor) and x.arrangement == leader.arrangement:
            return x.base
        if isinstance(x, SparseTensor):
            raise _DoesNotFit
        if not isinstance(x, Tensor) or not x.dim():
            return x
        if torch.broadcast_shapes(x.shape, leader.shape) != leader.shape:
            raise _DoesNotFit
        return leader.arrangement.undo(x)

    try:
        result = func(*map(own, args), **{key: own(x) for key, x in kwargs.items()})
    except _DoesNotFit:
        return NotImplemented if is_in_place(name, kwargs) else elementwise.broadcast(func, args, kwargs)
    return args[0] if is_in_place(name, kwargs) else _shown(result, leader.arrangement.groups)


class _DoesNotFit(Exception):
    """An operand is arranged in another way."""


def _reduce(tensor: ArrangedTensor, name: str, func: Any, dim: Any, keepdim: bool, options: dict[str, Any]) -> Any:
    """A reduction over shown dimensions, as one over the base's."""
    if dim is None:
        return NotImplemented if name.startswith("arg") else func(tensor.base, **options)
    dims = slicing.dimensions(tensor, dim)
    own = tensor.arrangement.own_dims(dims)
    if not own:
        kept = name in ("sum", "mean", "amax", "amin")
        return (tensor if keepdim else tensor.squeeze(tuple(dims))) if kept else NotImplemented
    if len(own) > 1 and name in ("max", "min", "argmax", "argmin"):
        return NotImplemented
    result = func(tensor.base, dim=own[0] if len(own) == 1 else own, keepdim=True, **options)
    shown = _shown(result, tensor.arrangement.groups)
    if keepdim:
        return shown
    return type(shown)([x.squeeze(tuple(dims)) for x in shown]) if isinstance(shown, tuple) else shown.squeeze(tuple(dims))


def _topk(tensor: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Along one dimension, or along several merged ones that end with the keys (the greatest entries of a head)."""
    base, groups = tensor.base, tensor.arrangement.groups
    (shown,) = slicing.dimensions(tensor, dim)
    group = groups[shown]
    if len(group) == 1:
        return _shown(base.topk(k, group[0], largest, sorted), groups)
    if not group or list(group) != list(range(group[0], base.dim())):
        return NotImplemented
    rows = base.topk(min(k, base.shape[-1]), -1, largest, sorted)
    sizes = [base.shape[d] if d in group[:-1] else 1 for d in range(base.dim())]
    first = torch.arange(0, tensor.shape[shown], base.shape[-1], device=tensor.device).view(sizes)
    values, positions = (_shown(x, groups) for x in (rows.values, first + rows.indices))
    best = values.topk(k, shown, largest, sorted)
    return torch.return_types.topk((best.values, positions.gather(shown, best.indices)))


def index(tensor: SparseTensor, key: Any) -> Any:
    """`tensor[key]` for an index of ints, slices, Ellipsis and None; NotImplemented for others."""
    arranged = tensor if isinstance(tensor, ArrangedTensor) else None
    base = tensor if arranged is None else arranged.base
    plan = (Arrangement.plain(tuple(tensor.shape)) if arranged is None else arranged.arrangement).index(key)
    return NotImplemented if plan is None else _shown(base[plan[0]], plan[1])


def _picked(tensor: ArrangedTensor, pick: Callable[[Tensor], Tensor]) -> Picked | JoinedEntries | None:
    """Single entries of what is shown; None where their coordinates would take too much memory."""
    base = tensor.base
    if not isinstance(base, BlockSparseTensor | JoinedTensor) or (tensor.arrangement.merges and tensor.numel() > MAX_WINDOW):
        return None

    def own(grid: Tensor) -> Tensor:
        return pick(tensor.arrangement.apply(grid))

    return Picked(base, own) if isinstance(base, BlockSparseTensor) else JoinedEntries(base, own)


def _getitem(tensor: Any, key: Any) -> Any:
    if not isinstance(tensor, ArrangedTensor):
        return NotImplemented
    found = index(tensor, key)
    if found is NotImplemented and isinstance(key, slice) and 0 not in tensor.row_and_key_dims() and range(len(tensor))[key]:
        from tl_stream.tensors.stacked import StackedTensor

        members: Any = tensor
        return StackedTensor(tuple(members[i] for i in range(len(tensor))[key]))  # of views, through which writes go
    picked = _picked(tensor, lambda shown: shown[key]) if found is NotImplemented else None
    return found if picked is None else picked.read()


def _setitem(tensor: Any, key: Any, value: Any) -> Any:
    if not isinstance(tensor, ArrangedTensor):
        tensor[key] = value.to_dense()
        return None
    plan = tensor.arrangement.index(key)
    if plan is None:
        picked = _picked(tensor, lambda shown: shown[key])
        return NotImplemented if picked is None or isinstance(value, SparseTensor) else picked.write(value)
    if isinstance(value, ArrangedTensor) and value.arrangement.groups == plan[1]:
        value = value.base
    elif isinstance(value, Tensor) and value.dim():
        value = Arrangement(tuple(tensor.base[plan[0]].shape), plan[1]).undo(value)
    tensor.base[plan[0]] = value
    return None


def _diagonal(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    picked = _picked(tensor, lambda shown: shown.diagonal(*args, **kwargs))
    return NotImplemented if picked is None else SliceView.of(picked)


def _clone(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return ArrangedTensor(tensor.base.clone(), tensor.arrangement)


def _put_together(name: str) -> Callable[..., Any]:
    """`stack` or `cat`."""

    def handler(*args: Any, **kwargs: Any) -> Any:
        from tl_stream.tensors import stacked

        return getattr(stacked, name)(*args, **kwargs)

    return handler


_HANDLERS: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "diagonal": _diagonal,
    "topk": _topk,
    "stack": _put_together("stack"),
    "cat": _put_together("cat"),
    "clone": _clone,
    "contiguous": _clone,
    "deepcopy": _clone,
    "dropout": attention_ops.HANDLERS["dropout"],
    **everywhere.HANDLERS,
}

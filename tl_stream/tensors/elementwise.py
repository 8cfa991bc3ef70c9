"""Operations entry by entry: the function itself, applied to the kept values and to the fill value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors import indexing
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.names import IN_PLACE_OPERATORS
from tl_stream.tensors.outside import Outside, after
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.wrapper import SparseTensor

_BASE = {
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "pow", "neg", "negative",
    "abs", "absolute", "exp", "log", "log2", "log10", "log1p", "expm1", "sqrt", "rsqrt", "square", "reciprocal", "sign",
    "sigmoid", "tanh", "relu", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num", "masked_fill", "where", "maximum",
    "minimum", "lerp", "xlogy", "isnan", "isinf", "isfinite", "logical_not", "logical_and", "logical_or", "bitwise_and",
    "bitwise_or", "bitwise_not", "eq", "ne", "gt", "ge", "lt", "le", "zeros_like", "ones_like", "full_like", "round",
    "floor", "ceil", "isclose", "special_entr", "special_xlogy", "remainder", "fmod", "exp2", "trunc", "logaddexp", "erf",
}  # fmt: skip
_OPERATORS = {
    "radd", "rsub", "rmul", "rdiv", "truediv", "rtruediv", "floordiv", "rpow", "invert", "and", "or", "rand", "ror",
}  # fmt: skip
NAMES = _BASE | _OPERATORS


def run(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` entry by entry; NotImplemented where the result is not one value everywhere outside the kept blocks."""
    sparse = [x for x in (*args, *kwargs.values()) if isinstance(x, BlockSparseTensor)]
    leader = next((x for x in sparse if x.dtype.is_floating_point), sparse[0])
    if any(x._data.is_complete for x in sparse):
        raise NotImplementedError(
            f"{name}: the model does this between its hook points and the next step of its attention, where it would not reach "
            "what was not recorded; it can't run with forward='exact'."
        )
    if name.endswith("_like"):
        return _constant(leader, func, args, kwargs)
    if name == "isnan" and _never_nan(leader):
        return _uniform(leader, False, torch.bool)
    if name == "where" and len(args) == 3:
        picked = _uniform_choice(*args)
        if picked is not None:
            return picked
    if name in ("masked_fill", "where") and any(x._data.hides_entries for x in sparse) and len(sparse) == 1:
        raise NotImplementedError(
            f"{name}: with forward='exact' it would not reach what was not recorded. Assign x[..., keys] = value (or x[mask] = "
            "value), which records what it writes to."
        )
    if any(x.shape != leader.shape for x in sparse):
        return broadcast(func, args, kwargs)
    if any(not _aligned(leader, x) for x in sparse):
        return NotImplemented
    if any(isinstance(x, Tensor) and _too_large(x, leader) for x in (*args, *kwargs.values())):
        return NotImplemented
    layout = _common_layout([x._narrow_layout() for x in sparse])
    values = {id(x): _values_on(x, layout) for x in sparse}

    def at_blocks(x: Any) -> Any:
        if isinstance(x, BlockSparseTensor):
            return values[id(x)]
        return _to_blocks(x, leader, layout) if isinstance(x, Tensor) and x.dim() else x

    fill = _fill(func, args, kwargs, values)
    if fill is None:
        return NotImplemented
    result = func(*map(at_blocks, args), **{key: at_blocks(x) for key, x in kwargs.items()})
    watches = tuple(dict.fromkeys(each for x in sparse for each in x._data.watches))
    outside = after(name, args, kwargs, leader) if leader.origin.is_exact else None
    return leader.with_data(BlockData(layout, fill, leader._data.origin, result, watches=watches, outside=outside))


def run_in_place(name: str, args: tuple, kwargs: dict) -> Any:
    """`x.mul_(...)` and `x *= ...` as the plain operation, written back; NotImplemented where that is not known."""
    target = args[0]
    base = IN_PLACE_OPERATORS.get(name, name[:-1])
    if not isinstance(target, BlockSparseTensor):
        return NotImplemented
    if base in ("zero", "fill"):
        indexing.write(target, ..., args[1] if base == "fill" else 0)
        return target
    if base in ("copy", "tril", "triu"):
        indexing.write(target, ..., args[1] if base == "copy" else getattr(target, base)(*args[1:], **kwargs))
        return target
    if base not in _BASE:
        return NotImplemented
    target._data.check_writable()
    with torch.set_grad_enabled(torch.is_grad_enabled() or target._data.in_graph):
        result = run(base, getattr(Tensor, base), args, kwargs)
    if result is NotImplemented:
        return NotImplemented
    whole = target._view.is_whole(target._data.layout.shape) and not target._detached
    if whole and result._data.layout is target._data.layout:
        target._data.values, target._data.fill = result._data.values.to(target.dtype), result.fill
        target._data.outside = result._data.outside
        target._data.version += 1
    else:
        indexing.write(target, ..., result)
    return target


def empty_layout(layout: BlockLayout) -> BlockLayout:
    """A layout of the same shape that keeps nothing."""
    shape = (layout.batch, layout.n_heads, layout.n_q_blocks)
    indices = torch.zeros(*shape, 0, dtype=torch.int32, device=layout.device)
    number = torch.zeros(shape, dtype=torch.int32, device=layout.device)
    return BlockLayout(indices, number, layout.mask, layout.block_q, layout.block_k, layout.batch, layout.n_heads)


def _constant(leader: BlockSparseTensor, func: Any, args: tuple, kwargs: dict) -> Any:
    """`zeros_like` and its kin: one value everywhere, nothing kept."""
    sample = func(torch.empty(1, dtype=leader.dtype, device=leader.device), *args[1:], **kwargs)
    return _uniform(leader, sample.item(), sample.dtype)


def _uniform(leader: BlockSparseTensor, value: Any, dtype: torch.dtype) -> BlockSparseTensor:
    layout = empty_layout(leader._narrow_layout())
    shape = (layout.batch, layout.n_heads, layout.n_q_blocks, layout.block_q, 0)
    values = torch.zeros(shape, dtype=dtype, device=layout.device)
    outside = Outside(leader._data.edits.of, 0.0, float(value)) if leader.origin.is_exact else None
    return leader.with_data(BlockData(layout, value, leader._data.origin, values, outside=outside))


def _never_nan(tensor: BlockSparseTensor) -> bool:
    """A pattern as the softmax gave it: that gives 0, never NaN, for a row that reads nothing."""
    data = tensor._data
    return (isinstance(data, PatternData) or data.rest is not None) and data.version == 0


def broadcast(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` of sparse tensors that differ in texts or heads, as of a mean over heads, expanded; NotImplemented else."""
    shapes = {x.shape for x in (*args, *kwargs.values()) if isinstance(x, SparseTensor)}
    if len(shapes) == 1 or len({shape[-2:] for shape in shapes}) > 1:
        return NotImplemented
    shape = torch.broadcast_shapes(*shapes)

    def expanded(x: Any) -> Any:
        return x.expand(shape) if isinstance(x, SparseTensor) else x

    return func(*map(expanded, args), **{key: expanded(x) for key, x in kwargs.items()})


def _uniform_choice(condition: Any, chosen: Any, other: Any) -> Any:
    """`where` under a condition that is the same everywhere: one of its arguments as it is."""
    if not isinstance(condition, BlockSparseTensor) or condition._data.layout.is_full or condition._data.layout.n_slots:
        return None
    picked = chosen if condition.fill else other
    return picked if isinstance(picked, BlockSparseTensor) and picked.shape == condition.shape else None


def _aligned(leader: BlockSparseTensor, other: BlockSparseTensor) -> bool:
    a, b = leader._data.layout, other._data.layout
    same_blocks = (a.block_q, a.block_k, a.seq_lengths) == (b.block_q, b.block_k, b.seq_lengths)
    return same_blocks and leader.shape == other.shape and leader._view.rows == other._view.rows


def _too_large(x: Tensor, leader: BlockSparseTensor) -> bool:
    """Whether broadcasting with `x` would give another shape than `leader`'s."""
    if isinstance(x, BlockSparseTensor):
        return False
    return torch.broadcast_shapes(x.shape, leader.shape) != leader.shape


def _common_layout(layouts: list[BlockLayout]) -> BlockLayout:
    common = layouts[0]
    for layout in layouts[1:]:
        if layout.kv_indices is not common.kv_indices:
            common = common.union(layout)
    return common


def _values_on(tensor: BlockSparseTensor, layout: BlockLayout) -> Tensor:
    own = tensor._narrow_layout()
    if own.kv_indices is layout.kv_indices:
        return tensor.shown_values()
    return tensor.shown_values(layout)


def _to_blocks(x: Tensor, leader: BlockSparseTensor, layout: BlockLayout) -> Tensor:
    """A dense tensor that broadcasts against `leader`, at the kept entries."""
    full = x.as_subclass(Tensor).expand(leader.shape)
    if isinstance(leader._view.head, int):
        full = full.unsqueeze(-3)
    if isinstance(leader._view.batch, int):
        full = full.unsqueeze(0)
    rows = leader._view.rows
    batch = torch.arange(layout.batch, device=x.device)[:, None, None, None, None]
    head = torch.arange(layout.n_heads, device=x.device)[:, None, None, None]
    queries = (layout.query_positions() - rows.start).clamp(0, len(rows) - 1)[:, :, None]
    keys = layout.key_positions().clamp(max=layout.mask.key_length - 1)[:, :, :, None]
    return full[batch, head, queries, keys]


def _fill(func: Any, args: tuple, kwargs: dict, values: dict[int, Tensor]) -> float | bool | None:
    """What `func` makes of the fill value; None where that depends on the place."""

    def outside(x: Any) -> Any:
        if isinstance(x, BlockSparseTensor):
            like = values[id(x)]
            return torch.full((1,), x.fill, dtype=like.dtype, device=like.device)
        return x.detach() if isinstance(x, Tensor) else x

    with torch.no_grad():
        result = func(*map(outside, args), **{key: outside(x) for key, x in kwargs.items()})
    first = result.reshape(-1)[:1]
    same = (result == first) | (result.isnan() & first.isnan())
    return first.item() if bool(same.all()) else None

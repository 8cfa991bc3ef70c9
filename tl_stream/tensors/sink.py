"""Attention sinks (GPT-OSS): one learned logit a head joins the softmax as a further key column, then is dropped.

The model does that with `cat`, a stabilising subtraction of the row maximum, softmax and `[..., :-1]`. Here the column stays
beside the sparse scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors import stacked
from tl_stream.tensors.attention_ops import pattern_of
from tl_stream.tensors.block_sparse import BlockSparsePattern, BlockSparseScores
from tl_stream.tensors.joined import JoinedTensor, join, parts_of
from tl_stream.tensors.wrapper import Wrapper


class WithSink(Wrapper):
    """Scores or a pattern with one more key column, logically [batch, head_index, query_pos, key_pos + 1]."""

    what = "sparse scores with a sink column"
    advice = "edit them in hook_attn_scores"
    sparse: BlockSparseScores | BlockSparsePattern | JoinedTensor
    column: Float[Tensor, "batch head_index query_pos 1"] | None

    @staticmethod
    def __new__(cls, sparse: Any, column: Tensor | None) -> WithSink:
        """`sparse` beside `column` (None: not needed any more)."""
        shape = (*sparse.shape[:-1], sparse.shape[-1] + 1)
        self = cls.empty(shape, sparse.dtype, sparse.device)
        self.sparse, self.column = sparse, column
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _HANDLERS[name](*args, **kwargs) if name in _HANDLERS else NotImplemented


class _RowMaximum(Tensor):
    """The maximum of each row, which is only ever subtracted: a softmax doesn't change by that, so it isn't computed."""


def cat(tensors: Any, dim: int = 0) -> Any:
    """`torch.cat`, of scores and a sink column (`dim=-1`) or of sparse tensors."""
    with_column = _beside_column(tensors, dim)
    return stacked.cat(tensors, dim) if with_column is NotImplemented else with_column


def _beside_column(tensors: Any, dim: int) -> Any:
    if len(tensors) != 2 or dim not in (-1, 3) or not isinstance(tensors[0], BlockSparseScores | JoinedTensor):
        return NotImplemented
    scores, column = tensors
    whole = all(part._view.is_whole(part._data.layout.shape) for part in parts_of(scores))
    if column.shape != (*scores.shape[:-1], 1) or not whole:
        return NotImplemented
    return WithSink(scores, column)


def _max(scores: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim != -1 or not keepdim:
        return NotImplemented
    maximum = torch.zeros(1, dtype=scores.dtype, device=scores.device).as_subclass(_RowMaximum)
    return torch.return_types.max((maximum, torch.zeros(1, dtype=torch.long)))


def _sub(scores: Any, maximum: Any) -> Any:
    return scores if isinstance(maximum, _RowMaximum) else NotImplemented


def _softmax(scores: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, 3) or scores.column is None:
        return NotImplemented
    parts = parts_of(scores.sparse)
    columns = scores.column.split([part.shape[-2] for part in parts], -2)
    found = [pattern_of(part, dtype or scores.dtype, sink=column) for part, column in zip(parts, columns, strict=True)]
    return WithSink(join(found), None)


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return WithSink(tensor.sparse.to(*args, **kwargs), None) if tensor.column is None else NotImplemented


def _getitem(tensor: Any, key: Any) -> Any:
    dropped = key == (..., slice(None, -1)) and tensor.column is None
    return tensor.sparse if dropped else NotImplemented


_HANDLERS: dict[str, Callable[..., Any]] = {"max": _max, "sub": _sub, "softmax": _softmax, "to": _to, "getitem": _getitem}

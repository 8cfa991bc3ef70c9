"""Scores whose batch and heads are merged, [batch * head_index, query_pos, key_pos], as XGLM computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tl_stream.tensors.wrapper import Wrapper


class MergedScores(Wrapper):
    """Logically [batch * head_index, query_pos, key_pos]; can be split again, or take a softmax.

    Attributes:
        heads: The same `AttentionScores` with their heads apart.
    """

    what = "attention scores with batch and heads merged"
    advice = "edit them in hook_attn_scores"
    heads: Wrapper

    @staticmethod
    def __new__(cls, heads: Any) -> MergedScores:
        """`heads` with its first two dimensions merged."""
        self = cls.empty((heads.shape[0] * heads.shape[1], *heads.shape[2:]), heads.dtype, heads.device)
        self.heads = heads
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _HANDLERS[name](*args, **kwargs) if name in _HANDLERS else NotImplemented


def view(heads: Any, *shape: Any) -> Any:
    """`heads.view(...)`: of the same shape, or with batch and heads merged."""
    if _asks_for(shape, heads.shape):
        return heads
    merged = (heads.shape[0] * heads.shape[1], *heads.shape[2:])
    return MergedScores(heads) if _asks_for(shape, merged) else NotImplemented


def _asks_for(given: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    sizes = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    return len(sizes) == len(shape) and all(size in (known, -1) for size, known in zip(sizes, shape, strict=True))


def _split(merged: MergedScores, *shape: Any) -> Any:
    return view(merged.heads, *shape)


def _softmax(merged: MergedScores, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if dim not in (-1, 2):
        return NotImplemented
    return torch.nn.functional.softmax(merged.heads, -1, *args, **kwargs).reshape(merged.shape)


_HANDLERS: dict[str, Callable[..., Any]] = {**dict.fromkeys(("view", "reshape"), _split), "softmax": _softmax}

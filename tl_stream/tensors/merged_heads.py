"""A pattern whose batch and heads were merged, [batch * head_index, query_pos, key_pos], as BLOOM and Falcon weigh values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_stream.tensors.attention_ops import product
from tl_stream.tensors.block_sparse import BlockSparsePattern
from tl_stream.tensors.wrapper import Wrapper


class MergedHeads(Wrapper):
    """Logically [batch * head_index, query_pos, key_pos]; only its product with values is known."""

    what = "a sparse pattern with batch and heads merged"
    advice = "edit it in hook_pattern"
    pattern: BlockSparsePattern

    @staticmethod
    def __new__(cls, pattern: BlockSparsePattern) -> MergedHeads:
        """`pattern` with its first two dimensions merged."""
        shape = (pattern.shape[0] * pattern.shape[1], *pattern.shape[2:])
        self = cls.empty(shape, pattern.dtype, pattern.device)
        self.pattern = pattern
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _weigh(*args) if name in ("matmul", "bmm") else NotImplemented


def _weigh(merged: MergedHeads, v: Tensor) -> Any:
    z = product(merged.pattern, v.unflatten(0, merged.pattern.shape[:2]), transposed=False)
    return z if z is NotImplemented else z.flatten(0, 1)


def merge(pattern: Any, *shape: Any) -> MergedHeads | None:
    """`pattern.reshape(batch * head_index, query_pos, key_pos)`; None where something else is asked for."""
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not isinstance(pattern, BlockSparsePattern) or pattern.dim() != 4 or len(shape) != 3:
        return None
    merged = (pattern.shape[0] * pattern.shape[1], *pattern.shape[2:])
    same = all(given in (size, -1) for given, size in zip(shape, merged, strict=True))
    return MergedHeads(pattern) if same else None

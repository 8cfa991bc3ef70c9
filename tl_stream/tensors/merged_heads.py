"""A pattern whose batch and heads were merged, [batch * head_index, query_pos, key_pos], as BLOOM and Falcon weigh values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors.attention_ops import matmul
from tl_stream.tensors.block_sparse import _METADATA, BlockSparsePattern
from tl_stream.tensors.names import function_name


class MergedHeads(Tensor):
    """Logically [batch * head_index, query_pos, key_pos]; only its product with values is known."""

    pattern: BlockSparsePattern

    @staticmethod
    def __new__(cls, pattern: BlockSparsePattern) -> MergedHeads:
        """`pattern` with its first two dimensions merged."""
        shape = (pattern.shape[0] * pattern.shape[1], *pattern.shape[2:])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=pattern.dtype, device=pattern.device)
        self.pattern = pattern
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name not in ("matmul", "bmm"):
            raise NotImplementedError(
                f"{name}() is not known on a sparse pattern with batch and heads merged; edit it in hook_pattern."
            )
        return _weigh(*args)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} needs the dense attention pattern, which is never made.")


def _weigh(merged: MergedHeads, v: Tensor) -> Tensor:
    z = matmul(merged.pattern, v.unflatten(0, merged.pattern.shape[:2]))
    if z is NotImplemented:
        raise NotImplementedError(f"matmul of a pattern {tuple(merged.shape)} with values {tuple(v.shape)} is not known.")
    return z.flatten(0, 1)


def merge(pattern: Any, *shape: Any) -> MergedHeads | None:
    """`pattern.reshape(batch * head_index, query_pos, key_pos)`; None where something else is asked for."""
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not isinstance(pattern, BlockSparsePattern) or pattern.dim() != 4 or len(shape) != 3:
        return None
    merged = (pattern.shape[0] * pattern.shape[1], *pattern.shape[2:])
    same = all(given in (size, -1) for given, size in zip(shape, merged, strict=True))
    return MergedHeads(pattern) if same else None

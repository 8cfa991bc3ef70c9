"""Operations that go by where an entry stands: triangles, the diagonal, and the list of entries that aren't 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.reductions import row_keys


def _triangle(lower: bool) -> Callable[..., Any]:
    """tril or triu: 0 above or below a diagonal."""

    def handler(tensor: Any, diagonal: int = 0) -> Any:
        if tensor.fill != 0:
            return NotImplemented
        layout, rows = tensor.block_layout, tensor._view.rows
        queries = (layout.query_positions() - rows.start)[:, :, None]
        distance = layout.key_positions()[:, :, :, None] - queries
        values = tensor.shown_values().masked_fill(distance > diagonal if lower else distance < diagonal, 0)
        return tensor.with_data(BlockData(layout, tensor.fill, tensor._data.origin, values, watches=tensor._data.watches))

    return handler


def _fill_diagonal(tensor: Any, value: Any, wrap: bool = False) -> Any:
    """`fill_diagonal_` of one head."""
    if tensor.dim() != 2 or wrap:
        return NotImplemented
    index = torch.arange(min(tensor.shape), device=tensor.device)
    tensor[index, index] = value
    return tensor


def nonzero(tensor: Any, *, as_tuple: bool = False) -> Any:
    """Indices of the entries that are not 0, in order: `[entry, dim]`, or one tensor a dimension."""
    if not isinstance(tensor, BlockSparseTensor) or tensor.fill != 0:
        return NotImplemented
    keys, real = row_keys(tensor)
    found = (real & (tensor.row_values() != 0)).nonzero()
    found[:, -1] = keys[tuple(found.unbind(-1))]
    return found.unbind(-1) if as_tuple else found


HANDLERS: dict[str, Callable[..., Any]] = {
    "tril": _triangle(True),
    "triu": _triangle(False),
    "fill_diagonal_": _fill_diagonal,
    "nonzero": nonzero,
    "argwhere": nonzero,
}

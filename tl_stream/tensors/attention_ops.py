"""The two steps that the model itself takes: softmax of the scores, and pattern @ v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors import backward_hooks, gradients
from tl_stream.tensors.block_sparse import BlockSparsePattern, BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.mask_tensor import MaskTensor
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.products import Origin
from tl_stream.tensors.rest import Rest, block_softmax
from tl_stream.tensors.scores_data import ScoresData
from tl_stream.tensors.transposed import transposed_matmul


def softmax(scores: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    """Softmax over the kept keys of each row; lazy as long as nobody wrote to the scores."""
    if dim not in (-1, scores.dim() - 1) or scores.fill != -torch.inf:
        return NotImplemented
    return pattern_of(scores, dtype or scores.dtype)


def pattern_of(scores: BlockSparseTensor, dtype: torch.dtype, sink: Tensor | None = None) -> BlockSparsePattern:
    """The softmax of scores, with a sink logit `[batch, head_index, query_pos, 1]` beside the keys or without."""
    data = scores._selected()
    view = scores._view if data is scores._data else scores._view.on(data.layout.batch, data.layout.n_heads)
    pattern: BlockData
    rest = data.find_rest() if data.is_complete else None
    if isinstance(data, ScoresData) and data.version == 0 and data.rest is None:
        data.follow()
        products = data.products.detach() if scores._detached else data.products
        products = products if sink is None else replace(products, sink=sink)
        pattern = PatternData(data.layout, 0.0, data.origin, is_exact=rest is not None).of(products)
        for each in [] if scores._detached else data.lineage:
            each.patterns = (*each.patterns, pattern) if each.is_lazy else ()
    else:
        pattern = BlockData(data.layout, 0.0, data.origin)
    if not data.is_lazy or data.rest is not None:
        values = data.block_values()
        values = values.detach() if scores._detached else backward_hooks.at_use(data, values)
        if rest is None:
            pattern.values, _ = block_softmax(values, data.layout, sink)
        else:
            _beside(rest.with_sink(sink), values, pattern)
    return BlockSparsePattern(pattern, view, dtype, scores._detached)


def _beside(rest: Rest, scores: Tensor, pattern: BlockData) -> None:
    """Let `pattern` be the softmax of `scores` on its blocks and of what the model reads outside them."""
    pattern.values, lse = block_softmax(scores, pattern.layout, rest.logit(pattern.layout))
    if isinstance(pattern, PatternData):
        pattern.lse_in_graph = lse
    else:
        pattern.rest = replace(rest, lse=lse)


def product(pattern: BlockSparseTensor, x: Tensor, transposed: bool) -> Any:
    """`pattern @ x` or `pattern.mT @ x` over the kept entries; NotImplemented where the shapes don't fit."""
    lead, n_rows = pattern.shape[:-2], pattern.shape[-2 if transposed else -1]
    if pattern.fill != 0 or x.shape[-2] != n_rows or torch.broadcast_shapes(x.shape[:-2], lead) != lead:
        return NotImplemented
    return transposed_matmul(pattern, x) if transposed else _weigh(pattern, x)


def _weigh(pattern: BlockSparseTensor, v: Tensor) -> Tensor:
    """`pattern @ v`, without the pattern's values where they were not written to."""
    data = pattern._selected()
    layout = data.layout
    full = v
    if isinstance(pattern._view.head, int):
        full = full.unsqueeze(-3)
    if isinstance(pattern._view.batch, int):
        full = full.unsqueeze(0)
    check_numbers("v", v, data.origin)
    full = full.expand(layout.batch, layout.n_heads, *full.shape[-2:])
    z = gradients.weigh(data, full, pattern._detached)
    rows = pattern._view.rows
    return pattern.drop_indexed(z[:, :, rows.start : rows.stop]).to(torch.promote_types(pattern.dtype, v.dtype))


def check_numbers(name: str, x: Tensor, origin: Origin) -> None:
    """Raise ValueError where x holds NaN."""
    if x.numel() and bool(x.amax().isnan()):
        raise ValueError(
            f"{name} of layer {origin.layer} holds NaN; expected numbers. Look for NaN in the weights, in the input, or in "
            "what a hook returned."
        )


def _dropout(pattern: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise NotImplementedError(
            f"dropout: the model is in training mode with an attention dropout of {p}; call model.eval() before tracing."
        )
    return pattern


def _masked_fill(pattern: Any, where: Any, value: Any) -> Any:
    """Filling what the mask hides with what stands there changes nothing."""
    hidden = isinstance(where, MaskTensor) and where.hides and value == getattr(pattern, "fill", None)
    return pattern if hidden else NotImplemented


HANDLERS: dict[str, Callable[..., Any]] = {
    "softmax": softmax,
    "dropout": _dropout,
    "masked_fill": _masked_fill,
}

"""The full softmax of a run's own q and k: single rows of it, and how much of it the kept keys hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.products import Products


@torch.no_grad()
def retained_mass(pattern: BlockSparseTensor) -> Float[Tensor, "*batch_and_head query_pos"]:
    """See `BlockSparseTensor.retained_mass`: exp(lse over the kept keys - lse over all keys that the mask allows)."""
    data, products = recomputable(pattern)
    rows = pattern._view.rows
    share = _share_of_record(data, products, rows) if data.is_exact else _share(data, products, rows)
    return pattern.drop_indexed(share.nan_to_num(1.0))  # a row that may read nothing loses nothing


def kept_lse(pattern: BlockSparseTensor | JoinedTensor) -> Float[Tensor, "batch head_index query_pos"]:
    """Log-sum-exp of every row over its kept keys, sink included."""
    if isinstance(pattern, JoinedTensor):
        return torch.cat([kept_lse(part) for part in pattern.parts], -1)
    data, products = recomputable(pattern)
    return products.attend(products.k[..., :0], data.layout, "gather")[1] if data.is_exact else data.row_lse()


def _share_of_record(data: PatternData, products: Products, rows: range) -> Tensor:
    """Of rows whose full log-sum-exp was recorded."""
    _, kept = replace(products, sink=None).attend(products.k[..., :0], data.layout, "gather")
    return (kept - data.row_lse()).exp()[:, :, rows.start : rows.stop]


def _share(data: PatternData, products: Products, rows: range) -> Tensor:
    """Of rows whose kept keys' log-sum-exp was recorded."""
    layout = data.layout
    kept = data.row_lse()[:, :, rows.start : rows.stop]
    if layout.is_full:
        return torch.ones_like(kept)
    mask = layout.mask.part(rows, range(layout.mask.key_length))
    full = BlockLayout.full(mask, layout.block_q, layout.block_k, layout.batch, layout.n_heads)
    _, everything = products.rows(rows).attend(products.k[..., :0], full, "gather")
    return (kept - everything).exp()


@torch.no_grad()
def exact_rows(pattern: BlockSparseTensor | JoinedTensor, rows: Sequence[int]) -> Float[Tensor, "*batch_and_head row key_pos"]:
    """See `SparseActivationCache.exact_rows`."""
    if any(not 0 <= row < pattern.shape[-2] for row in rows):
        raise IndexError(f"rows were {list(rows)}; expected query positions from 0 to {pattern.shape[-2] - 1}.")
    if isinstance(pattern, JoinedTensor):
        own = [(part, row - placed.start) for row in rows for part, placed in pattern.shown if row in placed]
        return torch.cat([exact_rows(part, [row]) for part, row in own], -2)
    data, products = recomputable(pattern)
    layout = data.layout
    n_queries, n_keys = layout.seq_lengths
    shown = pattern._view.rows
    index = torch.tensor([shown[row] for row in rows], device=layout.device, dtype=torch.long)
    batch, head, query_pos, key_pos = torch.meshgrid(
        torch.arange(layout.batch, device=layout.device),
        torch.arange(layout.n_heads, device=layout.device),
        index,
        torch.arange(n_keys, device=layout.device),
        indexing="ij",
    )
    scores = products.scores_at(*(grid.flatten() for grid in (batch, head, query_pos, key_pos))).view(batch.shape)
    scores = scores.masked_fill(~layout.mask.allows(batch, query_pos, key_pos), -torch.inf)
    if products.sink is not None:
        sink = products.sink.expand(layout.batch, layout.n_heads, n_queries, 1)[:, :, index]
        scores = torch.cat([scores, sink.to(scores)], -1)
    full = scores.softmax(-1)[..., :n_keys].nan_to_num(0.0)
    return pattern.drop_indexed(full)


def recomputable(pattern: BlockSparseTensor) -> tuple[PatternData, Products]:
    """Data and products of the batch elements and heads that a pattern shows; TypeError where it was written to."""
    data = pattern._selected()
    if not isinstance(data, PatternData) or pattern._data.version:
        raise TypeError("This needs a pattern that can be recomputed from q and k; this one was written to.")
    return data, data.products

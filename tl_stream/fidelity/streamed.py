"""Two runs' patterns compared row by row, from full softmax rows made a few at a time: exact, in O(T) memory.

O(T) time a row and head: O(T^2) over all rows. `blocks` takes some query blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from tl_stream.audit.rows import SoftmaxRows

ENTRIES = 32  # the keys a row reads most, whose recall is measured


@dataclass(frozen=True, eq=False)
class PatternComparison:
    """A layer's patterns, dense and sparse. `row` runs over the rows compared.

    Attributes:
        rows: Their query positions.
        counted: Which of them count: those that are no padding and read something.
        retained: Share of the dense model's row that lies on blocks the sparse run kept; what a sink logit takes is not lost.
        entries: Share of the `ENTRIES` keys the dense row reads most (fewer where it may read fewer) that were kept.
        top_kept: Whether the key that the dense row reads most was kept.
        top_same: Whether it is also the one that the sparse row reads most.
        cosine: Cosine similarity of the dense and the sparse row.
        blocks: For each query block, the share that was kept of the key blocks with the greatest dense mass, taking as many
            of those as were kept.
    """

    rows: Int[Tensor, " row"]
    counted: Bool[Tensor, "batch row"]
    retained: Float[Tensor, "batch head_index row"]
    entries: Float[Tensor, "batch head_index row"]
    top_kept: Float[Tensor, "batch head_index row"]
    top_same: Float[Tensor, "batch head_index row"]
    cosine: Float[Tensor, "batch head_index row"]
    blocks: Float[Tensor, "batch head_index q_block"]


@torch.no_grad()
def compare_patterns(dense: SoftmaxRows, sparse: SoftmaxRows, blocks: Int[Tensor, " q_block"]) -> PatternComparison:
    """Compare the rows of some query blocks.

    Args:
        dense: The dense model's q and k.
        sparse: The sparse run's q, k and layout.
        blocks: Query blocks, ascending.
    """
    layout = sparse.layout
    positions = (blocks[:, None] * layout.block_q + torch.arange(layout.block_q, device=blocks.device)).flatten()
    rows = positions[positions < layout.mask.query_length]
    counted = sparse.counted()[:, rows]
    by_row, by_block = [], []
    for part in sparse.runs(rows, layout.block_q):
        full, kept = dense.softmax(dense.scores(part), part), sparse.kept(part)
        pruned = sparse.softmax(sparse.scores(part).masked_fill(~kept, -torch.inf), part)
        by_row.append(_row_measures(full, pruned, kept))
        weight = sparse.counted()[:, None, part, None]
        by_block.append(_block_recall(full * weight, kept, layout.block_q, layout.block_k))
    retained, entries, top_kept, top_same, cosine = torch.cat(by_row, -1)
    return PatternComparison(rows, counted, retained, entries, top_kept, top_same, cosine, torch.cat(by_block, -1))


def _row_measures(full: Tensor, pruned: Tensor, kept: Tensor) -> Float[Tensor, "measure batch head_index row"]:
    top = full.topk(min(ENTRIES, full.shape[-1]))
    read = top.values > 0
    found = (kept.gather(-1, top.indices) & read).sum(-1).to(full.dtype) / read.sum(-1).clamp(min=1)
    best = top.indices[..., :1]
    same = pruned.argmax(-1, keepdim=True) == best
    measures = (
        1.0 - full.masked_fill(kept, 0.0).sum(-1),
        found,
        kept.gather(-1, best)[..., 0],
        same[..., 0],
        cosine_similarity(full, pruned, dim=-1, eps=torch.finfo(full.dtype).tiny),
    )
    return torch.stack([x.to(full.dtype) for x in measures])


def _block_recall(full: Tensor, kept: Tensor, block_q: int, block_k: int) -> Float[Tensor, "batch head_index q_block"]:
    """How many of the n key blocks with the greatest mass were kept, of n kept ones with any mass."""
    rows, keys = -full.shape[2] % block_q, -full.shape[3] % block_k
    mass = pad(full, (0, keys, 0, rows)).unflatten(2, (-1, block_q)).unflatten(-1, (-1, block_k)).sum((3, 5))
    last_rows = torch.arange(block_q - 1, full.shape[2] + rows, block_q, device=full.device).clamp(max=full.shape[2] - 1)
    chosen = kept[:, :, last_rows, ::block_k]  # where any row of a block keeps everything (dense_queries), the last one does
    number = chosen.sum(-1, keepdim=True)
    order = mass.argsort(-1, descending=True)
    wanted = (torch.arange(mass.shape[-1], device=mass.device) < number) & (mass.gather(-1, order) > 0)
    found = (chosen.gather(-1, order) & wanted).sum(-1).to(full.dtype)
    some = wanted.sum(-1)
    return torch.where(some > 0, found / some.clamp(min=1), 1.0)

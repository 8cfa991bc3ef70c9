"""Scores some of whose keys are hidden from every row: -inf in these columns, without making the values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_stream.masking import NEVER
from tl_stream.tensors.block_sparse import BlockSparseScores, BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.scores_data import ScoresData


def hide_keys(scores: BlockSparseTensor | JoinedTensor, hidden: Bool[Tensor, "batch key_pos"]) -> Any:
    """The same scores with the `hidden` keys of each text at -inf, in all heads and rows.

    The keys become padding of the layout's mask, so that scores that nobody wrote to stay lazy. A row that may read nothing
    else attends to nothing: its softmax is 0 everywhere, where that of an ordinary tensor would be NaN. No gradients.

    Raises:
        ValueError: The scores are a record of full attention (`forward="exact"`), or a part of a tensor.
    """
    if isinstance(scores, JoinedTensor):
        return JoinedTensor(tuple(hide_keys(part, hidden) for part in scores.parts))
    data = scores._data
    if data.origin.is_exact or not scores._view.is_whole(data.layout.shape):
        raise ValueError("scores were a record of full attention, or a part; expected those that hook_attn_scores shows.")
    layout = replace(data.layout, mask=data.layout.mask.with_padding(~hidden))
    if isinstance(data, ScoresData) and data.is_lazy:
        return BlockSparseScores(ScoresData(layout, data.fill, data.origin).of(data.products.detach()), dtype=scores.dtype)
    gone = layout.placed_keys()[:, :, :, None] == NEVER
    values = data.block_values().detach().masked_fill(gone, -float("inf"))
    return BlockSparseScores(BlockData(layout, data.fill, data.origin, values), dtype=scores.dtype)

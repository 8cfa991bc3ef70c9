"""The clear reference: dense attention under `layout.to_dense()`. T x T memory; the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_stream import score_mod
from tl_stream.layout import BlockLayout
from tl_stream.score_mod import ScoreMod


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float,
    score_mods: Sequence[ScoreMod],
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `sparse_attention`."""
    scores = masked_scores(q, k, layout, scale=scale, score_mods=score_mods)
    if sink is None:
        sink = scores.new_full((1, 1, 1, 1), -torch.inf)
    with_sink = torch.cat([scores, sink.to(scores).expand(*scores.shape[:-1], 1)], -1)
    pattern = with_sink.softmax(-1)[..., :-1].nan_to_num(0.0)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (pattern @ v.to(pattern)).to(q.dtype), with_sink.logsumexp(-1)


def masked_scores(q: Tensor, k: Tensor, layout: BlockLayout, *, scale: float, score_mods: Sequence[ScoreMod]) -> Tensor:
    """Scores `[batch, head_index, query_pos, key_pos]`, `-inf` where the layout keeps nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    batch, head, rows, keys = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in layout.shape),
        indexing="ij",
    )
    scores = score_mod.apply(score_mods, scores, batch, head, rows, keys)
    return scores.masked_fill(~layout.to_dense(), -torch.inf)

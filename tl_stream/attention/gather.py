"""Block-sparse attention in plain torch: gather the kept key blocks, multiply, normalise. Linear memory.

For each run of query blocks: gather its keys and values, `s = q . k` with the model's scaling and score mods,
`-inf` where the mask forbids, `z = exp(s - max) @ v / sum(exp(s - max))`, in powers of 2. The backward pass recomputes
each run instead of keeping its scores. O(T * kept keys * d_head) time, O(T * d_head) memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tl_stream import score_mod
from tl_stream.attention.chunks import Chunk, chunks, whole
from tl_stream.layout import BlockLayout
from tl_stream.precision import outside_autocast
from tl_stream.score_mod import ScoreMod

LN_2 = math.log(2)


def gather_attention(
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
    sink = q.new_full((1, 1, 1, 1), -torch.inf) if sink is None else sink
    return _GatherAttention.apply(q, k, v, sink, layout, scale, tuple(score_mods))


@outside_autocast
def block_scores(
    q: Tensor, k: Tensor, layout: BlockLayout, *, scale: float, score_mods: Sequence[ScoreMod]
) -> Float[Tensor, "batch head_index q_block block_q key"]:
    """Scores of all kept blocks at once, `-inf` where the mask forbids; differentiable. O(T * kept keys) memory."""
    chunk = whole(layout)
    return _scores(chunk, chunk.cut_queries(q), select_keys(chunk, cut_keys(k, layout)), scale, score_mods)


def weigh_values(
    weights: Float[Tensor, "batch head_index q_block block_q key"], v: Tensor, layout: BlockLayout
) -> Float[Tensor, "batch head_index query_pos d_v"]:
    """`weights @ v`, for weights on all kept blocks."""
    chunk = whole(layout)
    return chunk.join_queries(weights @ select_keys(chunk, cut_keys(v, layout)).to(weights.dtype))


def value_products(
    grad_z: Float[Tensor, "batch head_index query_pos d_v"], v: Tensor, layout: BlockLayout
) -> Float[Tensor, "batch head_index q_block block_q key"]:
    """`grad_z @ v^T` on all kept blocks: the gradient of the pattern."""
    chunk = whole(layout)
    return chunk.cut_queries(grad_z) @ select_keys(chunk, cut_keys(v, layout)).to(grad_z.dtype).transpose(-1, -2)


def cut_keys(
    x: Float[Tensor, "batch kv_head_index key_pos d_head"], layout: BlockLayout
) -> Float[Tensor, "batch kv_head_index kv_block block_k d_head"]:
    """Keys or values in blocks, contiguous, the last block padded with zeros."""
    return pad(x, (0, 0, 0, -x.shape[2] % layout.block_k)).contiguous().unflatten(2, (-1, layout.block_k))


def select_keys(
    chunk: Chunk, blocks: Float[Tensor, "batch kv_head_index kv_block block_k d_head"]
) -> Float[Tensor, "batch head_index block key d_head"]:
    """The kept rows of `cut_keys` for each query block, by query head."""
    kv_heads = blocks.shape[1]
    if chunk.key_blocks is None:
        seen = blocks.flatten(2, 3)[:, :, : chunk.n_keys]
        return seen.repeat_interleave(chunk.layout.n_heads // kv_heads, 1)[:, :, None]
    rows = _flat_rows(chunk.key_blocks, kv_heads, blocks.shape[2])
    return blocks.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(3, 4)


class _GatherAttention(torch.autograd.Function):
    """Keeps q, k, v and the layout only; the backward pass recomputes chunk by chunk."""

    @staticmethod
    def forward(ctx, q, k, v, sink, layout, scale, score_mods):
        ctx.save_for_backward(q, k, v, sink)
        ctx.layout, ctx.scale, ctx.score_mods = layout, *_in_bits(scale, score_mods)
        k, v = cut_keys(k, layout), cut_keys(v, layout)
        wide = _wide(q)
        # In memory [batch, query_pos, head_index, d_v], as the model goes on with it.
        z = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(layout.shape[:3], dtype=wide)
        for chunk in chunks(layout, k.shape[-1] + v.shape[-1]):
            rows = slice(chunk.start, chunk.stop)
            part = _attend(chunk, chunk.cut_queries(q), select_keys(chunk, k), select_keys(chunk, v), sink, ctx)
            z[:, :, rows], lse[:, :, rows] = (chunk.join_queries(x) for x in part)
        return z, lse

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_z, grad_lse):
        q, k, v, sink = ctx.saved_tensors
        keys, values = cut_keys(k, ctx.layout), cut_keys(v, ctx.layout)
        grads = [torch.zeros_like(x, dtype=_wide(x)) for x in (q, keys, values, sink)]
        for chunk in chunks(ctx.layout, k.shape[-1] + v.shape[-1]):
            inputs = (chunk.cut_queries(q), select_keys(chunk, keys), select_keys(chunk, values), sink)
            with torch.enable_grad():
                q_rows, keys_kept, values_kept, logit = leaves = [x.detach().requires_grad_() for x in inputs]
                outputs = _attend(chunk, q_rows, keys_kept, values_kept, logit, ctx)
            outer = chunk.cut_queries(grad_z), chunk.cut_queries(grad_lse)
            parts = torch.autograd.grad(outputs, leaves, outer, materialize_grads=True)
            grads[0][:, :, chunk.start : chunk.stop] = chunk.join_queries(parts[0])
            _scatter_keys(chunk, grads[1], parts[1])
            _scatter_keys(chunk, grads[2], parts[2])
            grads[3] += parts[3]
        grads[1:3] = (grad.flatten(2, 3)[:, :, : k.shape[2]] for grad in grads[1:3])
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v, sink), strict=True)), None, None, None


def _attend(chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, ctx) -> tuple[Tensor, Tensor]:
    """z `[batch, head_index, block, rows, d_head]` and log-sum-exp of one chunk; rows that read nothing give z = 0."""
    scores = _scores(chunk, q, k, ctx.scale, ctx.score_mods)
    peak = scores.detach().amax(-1, keepdim=True)
    nothing = peak.isneginf()
    peak = peak.masked_fill(nothing, 0.0)
    weights = scores.sub_(peak).exp2_()
    # A row without keys is given a finite sum, so that no NaN arises in its gradient.
    lse = peak + weights.sum(-1, keepdim=True).masked_fill(nothing, 1.0).log2()
    extra = _rows_of(chunk, sink.to(scores.dtype) / LN_2)
    total = torch.logaddexp2(lse, extra)
    z = weights @ v.to(scores.dtype) * (peak - total).exp2()
    return z.to(q.dtype), (torch.where(nothing, extra, total) * LN_2).squeeze(-1)


def _in_bits(scale: float, score_mods: Sequence[ScoreMod]) -> tuple[float, Sequence[ScoreMod]]:
    """Scale and score mods that give scores in units of ln 2: on a CPU exp2 takes a third of the time of exp."""
    return (scale, (*score_mods, score_mod.Scale(1 / LN_2))) if score_mods else (scale / LN_2, ())


def _rows_of(chunk: Chunk, sink: Tensor) -> Tensor:
    """A sink logit `[batch or 1, head_index or 1, query_pos or 1, 1]` for the rows of a chunk."""
    return sink[:, :, None] if sink.shape[2] == 1 else chunk.cut_queries(sink)


def _scores(chunk: Chunk, q: Tensor, k: Tensor, scale: float, score_mods: Sequence[ScoreMod]) -> Tensor:
    wide = _wide(q)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if not score_mods:
        return _mask_in_place(chunk, scores)
    batch = torch.arange(chunk.layout.batch, device=q.device)[:, None, None, None, None]
    head = torch.arange(chunk.layout.n_heads, device=q.device)[:, None, None, None]
    rows, keys = chunk.query_pos[:, :, None], chunk.key_pos[:, :, :, None]
    scores = score_mod.apply(score_mods, scores, batch, head, rows, keys)
    return scores.masked_fill(~chunk.allowed(), -torch.inf)


def _mask_in_place(chunk: Chunk, scores: Tensor) -> Tensor:
    """`-inf` where the mask forbids. Blocks that it allows altogether, as are most, aren't touched."""
    if chunk.key_blocks is None:
        return scores.masked_fill_(~chunk.allowed(), -torch.inf)
    (text, head, block, slot), allowed = chunk.partial_slots()
    by_slot = scores.unflatten(-1, (-1, chunk.layout.block_k))
    index = (text, head, block, slice(None), slot)
    by_slot[index] = by_slot[index].masked_fill_(~allowed, -torch.inf)
    return scores


def _scatter_keys(chunk: Chunk, into: Tensor, grad: Tensor) -> None:
    """Add what `select_keys(chunk, into)` received back to `into`, in place."""
    kv_heads = into.shape[1]
    if chunk.key_blocks is None:
        into.flatten(2, 3)[:, :, : chunk.n_keys] += grad.squeeze(2).unflatten(1, (kv_heads, -1)).sum(2)
        return
    rows = _flat_rows(chunk.key_blocks, kv_heads, into.shape[2])
    into.flatten(0, 2).index_add_(0, rows.flatten(), grad.unflatten(3, (-1, into.shape[3])).flatten(0, 3).to(into.dtype))


def _flat_rows(key_blocks: Tensor, kv_heads: int, n_blocks: int) -> Tensor:
    """Index of each kept block among all blocks of all batch elements and kv heads."""
    batch, heads = key_blocks.shape[:2]
    text = torch.arange(batch, device=key_blocks.device)[:, None, None, None]
    kv_head = torch.arange(heads, device=key_blocks.device)[:, None, None] // (heads // kv_heads)
    return (text * kv_heads + kv_head) * n_blocks + key_blocks


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

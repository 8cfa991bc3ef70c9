"""An estimate of every row's retained mass from means and variances of the dropped keys; no row's full softmax is computed.

1. Per key block: number, sum and sum of squares (elementwise) of the keys; cumulative over the blocks.            O(T d)
2. Per query block: the key blocks that all its queries may read, cut into `NODES` runs. A run's moments, less those of its
   kept blocks, are the moments of what was dropped of it.                                     O(T / block_q (NODES + k) d)
3. Per query and run: with n dropped keys of scores with mean m and variance v, the sum of exp(score) is about
   n exp(m + v / 2): its cumulants to second order, the variance taking dimensions for uncorrelated. Where v is great the few
   keys of a run are no normal law, and v / 2 is cut off at 1.5 standard deviations.                         O(T NODES d)
4. The few keys beside these, which only some of the block's queries may read, are scored exactly.    O(T (block_q + block_k) d)

The retained mass is then sigmoid(log-sum-exp of the kept keys, which is exact, - that of the dropped ones). It is an estimate,
and a poor one where scores within a run differ by more than a few: one dropped needle is underrated. The audit therefore says
beside it how far it was off in the rows that are known exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream import score_mod
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.layout import BlockLayout

NODES = 64
_FARTHEST = 1.5  # standard deviations; of 0.5 to 3 the one with the least error on the bundled model
_CHUNK_ENTRIES = 2**21


class _Moments(NamedTuple):
    """Cumulative over key blocks, the first entry 0.

    Attributes:
        n_keys: Number of keys that are no padding, `[batch, kv_block + 1]`.
        place: Sum of their positions, likewise.
        keys: Sum of the keys, then of their squares, `[batch, kv_head_index, kv_block + 1, 2 * d_head]`.
    """

    n_keys: Float[Tensor, "batch block"]
    place: Float[Tensor, "batch block"]
    keys: Float[Tensor, "batch kv_head_index block two_d_head"]


@torch.no_grad()
def estimated_mass(
    rows: SoftmaxRows, lse: Float[Tensor, "batch head_index query_pos"]
) -> Float[Tensor, "batch head_index query_pos"]:
    """The estimated share of each row's full softmax that the kept keys hold. O(T) memory; see the module for the time.

    Args:
        rows: The pattern.
        lse: Log-sum-exp of each row over its kept keys, sink included.
    """
    layout = rows.layout
    if layout.is_full:
        return torch.ones_like(lse)
    moments = _moments(rows)
    spans = _Spans.of(layout)
    width = spans.edge_width
    entries = layout.batch * layout.n_heads * max(2 * NODES, width, layout.block_q) * 2 * rows.products.q.shape[-1]
    step = max(1, _CHUNK_ENTRIES // entries)
    parts = []
    for start in range(0, layout.n_q_blocks, step):
        stop = min(start + step, layout.n_q_blocks)
        logits = [_node_logits(rows, moments, spans, start, stop), *_edge_logits(rows, spans, start, stop)]
        parts.append(torch.cat(logits, -1).logsumexp(-1).flatten(2, 3))
    dropped = torch.cat(parts, 2)[:, :, : layout.mask.query_length]
    mass = (lse - dropped).sigmoid().nan_to_num(1.0)
    mass[:, :, rows.dense_from :] = 1.0
    return mass


class _Spans(NamedTuple):
    """Key blocks of each query block, `[q_block]` each: all queries may read `inner`; only some may read the rest of `outer`.

    Where no block can be read by all, the inner span is empty, and lies at the end of the outer one.
    """

    outer_start: Tensor
    inner_start: Tensor
    inner_stop: Tensor
    outer_stop: Tensor
    block_k: int

    @classmethod
    def of(cls, layout: BlockLayout) -> _Spans:
        n, mask = layout.block_k, layout.mask
        rows = layout.query_positions().clamp(max=mask.query_length - 1)
        start, stop = mask.bounds(rows)
        start = torch.zeros_like(stop) if start is None else start
        outer = start.amin(-1) // n, -(-stop.amax(-1) // n)
        first = (-(-start.amax(-1) // n)).clamp(max=outer[1])
        return cls(outer[0], first, torch.maximum(stop.amin(-1) // n, first), outer[1], n)

    @property
    def edge_width(self) -> int:
        """Keys of the longer edge."""
        edges = torch.maximum(self.inner_start - self.outer_start, self.outer_stop - self.inner_stop)
        return int(edges.max()) * self.block_k

    def nodes(self, start: int, stop: int) -> Int[Tensor, "q_block node"]:
        """Bounds of the `NODES` runs that the inner span is cut into."""
        first, last = self.inner_start[start:stop, None], self.inner_stop[start:stop, None]
        return (first + (last - first) * torch.arange(NODES + 1, device=first.device) // NODES).long()


def _moments(rows: SoftmaxRows) -> _Moments:
    layout, k = rows.layout, rows.products.k.double()
    positions = torch.arange(layout.mask.key_length, device=k.device, dtype=k.dtype)
    valid = layout.mask.key_valid
    inside = k.new_ones(layout.batch, len(positions)) if valid is None else valid.to(k.dtype)
    k = k * inside[:, None, :, None]

    def cumulate(x: Tensor) -> Tensor:
        blocks = pad(x, (0, 0, 0, -x.shape[-2] % layout.block_k)).unflatten(-2, (-1, layout.block_k)).sum(-2)
        return pad(blocks.cumsum(-2), (0, 0, 1, 0))

    count, place = (cumulate(x[..., None])[..., 0] for x in (inside, inside * positions))
    return _Moments(count, place, cumulate(torch.cat([k, k * k], -1)))


def _node_logits(
    rows: SoftmaxRows, moments: _Moments, spans: _Spans, start: int, stop: int
) -> Float[Tensor, "batch head_index q_block block_q node"]:
    """Estimated log of the sum of exp(score) over the dropped keys of each node; -inf where nothing was dropped."""
    layout, products = rows.layout, rows.products
    bounds = spans.nodes(start, stop)
    kv_heads = products.k.shape[1]
    kept, used = layout.rows(start, stop)
    used = used & (kept >= bounds[:, :1]) & (kept < bounds[:, -1:])
    node = torch.searchsorted(bounds[None, None].expand(*kept.shape[:2], -1, -1).contiguous(), kept, right=True) - 1
    node = node.clamp(0, NODES - 1)

    def dropped(sums: Tensor) -> Tensor:
        """Sums over the dropped keys of each node, from cumulative ones `[batch, kv_head_index, block, x]`."""
        ends = sums[:, :, bounds]
        total = (ends[:, :, :, 1:] - ends[:, :, :, :-1]).repeat_interleave(layout.n_heads // kv_heads, 1)
        each = sums[:, :, 1:] - sums[:, :, :-1]
        batch = torch.arange(layout.batch, device=kept.device)[:, None, None, None]
        head = torch.arange(layout.n_heads, device=kept.device)[:, None, None] // (layout.n_heads // kv_heads)
        taken = each[batch, head, kept] * used[..., None]
        return total.scatter_add(3, node[..., None].expand_as(taken), -taken)

    shared = (x[:, None, :, None].expand(-1, kv_heads, -1, -1) for x in (moments.n_keys, moments.place))
    count, place = (dropped(x)[..., 0] for x in shared)
    some = count.clamp(min=1.0)
    mean, square = (dropped(moments.keys) / some[..., None]).chunk(2, -1)
    variance = (square - mean**2).clamp(min=0.0)
    q = _queries(rows, start, stop)
    centre = (q @ mean.to(q).transpose(-1, -2)) * products.scale
    deviation = ((q * q) @ variance.to(q).transpose(-1, -2)).clamp(min=0.0).sqrt() * products.scale
    at = (place / some).long()
    low, middle, high = (_modified(rows, centre + sign * deviation, at, start, stop) for sign in (-1, 0, 1))
    logits = some.log()[:, :, :, None].to(q) + middle + _excess((high - low) / 2)
    return logits.masked_fill(count[:, :, :, None] < 0.5, -torch.inf)


def _edge_logits(
    rows: SoftmaxRows, spans: _Spans, start: int, stop: int
) -> list[Float[Tensor, "batch head_index q_block block_q key"]]:
    """Exact scores of the dropped keys before and after the inner span, -inf for all other keys."""
    edges = ((spans.outer_start, spans.inner_start), (spans.inner_stop, spans.outer_stop))
    return [_between(rows, first[start:stop].long(), last[start:stop].long(), start, stop) for first, last in edges]


def _between(rows: SoftmaxRows, first: Tensor, last: Tensor, start: int, stop: int) -> Tensor:
    layout, k = rows.layout, rows.products.k
    blocks = first[:, None] + torch.arange(int((last - first).max()), device=first.device)
    batch = torch.arange(layout.batch, device=k.device)[:, None, None, None]
    head = torch.arange(layout.n_heads, device=k.device)[:, None, None]
    q_block = torch.arange(start, stop, device=k.device)[:, None]
    _, kept = layout.find(batch, head, q_block, blocks)
    hidden = (kept | (blocks >= last[:, None])).repeat_interleave(layout.block_k, -1)
    key_pos = (blocks[..., None] * layout.block_k + torch.arange(layout.block_k, device=k.device)).flatten(-2)
    q = _queries(rows, start, stop)
    keys = k[:, :, key_pos.clamp(max=layout.mask.key_length - 1)].to(q).repeat_interleave(layout.n_heads // k.shape[1], 1)
    scores = (q @ keys.transpose(-1, -2)) * rows.products.scale
    scores = _modified(rows, scores, key_pos[None, None], start, stop)
    query_pos = layout.query_positions(start, stop)[:, :, None]
    allowed = layout.mask.allows(batch[..., None], query_pos, key_pos[:, None])
    return scores.masked_fill(~allowed | hidden[:, :, :, None], -torch.inf)


def _queries(rows: SoftmaxRows, start: int, stop: int) -> Float[Tensor, "batch head_index q_block block_q d_head"]:
    q, block_q = rows.products.q, rows.layout.block_q
    part = q[:, :, start * block_q : stop * block_q].to(torch.promote_types(q.dtype, torch.float32))
    return pad(part, (0, 0, 0, (stop - start) * block_q - part.shape[2])).unflatten(2, (-1, block_q))


def _modified(rows: SoftmaxRows, scores: Tensor, key_pos: Tensor, start: int, stop: int) -> Tensor:
    """What the model makes of scaled scores `[batch, head_index, q_block, block_q, x]`, with a key position for each x."""
    layout = rows.layout
    batch = torch.arange(layout.batch, device=scores.device)[:, None, None, None, None]
    head = torch.arange(layout.n_heads, device=scores.device)[:, None, None, None]
    query_pos = layout.query_positions(start, stop)[:, :, None]
    return score_mod.apply(rows.products.score_mods, scores, batch, head, query_pos, key_pos[:, :, :, None])


def _excess(deviation: Tensor) -> Tensor:
    """How far log(mean(exp(score))) lies above mean(score): v / 2, as far as a normal law can be believed."""
    return torch.minimum(deviation**2 / 2, _FARTHEST * deviation)

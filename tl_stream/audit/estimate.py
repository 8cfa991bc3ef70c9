"""An estimate of every row's retained mass from a few of the dropped keys; no row's full softmax is computed.

1. Per query block: of the keys that all its queries may read, `SAMPLES` positions, one at random of each of as many equal
   stretches (all of them, where there are no more). The dropped ones among them stand for all keys that were dropped there:
   their scores are exact, and each counts as often as there are dropped keys to a drawn one.             O(T SAMPLES d)
2. The few keys beside these, which only some of the block's queries may read, are scored exactly.  O(T (block_q + block_k) d)

The retained mass is then sigmoid(log-sum-exp of the kept keys, which is exact, - that of the dropped ones). The sum of the
dropped keys' exp(score) is estimated without bias, but a single dropped needle is missed more often than not, and overrated
otherwise. The audit therefore says beside the estimate how far it was off in the rows that are known exactly.

On the bundled model this is nearer than means and variances of the dropped keys' scores under a normal law, at the same cost:
docs/measurements.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream import score_mod
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.layout import BlockLayout
from tl_stream.precision import outside_autocast

SAMPLES = 256
_CHUNK_ENTRIES = 2**21


@torch.no_grad()
@outside_autocast
def estimated_mass(
    rows: SoftmaxRows, lse: Float[Tensor, "batch head_index query_pos"], seed: int = 0
) -> Float[Tensor, "batch head_index query_pos"]:
    """The estimated share of each row's full softmax that the kept keys hold. O(T) memory; see the module for the time.

    Args:
        rows: The pattern.
        lse: Log-sum-exp of each row over its kept keys, sink included.
        seed: Of the draw, which all texts and heads share.
    """
    layout = rows.layout
    if layout.is_full:
        return torch.ones_like(lse)
    spans = _Spans.of(layout)
    key_pos = torch.cat([spans.drawn(seed), spans.beside()], 1)
    wide = key_pos.shape[1] * max(layout.block_q, layout.n_slots, rows.products.k.shape[-1])
    step = max(1, _CHUNK_ENTRIES // (layout.batch * layout.n_heads * wide))
    parts = []
    for start in range(0, layout.n_q_blocks, step):
        stop = min(start + step, layout.n_q_blocks)
        scores, dropped = _scores(rows, key_pos[start:stop], start, stop)
        n_drawn = dropped[..., :SAMPLES].sum(-1).clamp(min=1)
        scores[..., :SAMPLES] += (spans.n_dropped(layout, start, stop) / n_drawn).log()[..., None, None]
        parts.append(scores.logsumexp(-1).flatten(2, 3))
    mass = (lse - torch.cat(parts, 2)[:, :, : layout.mask.query_length]).sigmoid().nan_to_num(1.0)
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

    def drawn(self, seed: int) -> Int[Tensor, "q_block sample"]:
        """Key positions of each inner span: one at random of each of `SAMPLES` equal stretches; or all of them, and then -1."""
        first, last = (x[:, None].cpu() * self.block_k for x in (self.inner_start, self.inner_stop))  # float64 isn't on MPS
        generator, stretch = torch.Generator().manual_seed(seed), torch.arange(SAMPLES)
        within = torch.rand(len(first), SAMPLES, generator=generator, dtype=torch.float64)
        place = ((stretch + within) * (last - first) / SAMPLES).long()
        key_pos = first + torch.where(last - first > SAMPLES, place, stretch)
        return key_pos.masked_fill(key_pos >= last, -1).to(self.inner_start.device)

    def beside(self) -> Int[Tensor, "q_block key"]:
        """Key positions of the rest of each outer span; -1 fills up."""
        edges = ((self.outer_start, self.inner_start), (self.inner_stop, self.outer_stop))
        return torch.cat([self._keys(first * self.block_k, last * self.block_k) for first, last in edges], 1)

    def n_dropped(self, layout: BlockLayout, start: int, stop: int) -> Int[Tensor, "batch head_index q_block"]:
        """Number of keys in the dropped blocks of the inner span."""
        first, last = self.inner_start[start:stop, None], self.inner_stop[start:stop, None]
        kept, used = layout.rows(start, stop)
        n_kept = (used & (kept >= first) & (kept < last)).sum(-1)
        return ((last - first)[:, 0] - n_kept) * self.block_k

    @staticmethod
    def _keys(first: Tensor, last: Tensor) -> Int[Tensor, "q_block key"]:
        key_pos = first[:, None] + torch.arange(int((last - first).max()), device=first.device)
        return key_pos.masked_fill(key_pos >= last[:, None], -1)


def _scores(
    rows: SoftmaxRows, key_pos: Int[Tensor, "q_block key"], start: int, stop: int
) -> tuple[Float[Tensor, "batch head_index q_block block_q key"], Bool[Tensor, "batch head_index q_block key"]]:
    """Scores of dropped keys, -inf for kept and forbidden ones and where `key_pos` is -1; and whether each was dropped."""
    layout, products = rows.layout, rows.products
    batch = torch.arange(layout.batch, device=key_pos.device)[:, None, None, None]
    head = torch.arange(layout.n_heads, device=key_pos.device)[:, None, None]
    q_block = torch.arange(start, stop, device=key_pos.device)[:, None]
    _, kept = layout.find(batch, head, q_block, key_pos // layout.block_k)
    n_keys = layout.mask.key_length
    dropped = ~kept & (key_pos >= 0) & (key_pos < n_keys)
    key_pos = key_pos.clamp(min=0, max=n_keys - 1)
    q = _queries(rows, start, stop)
    keys = products.k[:, :, key_pos].to(q).repeat_interleave(layout.n_heads // products.k.shape[1], 1)
    scores = (q @ keys.transpose(-1, -2)) * products.scale
    query_pos = layout.query_positions(start, stop)[:, :, None]
    where = batch[..., None], head[..., None], query_pos, key_pos[:, None]
    allowed = layout.mask.allows(where[0], *where[2:])
    scores = score_mod.apply(products.score_mods, scores, *where)
    return scores.masked_fill(~(allowed & dropped[:, :, :, None]), -torch.inf), dropped


def _queries(rows: SoftmaxRows, start: int, stop: int) -> Float[Tensor, "batch head_index q_block block_q d_head"]:
    q, block_q = rows.products.q, rows.layout.block_q
    part = q[:, :, start * block_q : stop * block_q].to(torch.promote_types(q.dtype, torch.float32))
    return pad(part, (0, 0, 0, (stop - start) * block_q - part.shape[2])).unflatten(2, (-1, block_q))

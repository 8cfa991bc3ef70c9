"""Full softmax rows of a pattern's own q and k, beside the rows of what was kept, a few at a time: O(T) memory a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream import score_mod
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.precision import outside_autocast
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.products import Products
from tl_stream.tensors.retained import recomputable

CHUNK_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class SoftmaxRows:
    """Rows of the softmax over all keys that the mask allows, and over the kept ones.

    Attributes:
        products: q, k and what the model did to their product.
        layout: Kept blocks, and the mask.
        shown: Query rows that the pattern shows; the methods' rows are query positions, shown or not.
        dense_from: The rows from here on keep everything, whatever the layout says.
    """

    products: Products
    layout: BlockLayout
    shown: range
    dense_from: int

    @classmethod
    def of(cls, pattern: BlockSparseTensor | JoinedTensor) -> SoftmaxRows:
        """The rows of a pattern.

        Raises:
            TypeError: The pattern was written to, so that q and k no longer give it.
        """
        if isinstance(pattern, JoinedTensor):
            return _joined([cls.of(part) for part in pattern.parts], pattern.block_layout.mask)
        data, products = recomputable(pattern)
        return cls(products.detach(), data.layout, pattern._view.rows, data.layout.mask.query_length)

    def text(self, index: int) -> SoftmaxRows:
        """One text of the batch; O(T d_head) to copy its q and k."""
        device = self.layout.device
        chosen = torch.tensor([index], device=device), torch.arange(self.layout.n_heads, device=device)
        return replace(self, products=self.products.select(*chosen), layout=self.layout.select(*chosen))

    @outside_autocast
    def scores(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "batch head_index row key_pos"]:
        """Scores of every key, -inf where the mask forbids. O(T d_head) a row."""
        products, mask = self.products, self.layout.mask
        products.check_unchanged()
        wide = torch.promote_types(products.q.dtype, torch.float32)
        kv_heads = products.k.shape[1]
        q = products.q[:, :, rows].to(wide).unflatten(1, (kv_heads, -1))
        scores = (q @ products.k[:, :, None].to(wide).transpose(-1, -2)).flatten(1, 2) * products.scale
        batch, head, query_pos, key_pos = self._indices(rows)
        scores = score_mod.apply(products.score_mods, scores, batch, head, query_pos, key_pos)
        return scores.masked_fill(~mask.allows(batch, query_pos, key_pos), -torch.inf)

    def kept(self, rows: Int[Tensor, " row"]) -> Bool[Tensor, "batch head_index row key_pos"]:
        """Whether each key lies in a kept block; the mask is not applied."""
        layout = self.layout
        shape = (layout.batch, layout.n_heads, len(rows), layout.mask.key_length)
        if layout.kv_indices is None or layout.kv_num_blocks is None:
            return torch.ones((), dtype=torch.bool, device=layout.device).expand(shape)
        block = rows // layout.block_q
        indices = layout.kv_indices[:, :, block].long()
        used = torch.arange(layout.n_slots, device=layout.device) < layout.kv_num_blocks[:, :, block, None]
        counts = torch.zeros(*shape[:3], layout.n_kv_blocks, dtype=torch.int32, device=layout.device)
        blocks = counts.scatter_add(-1, indices, used.int()) > 0
        kept = blocks.repeat_interleave(layout.block_k, -1)[..., : layout.mask.key_length]
        return kept | (rows >= self.dense_from)[:, None]

    def softmax(self, scores: Float[Tensor, "batch head_index row key_pos"], rows: Int[Tensor, " row"]) -> Tensor:
        """Softmax of `scores` (those of `rows`), beside the sink logit if there is one; 0 for a row that reads nothing."""
        sink = self.products.sink
        if sink is not None:
            logit = sink.expand(*scores.shape[:2], self.layout.mask.query_length, 1)[:, :, rows]
            scores = torch.cat([scores, logit.to(scores)], -1)
        return scores.softmax(-1)[..., : self.layout.mask.key_length].nan_to_num(0.0)

    def retained(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "batch head_index row"]:
        """Share of each row's full softmax that lies on kept keys (what a sink takes is lost to none), exactly.

        1 for rows that may read nothing.
        """
        parts = [self._retained(part) for part in self.runs(rows)]
        wide = torch.promote_types(self.products.q.dtype, torch.float32)
        return torch.cat(parts, -1) if parts else self.products.q.new_ones(*self.layout.shape[:2], 0, dtype=wide)

    def runs(self, rows: Int[Tensor, " row"], multiple: int = 1) -> Iterator[Int[Tensor, " part"]]:
        """`rows` in runs of a multiple of `multiple` rows, with about `CHUNK_ENTRIES` entries each."""
        batch, heads, _, keys = self.layout.shape
        step = max(1, CHUNK_ENTRIES // (batch * heads * keys * multiple)) * multiple
        yield from rows.split(step) if len(rows) else ()

    def counted(self) -> Bool[Tensor, "batch query_pos"]:
        """Whether a row is no padding and may read anything."""
        batch, _, n_queries, n_keys = self.layout.shape
        mask, device = self.layout.mask, self.layout.device
        rows, texts = torch.arange(n_queries, device=device), torch.arange(batch, device=device)[:, None]
        reads = mask.counts(texts, rows, torch.zeros_like(rows), torch.full_like(rows, n_keys)) > 0
        own = rows + (n_keys - n_queries)
        return reads.expand(batch, -1) if mask.key_valid is None else reads & mask.key_valid[:, own]

    def prunes(self) -> Bool[Tensor, "batch query_pos"]:
        """Whether some head may have dropped a key that the row may read; False is certain."""
        layout = self.layout
        rows = layout.query_positions().clamp(max=layout.mask.query_length - 1)
        start, stop = layout.mask.bounds(rows)
        first = torch.zeros_like(stop[:, 0]) if start is None else start.amin(-1) // layout.block_k
        last = -(-stop.amax(-1) // layout.block_k)
        if layout.kv_indices is None or layout.kv_num_blocks is None:
            return torch.zeros(layout.batch, len(rows.flatten()), dtype=torch.bool, device=layout.device)
        slots = torch.arange(layout.n_slots, device=layout.device)
        inside = (layout.kv_indices >= first[:, None]) & (layout.kv_indices < last[:, None])
        kept = (inside & (slots < layout.kv_num_blocks[..., None])).sum(-1)
        some_dropped = (kept < last - first).any(1)
        by_row = some_dropped.repeat_interleave(layout.block_q, -1)[:, : layout.mask.query_length]
        return by_row & (torch.arange(by_row.shape[-1], device=layout.device) < self.dense_from)

    def _retained(self, rows: Int[Tensor, " row"]) -> Tensor:
        scores = self.scores(rows)
        dropped = self.softmax(scores, rows).masked_fill_(self.kept(rows), 0.0)
        return 1.0 - dropped.sum(-1)

    def _indices(self, rows: Int[Tensor, " row"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, heads, _, keys = self.layout.shape
        ranges = (torch.arange(n, device=rows.device) for n in (batch, heads, keys))
        text, head, key = ranges
        return text[:, None, None, None], head[:, None, None], rows[:, None], key


def _joined(parts: list[SoftmaxRows], mask: AttentionMask) -> SoftmaxRows:
    """Rows that keep some blocks, and after them rows that keep everything, under the mask of both."""
    first, last = parts
    for part in parts:
        part.products.check_unchanged()
    n_first, sink = first.layout.mask.query_length, first.products.sink
    if sink is not None and last.products.sink is not None and sink.shape[2] > 1:
        sink = torch.cat([sink, last.products.sink], 2)
    q = torch.cat([first.products.q, last.products.q], 2)
    layout = replace(first.layout, mask=mask)
    if layout.kv_indices is not None and layout.kv_num_blocks is not None:
        missing = layout.n_q_blocks - first.layout.n_q_blocks
        indices, number = pad(layout.kv_indices, (0, 0, 0, missing)), pad(layout.kv_num_blocks, (0, missing))
        layout = replace(layout, kv_indices=indices, kv_num_blocks=number)
    start = first.shown.start if first.shown else n_first + last.shown.start
    stop = n_first + last.shown.stop if last.shown else first.shown.stop
    return SoftmaxRows(
        replace(first.products, q=q, sink=sink, versions=()),
        layout,
        range(start, stop),
        n_first,
    )

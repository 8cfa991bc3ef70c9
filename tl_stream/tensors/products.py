"""q . k and what a model did to it, kept in place of the scores, and where it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream import score_mod
from tl_stream.attention import sparse_attention
from tl_stream.attention.gather import block_scores
from tl_stream.config import StreamConfig
from tl_stream.estimator import Earlier
from tl_stream.layout import BlockLayout
from tl_stream.pairs import Pairs
from tl_stream.score_mod import FromRow, OnSubset, ScoreMod

_ENTRIES_AT_ONCE = 2**18


@dataclass(frozen=True)
class Origin:
    """Where a sparse tensor comes from: for messages, limits and the count of automatic densifications.

    Attributes:
        config: The run's config.
        layer: Layer index.
        dense: Whether the layer is one of `config.dense_layers`.
        fallbacks: How often each unknown operation was made dense, over the whole run.
        real: False where a token is padding that no mask tells the model of, `[batch, pos]`; None: there is none.
        earlier: What the run has to know of those before it, whose keys are in a KV cache; None: nothing.
        pairs: Counts what the run keeps.
    """

    config: StreamConfig
    layer: int
    dense: bool
    fallbacks: Counter[str]
    real: Bool[Tensor, "batch pos"] | None = field(default=None, compare=False, repr=False)
    earlier: Earlier | None = field(default=None, compare=False, repr=False)
    pairs: Pairs = field(default_factory=Pairs, compare=False, repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether the model computed full attention, of which the kept blocks are a record."""
        return self.config.forward == "exact"


@dataclass(frozen=True, eq=False)
class Products:
    """q . k and what the model did to it: enough to recompute any score exactly, in O(T d_head) memory.

    Attributes:
        q: Queries, `[batch, head_index, query_pos, d_head]`.
        k: Keys, `[batch, kv_head_index, key_pos, d_head]`.
        scale: Factor on q . k.
        score_mods: What was applied to the scaled q . k, in turn.
        sink: A logit beside the keys in the softmax, `[batch or 1, head_index or 1, query_pos or 1, 1]`; None: none.
        versions: How often q and k had been changed in place when this was made.
    """

    q: Float[Tensor, "batch head_index query_pos d_head"]
    k: Float[Tensor, "batch kv_head_index key_pos d_head"]
    scale: float = 1.0
    score_mods: Sequence[ScoreMod] = ()
    sink: Float[Tensor, "_ _ _ 1"] | None = None
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._versions())

    def check_unchanged(self) -> None:
        """Raise RuntimeError where q or k were changed in place since: what would be recomputed is no longer what was."""
        if self.versions != self._versions():
            raise RuntimeError(
                "q or k was changed in place after the model had used it, so that this pattern can't be recomputed any more "
                "(it shares their memory). Change a clone() of the cached activation instead."
            )

    def _versions(self) -> tuple[int, ...]:
        return tuple(0 if x.is_inference() else x._version for x in (self.q, self.k))

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to q or k (or the sink) from here."""
        sink = self.sink is not None and self.sink.requires_grad
        return torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad or sink)

    def attend(self, v: Tensor, layout: BlockLayout, backend: str) -> tuple[Tensor, Tensor]:
        """z and log-sum-exp over the kept blocks."""
        self.check_unchanged()
        return sparse_attention(
            self.q, self.k, v, layout, scale=self.scale, score_mods=self.score_mods, sink=self.sink, backend=backend
        )

    def block_scores(self, layout: BlockLayout) -> Tensor:
        """Scores on the kept blocks, in q's dtype or float32, whichever is wider."""
        self.check_unchanged()
        return block_scores(self.q, self.k, layout, scale=self.scale, score_mods=self.score_mods)

    def scores_at(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Float[Tensor, " entry"]:
        """Scores at single entries, given as four index tensors `[entry]`, mask not applied."""
        self.check_unchanged()
        group = self.q.shape[1] // self.k.shape[1]
        wide = torch.promote_types(self.q.dtype, torch.float32)
        parts = []
        for b, h, i, j in zip(*(x.split(_ENTRIES_AT_ONCE) for x in (batch, head, query_pos, key_pos)), strict=True):
            dots = (self.q[b, h, i].to(wide) * self.k[b, h // group, j].to(wide)).sum(-1)
            parts.append(score_mod.apply(self.score_mods, dots * self.scale, b, h, i, j))
        return torch.cat(parts) if parts else self.q.new_zeros(0, dtype=wide)

    def select(self, texts: Int[Tensor, " batch"], heads: Int[Tensor, " head_index"]) -> Products:
        """The products of some batch elements and heads."""
        group = self.q.shape[1] // self.k.shape[1]
        mods = tuple(OnSubset(mod, texts, heads) for mod in self.score_mods)
        sink = self.sink
        if sink is not None:
            sink = sink.expand(self.q.shape[0], self.q.shape[1], -1, -1)[texts][:, heads]
        self.check_unchanged()
        return Products(self.q[texts][:, heads], self.k[texts][:, heads // group], self.scale, mods, sink)

    def stored_tensors(self) -> list[Tensor]:
        """What holds the memory: q, k and the sink."""
        return [x for x in (self.q, self.k, self.sink) if x is not None]

    def rows(self, rows: range) -> Products:
        """The products of some queries (a range of step 1), counted from the first of them."""
        part, sink = slice(rows.start, rows.stop), self.sink
        if sink is not None and sink.shape[2] > 1:
            sink = sink[:, :, part]
        mods = tuple(FromRow(mod, rows.start) for mod in self.score_mods) if rows.start else self.score_mods
        return replace(self, q=self.q[:, :, part], score_mods=mods, sink=sink)

    def detach(self) -> Products:
        """The same without gradients."""
        sink = None if self.sink is None else self.sink.detach()
        return replace(self, q=self.q.detach(), k=self.k.detach(), sink=sink)

    def to(self, device: torch.device) -> Products:
        """The same on another device."""
        if self.q.device == device:
            return self
        sink = None if self.sink is None else self.sink.to(device)
        return replace(self, q=self.q.to(device), k=self.k.to(device), sink=sink, versions=())

"""`ScoresData`: what sparse scores hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.lazy_data import LazyData
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.rest import Rest


@dataclass(eq=False)
class ScoresData(LazyData):
    """Scores that are recomputed from q and k.

    Attributes:
        patterns: What their softmax gave, each time it was taken.
    """

    patterns: tuple[PatternData, ...] = ()

    @property
    def is_used(self) -> bool:
        return bool(self.patterns)

    @property
    def knows_outside(self) -> bool:
        return super().knows_outside or (self.outside is None and self.origin.is_exact)

    def model_rest(self) -> Rest | None:
        known = self.rest is not None or not self.origin.is_exact
        return self.rest if known else Rest(self.products, self.origin.config.backend)

    def make(self) -> Tensor:
        return self.make_on(self.layout)

    def make_on(self, layout: BlockLayout) -> Tensor:
        return self.products.block_scores(layout)

    def make_entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.products.scores_at(batch, head, query_pos, key_pos)

    def select(self, texts: Tensor, heads: Tensor) -> BlockData:
        if not self.is_lazy or self.lazy_requires_grad:
            return super().select(texts, heads)
        data = ScoresData(self.layout.select(texts, heads), self.fill, self.origin)
        return data.of(self.products.select(texts, heads))

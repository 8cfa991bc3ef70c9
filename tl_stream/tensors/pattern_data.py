"""`PatternData`: what a sparse pattern holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.lazy_data import LazyData
from tl_stream.tensors.rest import Rest, block_softmax


@dataclass(eq=False)
class PatternData(LazyData):
    """Probabilities that are recomputed from q, k and each row's log-sum-exp.

    Attributes:
        lse: Log-sum-exp of each row (natural log, sink included), once it is known.
        is_exact: Whether that is over all keys that the mask allows (`forward="exact"`), not over the kept ones alone.
        lse_in_graph: The same as part of the graph, where values were made in it.
        scores_in_graph: The scores from which they were made there.
    """

    lse: Float[Tensor, "batch head_index query_pos"] | None = None
    is_exact: bool = False
    lse_in_graph: Tensor | None = None
    scores_in_graph: Tensor | None = None

    @property
    def _normalising(self) -> BlockLayout:
        return self.layout.to_full() if self.is_exact else self.layout

    def row_lse(self) -> Float[Tensor, "batch head_index query_pos"]:
        """Log-sum-exp of each row (natural log, sink included), over its kept keys or all that the mask allows."""
        if self.lse is None:
            with torch.no_grad():
                self.lse = self._lse_over(self._normalising)
        return self.lse

    def _lse_over(self, layout: BlockLayout) -> Tensor:
        return self.products.attend(self.products.k[..., :0], layout, "gather")[1]

    @property
    def knows_outside(self) -> bool:
        return super().knows_outside or (self.outside is None and self.is_exact)

    def model_rest(self) -> Rest | None:
        if not self.is_exact or self.rest is not None:
            return self.rest
        lse = next((each.lse_in_graph for each in self.lineage if each.lse_in_graph is not None), None)
        if lse is None:
            lse = self._lse_over(self._normalising) if self.lazy_requires_grad else self.row_lse()
        return Rest(self.products, self.origin.config.backend, lse)

    def make(self) -> Tensor:
        scores = self.products.block_scores(self.layout)
        if not self.is_exact:
            return block_softmax(scores, self.layout, self.products.sink)[0]
        if not scores.requires_grad:
            return self._normalised(scores, self.layout)
        self.scores_in_graph = scores
        outside = Rest(self.products, self.origin.config.backend).logit(self.layout)
        values, self.lse_in_graph = block_softmax(scores, self.layout, outside)
        return values

    def make_on(self, layout: BlockLayout) -> Tensor:
        return self._normalised(self.products.block_scores(layout), layout)

    def _normalised(self, scores: Tensor, layout: BlockLayout) -> Tensor:
        lse = self.row_lse() if self.lse_in_graph is None else self.lse_in_graph
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % layout.block_q)).unflatten(-1, (-1, layout.block_q))
        return (scores - lse[..., None].clamp(min=torch.finfo(scores.dtype).min)).exp()

    def make_entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        scores = self.products.scores_at(batch, head, query_pos, key_pos)
        return (scores - self.row_lse()[batch, head, query_pos]).exp()

    def weigh(self, v: Tensor, detached: bool) -> Tensor:
        """`pattern @ v` by the fused kernel, which makes no values; remembers the log-sum-exp.

        Of a record of full attention that is the part of its kept entries; all of it where this goes on into the model.
        """
        products = self.products.detach() if detached else self.products
        backend = self.origin.config.backend
        if self.is_complete or not self.is_exact:
            z, lse = products.attend(v, self._normalising, backend)
            for each in self.lineage:
                each.lse = lse.detach()
            return z
        z, kept = products.attend(v, self.layout, backend)
        everything = products.attend(products.k[..., :0], self._normalising, backend)[1]
        return (kept - everything.clamp(min=torch.finfo(kept.dtype).min)).exp()[..., None] * z

    def select(self, texts: Tensor, heads: Tensor) -> BlockData:
        if not self.is_lazy or self.lazy_requires_grad:
            return super().select(texts, heads)
        lse = self.row_lse()[texts][:, heads]
        layout = self.layout.select(texts, heads)
        data = PatternData(layout, self.fill, self.origin, lse=lse, is_exact=self.is_exact)
        return data.of(self.products.select(texts, heads))

    def to(self, device: torch.device) -> PatternData:
        other = LazyData.to(self, device)
        other.lse = None if self.lse is None else self.lse.to(device)
        return other

    def stored_tensors(self) -> list[Tensor]:
        return super().stored_tensors() + ([] if self.lse is None else [self.lse])

"""What the model reads outside the recorded blocks under `forward="exact"`.

It acts as an attention sink that has a value: one more logit a row, the log-sum-exp of the scores outside, whose value is the
attention over what is outside (that splitting a softmax in two parts gives the same is Dao et al. 2022, arXiv:2205.14135,
section 3.1). So an edit of the recorded entries counts exactly, and what it does not touch stays what it is in the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.attention.complement import Complement
from tl_stream.layout import BlockLayout
from tl_stream.tensors.products import Products


@dataclass(frozen=True, eq=False)
class Rest:
    """Full attention, less what a layout keeps.

    Attributes:
        products: q, k and what the model did to their product.
        backend: As `StreamConfig.backend`.
        lse: The log-sum-exp by which rows are normalised, recorded entries and sink included; None: of scores, which are not
            normalised yet.
    """

    products: Products
    backend: str
    lse: Float[Tensor, "batch head_index query_pos"] | None = None

    def logit(self, layout: BlockLayout) -> Float[Tensor, "batch head_index query_pos 1"]:
        """Log-sum-exp of each row outside `layout`, sink included."""
        nothing = self.products.k[..., :0]
        return self.products.attend(nothing, Complement.of(layout), self.backend)[1][..., None]

    def weigh(self, v: Tensor, layout: BlockLayout) -> Float[Tensor, "batch head_index query_pos d_v"]:
        """The part of z that comes from outside `layout`."""
        assert self.lse is not None
        z, lse = self.products.attend(v, Complement.of(layout), self.backend)
        return (lse - self.lse).exp()[..., None] * z

    def detach(self) -> Rest:
        """The same without gradients."""
        return Rest(self.products.detach(), self.backend, None if self.lse is None else self.lse.detach())

    def with_sink(self, sink: Tensor | None) -> Rest:
        """The same with a sink logit `[batch, head_index, query_pos, 1]` outside the recorded blocks."""
        return self if sink is None else replace(self, products=replace(self.products, sink=sink))


def block_softmax(
    scores: Float[Tensor, "batch head_index q_block block_q key"], layout: BlockLayout, sink: Tensor | None
) -> tuple[Float[Tensor, "batch head_index q_block block_q key"], Float[Tensor, "batch head_index query_pos"]]:
    """Softmax of every row over its kept keys (and the sink logit), and the log-sum-exp of those.

    A row without keys gives 0 everywhere, and a finite log-sum-exp.
    """
    peak = scores.detach().amax(-1, keepdim=True)
    extra = None
    if sink is not None:
        chunk_rows = torch.nn.functional.pad(
            sink.expand(-1, -1, layout.mask.query_length, -1),
            (0, 0, 0, -layout.mask.query_length % layout.block_q),
        )
        extra = chunk_rows.unflatten(2, (-1, layout.block_q)).to(scores.dtype)
        peak = torch.maximum(peak, extra.detach())
    peak = peak.clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    if extra is not None:
        total = total + (extra - peak).exp()
    total = total.clamp(min=torch.finfo(scores.dtype).tiny)
    lse = (peak + total.log()).flatten(2)[:, :, : layout.mask.query_length]
    return weights / total, lse

"""What the model reads outside the recorded blocks under `forward="exact"`.

It acts as an attention sink that has a value: one more logit a row, the log-sum-exp of the scores outside, whose value is the
attention over what is outside (that splitting a softmax in two parts gives the same is Dao et al. 2022, arXiv:2205.14135,
section 3.1). So an edit of the recorded entries counts exactly, and what it does not touch stays what it is in the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.attention.complement import Complement
from tl_stream.layout import BlockLayout
from tl_stream.score_mod import RowAffine, ScoreMod
from tl_stream.tensors.products import Products


@dataclass(frozen=True, eq=False)
class Rest:
    """Full attention, less what a layout keeps.

    Attributes:
        products: q, k and what the model did to their product.
        backend: As `StreamConfig.backend`.
        lse: The log-sum-exp by which rows are normalised, recorded entries and sink included; None: of scores, which are not
            normalised yet.
        factor: What edits multiplied each row of a pattern by.
    """

    products: Products
    backend: str
    lse: Float[Tensor, "batch head_index query_pos"] | None = None
    factor: float | Float[Tensor, "batch head_index query_pos 1"] = 1.0

    def logit(self, layout: BlockLayout) -> Float[Tensor, "batch head_index query_pos 1"]:
        """Log-sum-exp of each row outside `layout`, sink included."""
        nothing = self.products.k[..., :0]
        return self.products.attend(nothing, Complement.of(layout), self.backend)[1][..., None]

    def weigh(self, v: Tensor, layout: BlockLayout) -> Float[Tensor, "batch head_index query_pos d_v"]:
        """The part of z that comes from outside `layout`."""
        assert self.lse is not None
        if not isinstance(self.factor, Tensor) and self.factor == 0:
            return v.new_zeros(*layout.shape[:3], v.shape[-1])
        z, lse = self.products.attend(v, Complement.of(layout), self.backend)
        factor = self.factor.to(z) if isinstance(self.factor, Tensor) else self.factor
        return (lse - self.lse).exp()[..., None] * z * factor

    def detach(self) -> Rest:
        """The same without gradients."""
        factor = self.factor.detach() if isinstance(self.factor, Tensor) else self.factor
        return Rest(self.products.detach(), self.backend, None if self.lse is None else self.lse.detach(), factor)

    def edited(self, factor: Any, shift: Any) -> Rest:
        """The same with `factor * entry + shift` in place of each entry, numbers or `[batch, head_index, query_pos, 1]`.

        Raises:
            NotImplementedError: A pattern with a shift, which would make each entry outside the record count, hidden ones
                too; or scores with a gradient of the edit.
        """
        if self.lse is not None:
            if bool(torch.as_tensor(shift != 0).any()):
                raise NotImplementedError(
                    "A hook added a number to a pattern; with forward='exact' it can't reach what was not recorded. Multiply "
                    "it, assign x[...] = value, or edit hook_attn_scores."
                )
            return replace(self, factor=self.factor * factor)
        if any(isinstance(x, Tensor) and x.requires_grad for x in (factor, shift)):
            raise NotImplementedError(
                "A hook scaled or shifted scores by a tensor that requires a gradient; with forward='exact' that gradient "
                "would miss what was not recorded. Detach it, or use forward='sparse'."
            )
        mods: tuple[ScoreMod, ...] = (*self.products.score_mods, RowAffine(factor, shift))
        return replace(self, products=replace(self.products, score_mods=mods))

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

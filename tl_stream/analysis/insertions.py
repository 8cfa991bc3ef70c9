"""Where tokens to insert come from: at random, or along the gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.flip_case import Case
from tl_stream.config import StreamConfig
from tl_stream.tracing import sparse

NEAREST = 64  # replacements of each token that the gradient proposes


class RandomTokens:
    """Every token at random."""

    def __init__(self, case: Case, vocabulary: Int[Tensor, " id"], generator: torch.Generator) -> None:
        self.case, self.vocabulary, self.generator = case, vocabulary, generator

    def propose(self, best: Int[Tensor, " token"] | None, number: int) -> Int[Tensor, "candidate token"]:
        """So many insertions; what was best so far doesn't count."""
        return self.vocabulary[self._draw(len(self.vocabulary), (number, self.case.n_tokens))]

    def _draw(self, below: int, shape: tuple[int, ...]) -> Int[Tensor, ...]:
        return torch.randint(below, shape, generator=self.generator)


class GradientTokens(RandomTokens):
    """The best insertion so far with one token exchanged, for one of those that by the gradient lower the sparse model's margin
    most, compared with the dense model's (Zou et al. 2023, arXiv:2307.15043, algorithm 1)."""

    def propose(self, best: Int[Tensor, " token"] | None, number: int) -> Int[Tensor, "candidate token"]:
        """So many insertions; without a best one, random ones."""
        if best is None:
            return super().propose(best, number)
        slopes = self._slopes(best)[:, self.vocabulary.to(self.case.answer.device)].cpu()
        nearest = self.vocabulary[slopes.topk(min(NEAREST, len(self.vocabulary)), largest=False).indices]
        place = self._draw(self.case.n_tokens, (number,))
        choice = self._draw(nearest.shape[1], (number,))
        candidates = best.cpu().repeat(number, 1)
        candidates[torch.arange(number), place] = nearest[place, choice]
        return candidates

    def _slopes(self, inserted: Int[Tensor, " token"]) -> Float[Tensor, "token d_vocab"]:
        """The derivative of (sparse margin - dense margin) by each inserted token's one-hot vector."""
        sparse_slope, dense_slope = (self._slope(inserted, config) for config in (self.case.config, self.case.dense))
        return (sparse_slope - dense_slope) @ self.case.model.W_E.detach().T.to(sparse_slope.dtype)

    @torch.enable_grad()
    def _slope(self, inserted: Int[Tensor, " token"], config: StreamConfig) -> Float[Tensor, "token d_model"]:
        case, leaves = self.case, []

        def cut(embedding: Tensor, hook: Any) -> Tensor:
            leaves.append(embedding.detach().requires_grad_())
            return leaves[0]

        with sparse(case.model, config, logits_to_keep=len(case.answer)):
            logits = case.model.run_with_hooks(case.text(inserted[None]), fwd_hooks=[("hook_embed", cut)])
        (gradient,) = torch.autograd.grad(case.margins(logits).sum(), leaves)
        return gradient[0, case.position : case.position + case.n_tokens]


METHODS: dict[str, type[RandomTokens]] = {"random": RandomTokens, "gcg": GradientTokens}

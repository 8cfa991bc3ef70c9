"""The dense model with its attention edited between scores and values, whether or not its hooks could do that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Edit = Callable[[int, Tensor], Tensor]


class EditedAttention(TorchFunctionMode):
    """While active, `on_scores(layer, scores)` and `on_pattern(layer, pattern)` act on each layer's softmax in turn.

    Args:
        layers: The layers with softmax attention, in the order in which they run.
        n_keys: Number of keys.
        batch: Number of texts, for models that merge them with the heads (XGLM).
    """

    def __init__(
        self,
        layers: Iterable[int],
        n_keys: int,
        on_scores: Edit | None = None,
        on_pattern: Edit | None = None,
        batch: int = 2,
    ) -> None:
        super().__init__()
        self.layers, self.n_keys, self.batch = iter(layers), n_keys, batch
        self.on_scores, self.on_pattern = on_scores, on_pattern

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            return self._step_by_step(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "softmax":
            return func(*args, **(kwargs or {}))
        scores = args[0].clone()
        if scores.dim() == 3 and scores.shape[-1] == self.n_keys:
            return self._edited(func, scores.unflatten(0, (self.batch, -1)), args, kwargs).flatten(0, 1)
        return self._edited(func, scores, args, kwargs) if scores.dim() == 4 else func(*args, **(kwargs or {}))

    def _step_by_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._edited(torch.softmax, scores, (scores, -1), {}) @ v

    def _edited(self, func: Any, scores: Tensor, args: Any, kwargs: Any) -> Tensor:
        layer = next(self.layers)
        if self.on_scores:
            scores[..., : self.n_keys] = self.on_scores(layer, scores[..., : self.n_keys])
        pattern = func(scores, *args[1:], **(kwargs or {}))
        pattern = pattern.nan_to_num()
        if self.on_pattern:
            pattern = torch.cat([self.on_pattern(layer, pattern[..., : self.n_keys]), pattern[..., self.n_keys :]], -1)
        return pattern


def masked(keep: dict[int, Tensor]) -> Edit:
    """Scores of what `keep` doesn't allow are -inf."""
    return lambda layer, scores: scores.masked_fill(~keep[layer], -torch.inf)

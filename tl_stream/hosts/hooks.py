"""What every host puts before a model's own hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.gradients import watch
from tl_stream.tensors.scores import AttentionScores


def stream(scores: Tensor, hook: Any) -> Tensor:
    """The Stream hook. Anything but fresh scores passes: a context inside another one has already chosen."""
    sparse = scores.to_sparse_scores() if isinstance(scores, AttentionScores) else scores
    return watch_gradient(sparse, hook)


def watch_gradient(tensor: Tensor, hook: Any) -> Tensor:
    """Let the backward hooks of a hook point see the gradient of a sparse tensor."""
    if isinstance(tensor, BlockSparseTensor):
        watch(tensor, hook)
    return tensor


def to_all_tokens(model: Any, input: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`to_tokens` without truncation: a text that is too long raises."""
    if len(args) < 4:
        kwargs.setdefault("truncate", False)
    return check_length(type(model).to_tokens(model, input, *args, **kwargs), None, model.cfg.n_ctx)


def check_length(x: Tensor, hook: Any, n_ctx: int) -> Tensor:
    """Raise ValueError for tokens (or embeddings) `[batch, pos, ...]` that are none, or more than n_ctx."""
    batch, length = x.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"tokens were of shape {[batch, length]}; expected at least one text of at least one token.")
    if length > n_ctx:
        raise ValueError(
            f"tokens were {length} long, more than the model's n_ctx of {n_ctx}; nothing is cut off silently. "
            "Shorten the text, or load the model with a larger n_ctx."
        )
    return x

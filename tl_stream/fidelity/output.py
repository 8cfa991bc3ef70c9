"""Two runs' logits compared."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.fidelity.result import OutputFidelity
from tl_stream.fidelity.runs import wide
from tl_stream.hosts.unembedding import logits_of, runs


def compare_outputs(
    model: Any,
    dense: Float[Tensor, "batch pos d_model"],
    sparse: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    said: tuple[Int[Tensor, "batch step"], Int[Tensor, "batch step"]] | None,
) -> OutputFidelity:
    """KL, top-1 agreement and losses at the positions that count, and how much of the generated text agrees.

    Args:
        model: The model.
        dense: What the dense model's unembedding was given.
        sparse: The sparse one's.
        tokens: The texts.
        counted: Which positions are no padding.
        said: What both generated.
    """
    following = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)  # the last one's isn't known, nor counted
    parts = []
    for run in runs(model, *tokens.shape):
        p, q = (logits_of(model, x[:, run], tokens) for x in (dense, sparse))
        parts.append(_compared(p, q, following[:, run]))
    kl, same, loss_dense, loss_sparse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    followed = counted[:, :-1] & counted[:, 1:]
    last = _last(counted)
    texts = torch.arange(len(tokens), device=tokens.device)
    return OutputFidelity(
        kl_mean=float(kl[counted].mean()),
        kl_greatest=float(kl[counted].max()),
        kl_last=float(kl[texts, last].mean()),
        top_1=float(same[counted].double().mean()),
        top_1_last=float(same[texts, last].double().mean()),
        loss_dense=_mean(loss_dense[:, :-1], followed),
        loss_sparse=_mean(loss_sparse[:, :-1], followed),
        next_n=None if said is None else float((said[0] == said[1]).cumprod(-1).double().mean()),
        new_tokens=0 if said is None else said[0].shape[1],
    )


def _compared(
    dense: Float[Tensor, "batch pos d_vocab"], sparse: Float[Tensor, "batch pos d_vocab"], following: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """KL(dense || sparse), whether both find the same token most likely, and the losses on the tokens that follow."""
    p, q = wide(dense).log_softmax(-1), wide(sparse).log_softmax(-1)
    same = p.argmax(-1) == q.argmax(-1)
    loss_dense, loss_sparse = (-x.gather(-1, following[..., None])[..., 0] for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0), same, loss_dense, loss_sparse


def _last(counted: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """The last position of each text that counts."""
    return counted.shape[1] - 1 - counted.flip(-1).int().argmax(-1)


def _mean(x: Float[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]) -> float | None:
    return float(x[where].mean()) if where.any() else None

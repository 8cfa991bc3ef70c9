"""Two runs' logits compared."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.fidelity.result import OutputFidelity


def compare_outputs(
    dense: Float[Tensor, "batch pos d_vocab"],
    sparse: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    said: tuple[Int[Tensor, "batch step"], Int[Tensor, "batch step"]] | None,
) -> OutputFidelity:
    """KL, top-1 agreement and losses at the positions that count, and how much of the generated text agrees.

    Args:
        dense: The dense model's logits.
        sparse: The sparse model's.
        tokens: The texts, at the positions of the logits.
        counted: Which positions are no padding.
        said: What both generated.
    """
    p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
    same = p.argmax(-1) == q.argmax(-1)
    followed = counted[:, :-1] & counted[:, 1:]
    losses = [_mean(-x[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], followed) for x in (p, q)]
    last = _last(counted)
    texts = torch.arange(len(tokens), device=tokens.device)
    return OutputFidelity(
        positions=tokens.shape[1],
        kl_mean=float(kl[counted].mean()),
        kl_greatest=float(kl[counted].max()),
        kl_last=float(kl[texts, last].mean()),
        top_1=float(same[counted].double().mean()),
        top_1_last=float(same[texts, last].double().mean()),
        loss_dense=losses[0],
        loss_sparse=losses[1],
        next_n=None if said is None else float((said[0] == said[1]).cumprod(-1).double().mean()),
        new_tokens=0 if said is None else said[0].shape[1],
    )


def _last(counted: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """The last position of each text that counts."""
    return counted.shape[1] - 1 - counted.flip(-1).int().argmax(-1)


def _mean(x: Float[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]) -> float | None:
    return float(x[where].mean()) if where.any() else None

"""Whether a user's own steps in the attention of a TransformerBridge can be followed: they are tried on a few zeros."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_stream.config import StreamConfig
from tl_stream.hosts.bridge_attention import STEPS, BridgeAttention
from tl_stream.hosts.hf_interfaces import make_mask, users_attention
from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.hosts.own_code import TRIED, is_own, why_not_followed
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.scores import AttentionScores, CaptureProduct


def why_not_steps(attn: Any, n_heads: int, kv_heads: int) -> str | None:
    """Why a user's attention function, or methods of the module, can't be traced; None where they can, or there are none."""
    origin = Origin(StreamConfig(max_dense=0), 0, False, Counter())
    like = next((each for each in attn.parameters() if each.is_floating_point()), torch.empty(0))
    q, k = (like.new_zeros(1, n, TRIED, 8) for n in (n_heads, kv_heads))
    for module in attn.original_component.modules():
        attend = users_attention(module)
        if attend is not None:
            return why_not_followed([attend], partial(_attend, origin, attend, module, q, k))
    own = [step for step in (standing(attn, name) for name in STEPS if hasattr(attn, name)) if not is_own(step)]
    return why_not_followed(own, partial(_steps, attn, origin, q, k)) if own else None


def _attend(origin: Origin, attend: Any, module: Any, q: Tensor, k: Tensor) -> Any:
    """The scores that a user's attention function gave rise to."""
    mask = make_mask(1, TRIED, TRIED, device=q.device, dtype=q.dtype)
    with CaptureProduct(origin, q.shape[1], k.shape[1]) as capture:
        attend(module, q, k, k, mask, scaling=1.0, dropout=0.0)
    if capture.scores is None:
        raise NotImplementedError("it takes no product of q and k that could be captured, by matmul or einsum")
    return capture.scores.to_sparse_scores() if capture.scores.mask is not None else capture.scores.with_mask(mask.mask)


def _steps(attn: Any, origin: Origin, q: Tensor, k: Tensor) -> Any:
    """Scores, masked, or the pattern where the module takes its own softmax of them."""
    overrides = Overrides(lambda: True)
    mask = make_mask(1, TRIED, TRIED, device=q.device, dtype=q.dtype)
    try:
        BridgeAttention(attn, lambda: origin, q.shape[1], k.shape[1]).install_steps(overrides)
        scores = attn._apply_reconstruct_attention_mask(
            attn_scores=AttentionScores(Products(q, k), origin), attention_mask=mask, seq_len=TRIED, q_seq_len=TRIED
        )
        has_mask = isinstance(scores, AttentionScores) and scores.mask is not None
        return attn._masked_softmax(scores.to_sparse_scores()) if has_mask and hasattr(attn, "_masked_softmax") else scores
    finally:
        overrides.restore()

"""Whether a user's own steps in the attention of a TransformerBridge can be followed: they are tried on a few zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.masking_utils import causal_mask_function

from tl_stream.config import StreamConfig
from tl_stream.hosts.bridge_attention import STEPS, BridgeAttention
from tl_stream.hosts.hf_interfaces import implementation_of, make_mask, mask_function, users_attention
from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.hosts.own_code import TRIED, is_own, why_not_followed
from tl_stream.masking import AttentionMask
from tl_stream.tensors.capture import CaptureProduct
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.scores import AttentionScores


def why_not_steps(attn: Any, n_heads: int, kv_heads: int) -> str | None:
    """Why a user's attention or mask function, or methods of the module, can't be traced; None where they can."""
    origin = Origin(StreamConfig(max_dense=0), 0, False, Counter())
    like = next((each for each in attn.parameters() if each.is_floating_point()), torch.empty(0))
    q, k = (like.new_zeros(1, n, TRIED, 8) for n in (n_heads, kv_heads))
    make = mask_function(implementation_of(attn.original_component))
    module, attend = next(_users_attentions(attn), (None, None))
    if attend is not None:
        given = q[:, :: getattr(module, "num_key_value_groups", 1)]
        return why_not_followed([attend], lambda: _attend(origin, attend, module, q, given, _mask(make, q)))
    own = [step for step in (standing(attn, name) for name in STEPS if hasattr(attn, name)) if not is_own(step)]
    own += [] if make in (None, make_mask) else [make]
    return why_not_followed(own, lambda: _steps(attn, origin, q, k, _mask(make, q))) if own else None


def _users_attentions(attn: Any) -> Iterator[tuple[Module, Callable[..., Any]]]:
    for module in attn.original_component.modules():
        attend = users_attention(module)
        if attend is not None:
            yield module, attend


def _mask(make: Callable[..., Any] | None, q: Tensor) -> Any:
    """The mask that Hugging Face's code would ask for."""
    options = {"mask_function": causal_mask_function, "attention_mask": None, "dtype": q.dtype, "device": q.device}
    sizes = {"batch_size": 1, "q_length": TRIED, "kv_length": TRIED, "q_offset": 0, "kv_offset": 0}
    return None if make is None else make(**sizes, **options)


def _attend(origin: Origin, attend: Callable[..., Any], module: Any, q: Tensor, k: Tensor, mask: Any) -> Any:
    """The scores from which a user's attention function went on to z."""
    with CaptureProduct(origin, q.shape[1], k.shape[1]) as capture:
        attend(module, q, k, k, mask, scaling=1.0, dropout=0.0)
    if capture.scores is None:
        raise NotImplementedError("it takes no product of q and k that could be captured, by matmul or einsum")
    return capture.scores.with_mask(AttentionMask.causal(TRIED, device=q.device))


def _steps(attn: Any, origin: Origin, q: Tensor, k: Tensor, mask: Any) -> Any:
    """Scores, masked, or the pattern where the module takes its own softmax of them."""
    overrides = Overrides(lambda: True)
    try:
        BridgeAttention(attn, lambda: origin, q.shape[1], k.shape[1]).install_steps(overrides)
        scores = attn._apply_reconstruct_attention_mask(
            attn_scores=AttentionScores(Products(q, k), origin), attention_mask=mask, seq_len=TRIED, q_seq_len=TRIED
        )
        softmax = getattr(attn, "_masked_softmax", None)
        return softmax(scores.to_sparse_scores()) if softmax and isinstance(scores, AttentionScores) else scores
    finally:
        overrides.restore()

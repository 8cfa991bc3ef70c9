"""One attention module of a HookedTransformer while it is traced.

Its own forward runs, and its own `calculate_attention_scores`, within which the product of q and k is noted; so a subclass's,
or a user's, count. What is replaced is the causal mask and the ALiBi bias, which would be query_pos x key_pos tensors, and only
where they are TransformerLens's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.components import GroupedQueryAttention
from transformer_lens.components.abstract_attention import AbstractAttention

from tl_stream.config import StreamConfig
from tl_stream.hosts.hooks import call_complete, first_hook, stream, watch_gradient
from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.hosts.own_code import TRIED, is_own, mentions, name_of, why_not_followed
from tl_stream.masking import AttentionMask
from tl_stream.tensors.alibi import AlibiBias
from tl_stream.tensors.capture import CaptureProduct
from tl_stream.tensors.mask_tensor import MaskTensor
from tl_stream.tensors.products import Origin
from tl_stream.tensors.scores import AttentionScores

_ANY_LENGTH = 2**20
_STEPS = ("calculate_attention_scores", "apply_causal_mask", "_make_causal_mask")


def why_not_attention(attn: AbstractAttention) -> str | None:
    """Why one attention module can't be traced; None where it can."""
    if attn._attention_dir_override not in (None, "causal"):
        return f"its attention is {attn._attention_dir_override}; only causal attention can be made sparse"
    forward = standing(attn, "forward")
    if not is_own(forward) and not mentions(forward, "forward", "calculate_attention_scores"):
        return f"its own {name_of(forward)} never calls calculate_attention_scores, the place that Stream takes"
    return _why_not_alibi(attn) or _why_not_steps(attn)


def install_attention(attn: AbstractAttention, origin_of: Callable[[], Origin], overrides: Overrides) -> None:
    """Take the module over."""
    _install_steps(attn, origin_of, overrides)
    if attn.cfg.positional_embedding_type == "alibi":
        n_heads, device = attn.cfg.n_heads, attn.cfg.device
        slopes = AbstractAttention.create_alibi_multipliers(n_heads, device)
        make = partial(AbstractAttention.create_alibi_bias, n_heads, device=device)
        overrides.put(attn.__dict__, "alibi", AlibiBias(slopes, _ANY_LENGTH, make))
    first_hook(overrides, attn.hook_attn_scores, stream)
    first_hook(overrides, attn.hook_pattern, watch_gradient)
    for point in (attn.hook_attn_scores, attn.hook_pattern):
        overrides.method(point, "_call_impl", partial(call_complete, point))


def _install_steps(attn: AbstractAttention, origin_of: Callable[[], Origin], overrides: Overrides) -> None:
    overrides.method(attn, "calculate_attention_scores", partial(_capture_scores, attn, origin_of))
    if is_own(standing(attn, "_make_causal_mask")):
        overrides.method(attn, "_make_causal_mask", partial(_make_causal_mask, attn))


def _capture_scores(
    attn: AbstractAttention, origin_of: Callable[[], Origin], original: Callable[..., Tensor], q: Tensor, k: Tensor
) -> Tensor:
    """The method that stands there, with q . k^T noted."""
    capture = CaptureProduct(origin_of(), attn.cfg.n_heads, k.shape[2], keys=k.transpose(1, 2))
    try:
        with capture:
            scores = original(q, k)
    finally:
        capture.paused = True  # should Ctrl-C have kept torch from taking it off its stack of modes
    if not isinstance(scores, AttentionScores):
        raise NotImplementedError(
            f"{name_of(original)} takes no product of q and k that could be captured (by matmul or einsum), or makes it dense"
        )
    return scores


def _make_causal_mask(
    attn: AbstractAttention,
    original: Callable[..., Tensor],
    query_ctx_length: int,
    key_ctx_length: int,
    past_kv_pos_offset: int,
    device: torch.device,
) -> MaskTensor:
    """`_make_causal_mask` without a query_pos x key_pos tensor."""
    window = attn.cfg.window_size if attn.attn_type == "local" else None
    make = partial(AttentionMask.causal, query_ctx_length, key_ctx_length, window=window, device=device)
    return MaskTensor(make, (1, 1, query_ctx_length, key_ctx_length), torch.bool, device, hides=False)


def _why_not_alibi(attn: AbstractAttention) -> str | None:
    """The bias is replaced by its slopes, which must be what TransformerLens makes of them."""
    if attn.cfg.positional_embedding_type != "alibi":
        return None
    makers = [getattr(AbstractAttention, f"create_alibi_{part}") for part in ("bias", "slope", "multipliers")]
    own = [name_of(maker) for maker in makers if not is_own(maker)]
    if not own and isinstance(attn.alibi, Tensor) and not isinstance(attn.alibi, AlibiBias):
        slope = AbstractAttention.create_alibi_slope(attn.alibi.shape[-1], attn.alibi.device)
        slopes = AbstractAttention.create_alibi_multipliers(attn.cfg.n_heads, attn.alibi.device)
        own = [] if all(torch.equal(*pair) for pair in zip(attn.alibi, (m * slope for m in slopes), strict=True)) else ["alibi"]
    return f"its own {own[0]} would be lost: the ALiBi bias is replaced by TransformerLens's slopes" if own else None


def _why_not_steps(attn: AbstractAttention) -> str | None:
    """Whether a user's own steps can be followed, on a few zeros."""
    own = [step for step in (standing(attn, name) for name in _STEPS) if not is_own(step)]
    if not own:
        return None
    cfg: Any = attn.cfg
    grouped = isinstance(attn, GroupedQueryAttention) and not cfg.ungroup_grouped_query_attention
    heads = cfg.n_heads, cfg.n_key_value_heads if grouped else cfg.n_heads
    q, k = (torch.zeros(1, min(cfg.n_ctx, TRIED), n, cfg.d_head, dtype=cfg.dtype, device=attn.W_O.device) for n in heads)
    overrides = Overrides(lambda: True)
    try:
        _install_steps(attn, lambda: Origin(StreamConfig(), attn.layer_id or 0, False, Counter()), overrides)
        return why_not_followed(own, lambda: attn.apply_causal_mask(attn.calculate_attention_scores(q, k), 0, None))
    finally:
        overrides.restore()

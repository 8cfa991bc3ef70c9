"""HookedTransformer (TransformerLens 3): where its scores, masks and limits are, and how to get between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components import GroupedQueryAttention
from transformer_lens.components.abstract_attention import AbstractAttention

from tl_stream.config import StreamConfig
from tl_stream.hosts.hooks import call_complete, check_length, never_dense, stream, to_all_tokens, watch_gradient
from tl_stream.hosts.overrides import first_hook, override_attribute, override_method, standing, uncompiled
from tl_stream.hosts.own_code import TRIED, is_own, mentions, name_of, parts_of, why_not_followed
from tl_stream.masking import AttentionMask
from tl_stream.tensors.alibi import AlibiBias
from tl_stream.tensors.mask_tensor import MaskTensor
from tl_stream.tensors.products import Origin
from tl_stream.tensors.scores import AttentionScores, CaptureProduct

_ANY_LENGTH = 2**20
_STEPS = ("calculate_attention_scores", "apply_causal_mask", "_make_causal_mask")


def why_not(model: Any) -> str | None:
    """Why a HookedTransformer can't be traced; None where it can."""
    if model.cfg.attention_dir != "causal":
        return f"its attention_dir is {model.cfg.attention_dir!r}; only causal attention can be made sparse by Stream"
    if model.cfg.positional_embedding_type == "relative_positional_bias":
        return "its relative position bias (T5) is a learned query_pos x key_pos table; encoder-decoder models aren't supported"
    layers = attention_layers(model)
    for layer, block in enumerate(model.blocks):
        reason = _why_not_attention(layers[layer], model.cfg) if layer in layers else _not_shown(block)
        if reason:
            return f"layer {layer}: {reason}"
    return None


def attention_layers(model: Any) -> dict[int, AbstractAttention]:
    """The attention of each layer, whatever it is wrapped in."""
    found = {layer: parts_of(block, AbstractAttention) for layer, block in enumerate(model.blocks)}
    return {layer: attentions[0] for layer, attentions in found.items() if len(attentions) == 1}


def install(model: Any, origin_of: Callable[[int], Origin], stack: ExitStack) -> None:
    """Put Stream between q . k and the softmax of every layer, until `stack` is closed."""
    stack.enter_context(override_method(model, "to_tokens", partial(to_all_tokens, model)))
    stack.enter_context(first_hook(model.hook_embed, partial(check_length, n_ctx=model.cfg.n_ctx)))
    layers = attention_layers(model)
    stack.enter_context(uncompiled(model, layers.values()))
    for layer, attn in layers.items():
        _install_attention(attn, origin_of(layer), stack)
        stack.enter_context(never_dense(model.blocks[layer], attn.hook_attn_scores, layer))


@contextmanager
def unchanged_on_error(run_arguments: dict[str, Any]) -> Iterator[None]:
    """What an interrupted run appended to a KV cache is taken back."""
    past_kv_cache: TransformerLensKeyValueCache | None = run_arguments.get("past_kv_cache")
    if past_kv_cache is None:
        yield
        return
    before = [(entry, entry.past_keys, entry.past_values) for entry in past_kv_cache.entries]
    attention_mask = past_kv_cache.previous_attention_mask
    try:
        yield
    except BaseException:
        for entry, keys, values in before:
            entry.past_keys, entry.past_values = keys, values
        past_kv_cache.previous_attention_mask = attention_mask
        raise


def _not_shown(block: Module) -> str:
    """Why a block has no attention of ours."""
    attn = getattr(block, "attn", block)
    n = len(parts_of(block, AbstractAttention))
    return f"{n} of TransformerLens's attention modules are in its {name_of(type(attn))}; expected one"


def _why_not_attention(attn: AbstractAttention, cfg: Any) -> str | None:
    if attn._attention_dir_override not in (None, "causal"):
        return f"its attention is {attn._attention_dir_override}; only causal attention can be made sparse"
    forward = standing(attn, "forward")
    if not is_own(forward) and not mentions(forward, "forward", "calculate_attention_scores"):
        return f"its own {name_of(forward)} never calls calculate_attention_scores, the place that Stream takes"
    return _why_not_alibi(attn, cfg) or _why_not_steps(attn, cfg)


def _why_not_alibi(attn: AbstractAttention, cfg: Any) -> str | None:
    """The bias is replaced by its slopes, which must be what TransformerLens makes of them."""
    if cfg.positional_embedding_type != "alibi":
        return None
    makers = [getattr(AbstractAttention, f"create_alibi_{part}") for part in ("bias", "slope", "multipliers")]
    own = next((name_of(maker) for maker in makers if not is_own(maker)), None)
    if own is None and isinstance(attn.alibi, Tensor) and not isinstance(attn.alibi, AlibiBias):
        heads, length = attn.alibi.shape[0], attn.alibi.shape[-1]
        slope = AbstractAttention.create_alibi_slope(length, attn.alibi.device)
        slopes = AbstractAttention.create_alibi_multipliers(heads, attn.alibi.device)
        own = None if all(torch.equal(x, m * slope) for x, m in zip(attn.alibi, slopes, strict=True)) else "alibi tensor"
    return None if own is None else f"its own {own} is a query_pos x key_pos bias, which can't be traced in linear memory"


def _why_not_steps(attn: AbstractAttention, cfg: Any) -> str | None:
    """A user's own steps are called as they are. Whether they can be followed is tried on a few zeros."""
    own = [step for step in (standing(attn, name) for name in _STEPS) if not is_own(step)]
    if not own:
        return None
    length, device = min(cfg.n_ctx, TRIED), attn.W_O.device
    grouped = isinstance(attn, GroupedQueryAttention) and not cfg.ungroup_grouped_query_attention
    heads = cfg.n_heads, cfg.n_key_value_heads if grouped else cfg.n_heads
    q, k = (torch.zeros(1, length, n, cfg.d_head, dtype=cfg.dtype, device=device) for n in heads)
    with ExitStack() as stack:
        _install_steps(attn, Origin(StreamConfig(), attn.layer_id or 0, False, Counter()), stack)
        return why_not_followed(own, lambda: attn.apply_causal_mask(attn.calculate_attention_scores(q, k), 0, None))


def _install_attention(attn: AbstractAttention, origin: Origin, stack: ExitStack) -> None:
    _install_steps(attn, origin, stack)
    if attn.cfg.positional_embedding_type == "alibi":
        slopes = AbstractAttention.create_alibi_multipliers(attn.cfg.n_heads, attn.cfg.device)
        stack.enter_context(override_attribute(attn, "alibi", AlibiBias(slopes, _ANY_LENGTH)))
    for point in (attn.hook_attn_scores, attn.hook_pattern) if origin.is_exact else ():
        stack.enter_context(override_method(point, "_call_impl", partial(call_complete, point)))
    stack.enter_context(first_hook(attn.hook_attn_scores, stream))
    stack.enter_context(first_hook(attn.hook_pattern, watch_gradient))


def _install_steps(attn: AbstractAttention, origin: Origin, stack: ExitStack) -> None:
    """The product is noted within the method that stands there; only TransformerLens's own causal mask is replaced."""
    scores = partial(_capture_scores, attn, origin, standing(attn, "calculate_attention_scores"))
    stack.enter_context(override_method(attn, "calculate_attention_scores", scores))
    if is_own(standing(attn, "_make_causal_mask")):
        stack.enter_context(override_method(attn, "_make_causal_mask", partial(_make_causal_mask, attn)))


def _capture_scores(
    attn: AbstractAttention, origin: Origin, calculate: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor
) -> Tensor:
    with CaptureProduct(origin, attn.cfg.n_heads, k.shape[2]):
        scores = calculate(q, k)
    if not isinstance(scores, AttentionScores):
        raise NotImplementedError(
            f"{name_of(calculate)} of layer {origin.layer} took no product of q and k that could be captured (by matmul or "
            "einsum); it can't be traced."
        )
    return scores


def _make_causal_mask(
    attn: AbstractAttention, query_ctx_length: int, key_ctx_length: int, past_kv_pos_offset: int, device: torch.device
) -> MaskTensor:
    """`_make_causal_mask` without a query_pos x key_pos tensor."""
    window = attn.cfg.window_size if attn.attn_type == "local" else None
    make = partial(AttentionMask.causal, query_ctx_length, key_ctx_length, window=window, device=device)
    return MaskTensor(make, (1, 1, query_ctx_length, key_ctx_length), torch.bool, device, hides=False)

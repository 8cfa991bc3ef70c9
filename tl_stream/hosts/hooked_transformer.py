"""HookedTransformer (TransformerLens 3): where its scores, masks and limits are, and how to get between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components.abstract_attention import AbstractAttention

from tl_stream.hosts.hooks import call_complete, check_length, stream, to_all_tokens, watch_gradient
from tl_stream.hosts.kv_cache import served
from tl_stream.hosts.overrides import first_hook, override_attribute, override_method
from tl_stream.masking import AttentionMask
from tl_stream.tensors.alibi import AlibiBias
from tl_stream.tensors.products import Origin
from tl_stream.tensors.scores import AttentionScores, CaptureProduct

_ANY_LENGTH = 2**20


def why_not(model: Any) -> str | None:
    """Why a HookedTransformer can't be traced; None where it can."""
    if model.cfg.attention_dir != "causal":
        return f"its attention_dir is {model.cfg.attention_dir!r}; only causal attention can be made sparse by Stream"
    if model.cfg.positional_embedding_type == "relative_positional_bias":
        return "its relative position bias (T5) is a learned query_pos x key_pos table; encoder-decoder models aren't supported"
    return None


def attention_layers(model: Any) -> dict[int, AbstractAttention]:
    """The attention of each layer."""
    return {layer: block.attn for layer, block in enumerate(model.blocks)}


def install(model: Any, origin_of: Callable[[int], Origin], stack: ExitStack) -> None:
    """Put Stream between q . k and the softmax of every layer, until `stack` is closed."""
    stack.enter_context(override_method(model, "to_tokens", partial(to_all_tokens, model)))
    stack.enter_context(served(model))
    stack.enter_context(first_hook(model.hook_embed, partial(check_length, n_ctx=model.cfg.n_ctx)))
    for layer, attn in attention_layers(model).items():
        _install_attention(attn, origin_of(layer), stack)


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


def _install_attention(attn: AbstractAttention, origin: Origin, stack: ExitStack) -> None:
    scores = partial(_capture_scores, attn, origin)
    stack.enter_context(override_method(attn, "calculate_attention_scores", scores))
    stack.enter_context(override_method(attn, "apply_causal_mask", partial(_apply_mask, attn)))
    if attn.cfg.positional_embedding_type == "alibi":
        slopes = AbstractAttention.create_alibi_multipliers(attn.cfg.n_heads, attn.cfg.device)
        stack.enter_context(override_attribute(attn, "alibi", AlibiBias(slopes, _ANY_LENGTH)))
    for point in (attn.hook_attn_scores, attn.hook_pattern) if origin.is_exact else ():
        stack.enter_context(override_method(point, "_call_impl", partial(call_complete, point)))
    stack.enter_context(first_hook(attn.hook_attn_scores, stream))
    stack.enter_context(first_hook(attn.hook_pattern, watch_gradient))


def _capture_scores(attn: AbstractAttention, origin: Origin, q: Tensor, k: Tensor) -> Tensor:
    """The model's own code, with q . k^T noted. The base class's: under grouped queries k is not expanded."""
    with CaptureProduct(origin, attn.cfg.n_heads, k.shape[2]):
        return AbstractAttention.calculate_attention_scores(attn, q, k)


def _apply_mask(
    attn: AbstractAttention, attn_scores: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None
) -> Tensor:
    """`apply_causal_mask` without a query_pos x key_pos tensor."""
    assert isinstance(attn_scores, AttentionScores)
    n_queries, n_keys = attn_scores.shape[-2:]
    if n_queries + past_kv_pos_offset != n_keys:
        raise ValueError(
            f"past_kv_pos_offset was {past_kv_pos_offset}; expected {n_keys - n_queries}, the keys before the queries."
        )
    window = attn.cfg.window_size if attn.attn_type == "local" else None
    valid = None if attention_mask is None else attention_mask.bool().to(attn_scores.device)
    mask = AttentionMask.causal(n_queries, n_keys, window=window, key_valid=valid, device=attn_scores.device)
    return attn_scores.with_mask(mask)

"""HookedTransformer (TransformerLens 3): where its scores, masks and limits are, and how to get between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components.abstract_attention import AbstractAttention

from tl_stream.hosts.arguments import check_tokens
from tl_stream.hosts.hooks import call_complete, first_hook, stream, watch_gradient
from tl_stream.hosts.installation import Installation
from tl_stream.hosts.overrides import Overrides
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


def keywords(model: Any) -> set[str]:
    """What a run takes beside the parameters of the model's own methods."""
    return set()


def attention_layers(model: Any) -> dict[int, AbstractAttention]:
    """The attention of each layer."""
    return {layer: block.attn for layer, block in enumerate(model.blocks)}


def install(model: Any, installation: Installation) -> None:
    """Put Stream between q . k and the softmax of every layer."""
    installation.overrides.method(model, "input_to_embed", partial(_checked_input, model))
    for layer, attn in attention_layers(model).items():
        _install_attention(attn, partial(installation.origin, layer), installation.overrides)


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


def _checked_input(model: Any, original: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    """`input_to_embed` of tokens that the model knows; `to_tokens` checks texts."""
    if isinstance(input, Tensor):
        check_tokens(input, model.embed.W_E.shape[0], model.cfg.n_ctx)
    return original(input, *args, **kwargs)


def _install_attention(attn: AbstractAttention, origin_of: Callable[[], Origin], overrides: Overrides) -> None:
    overrides.method(attn, "calculate_attention_scores", partial(_capture_scores, attn, origin_of))
    overrides.method(attn, "apply_causal_mask", partial(_apply_mask, attn))
    if attn.cfg.positional_embedding_type == "alibi":
        n_heads, device = attn.cfg.n_heads, attn.cfg.device
        slopes = AbstractAttention.create_alibi_multipliers(n_heads, device)
        make = partial(AbstractAttention.create_alibi_bias, n_heads, device=device)
        overrides.put(attn.__dict__, "alibi", AlibiBias(slopes, _ANY_LENGTH, make))
    first_hook(overrides, attn.hook_attn_scores, stream)
    first_hook(overrides, attn.hook_pattern, watch_gradient)
    for point in (attn.hook_attn_scores, attn.hook_pattern):
        overrides.method(point, "_call_impl", partial(call_complete, point))


def _capture_scores(
    attn: AbstractAttention, origin_of: Callable[[], Origin], original: Callable[..., Tensor], q: Tensor, k: Tensor
) -> Tensor:
    """The model's own code, with q . k^T noted. The base class's: under grouped queries k is not expanded."""
    capture = CaptureProduct(origin_of(), attn.cfg.n_heads, k.shape[2])
    try:
        with capture:
            return AbstractAttention.calculate_attention_scores(attn, q, k)
    finally:
        capture.paused = True  # should Ctrl-C have kept torch from taking it off its stack of modes


def _apply_mask(
    attn: AbstractAttention,
    original: Callable[..., Tensor],
    attn_scores: Tensor,
    past_kv_pos_offset: int = 0,
    attention_mask: Tensor | None = None,
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

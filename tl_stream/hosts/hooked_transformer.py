"""HookedTransformer (TransformerLens 3): where its scores, masks and limits are, and how to get between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.components.abstract_attention import AbstractAttention

from tl_stream.hosts.arguments import check_tokens
from tl_stream.hosts.hooked_attention import install_attention, why_not_attention
from tl_stream.hosts.hooks import never_dense
from tl_stream.hosts.installation import Installation
from tl_stream.hosts.kv_cache import serve
from tl_stream.hosts.own_code import name_of, parts_of


def why_not(model: Any) -> str | None:
    """Why a HookedTransformer can't be traced; None where it can."""
    if model.cfg.attention_dir != "causal":
        return f"its attention_dir is {model.cfg.attention_dir!r}; only causal attention can be made sparse by Stream"
    if model.cfg.positional_embedding_type == "relative_positional_bias":
        return "its relative position bias (T5) is a learned query_pos x key_pos table; encoder-decoder models aren't supported"
    layers = attention_layers(model)
    for layer, block in enumerate(model.blocks):
        reason = why_not_attention(layers[layer]) if layer in layers else _why_not_block(block)
        if reason:
            return f"layer {layer}: {reason}"
    return None


def keywords(model: Any) -> set[str]:
    """What a run takes beside the parameters of the model's own methods."""
    return set()


def attention_layers(model: Any) -> dict[int, AbstractAttention]:
    """The attention of each layer, whatever it is wrapped in."""
    found = {layer: parts_of(block, AbstractAttention) for layer, block in enumerate(model.blocks)}
    return {layer: parts[0] for layer, parts in found.items() if len(parts) == 1}


def install(model: Any, installation: Installation) -> None:
    """Put Stream between q . k and the softmax of every layer."""
    overrides, layers = installation.overrides, attention_layers(model)
    overrides.method(model, "input_to_embed", partial(_checked_input, model))
    overrides.entry(model.embed, partial(_noted, installation))
    serve(model, overrides)
    overrides.uncompiled(model, layers.values())
    for layer, attn in layers.items():
        install_attention(attn, partial(installation.origin, layer), overrides)
        never_dense(overrides, model.blocks[layer], attn.hook_attn_scores, layer)


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


def _noted(installation: Installation, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`embed` sees the tokens, whether they were given or made of texts; masks that are given come later, and count instead."""
    installation.note_tokens(args[0] if args else kwargs.get("tokens"))
    return args, kwargs


def _why_not_block(block: Module) -> str:
    found = len(parts_of(block, AbstractAttention))
    place = type(getattr(block, "attn", block))
    return f"its {name_of(place)} holds {found} of TransformerLens's attention modules; expected one"

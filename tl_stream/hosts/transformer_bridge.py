"""TransformerBridge (TransformerLens 3 and 4): Hugging Face models, and native ones, behind TransformerLens's hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from tl_stream.hosts.arguments import check_length, check_tokens, parameters
from tl_stream.hosts.bridge_attention import BridgeAttention
from tl_stream.hosts.bridge_steps import why_not_steps
from tl_stream.hosts.hf_interfaces import own_implementation, users_attention
from tl_stream.hosts.hooks import never_dense
from tl_stream.hosts.installation import Installation
from tl_stream.hosts.kv_cache import serve
from tl_stream.hosts.own_code import is_own, name_of, parts_of

_GROWING_ROPE = ("dynamic", "longrope")  # rotary positions that are made for more than n_ctx tokens

_KEYWORDS = {"device", "one_zero_attention_mask", "past_key_values", "return_dict", "use_past_kv_cache"}
"""What TransformerLens and transformers take out of `**kwargs` on the way, without naming it in a signature."""

_ANY_NUMBER = 2**63

_CACHE_NAMES = {"past_kv_cache", "cache"}  # HookedTransformer's and transformers 5.24's; unread, they would go unnoticed

_UNSUPPORTED = {
    "GlmMoeDsaAttentionBridge": "it chooses keys itself (DeepSeek sparse attention)",
}
"""Attention modules, by the names of their classes, whose code leaves no place for Stream."""


def why_not(model: Any) -> str | None:
    """Why a TransformerBridge can't be traced; None where it can."""
    config = getattr(model.original_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, whose attention isn't causal; only decoders can be traced"
    causal = model.cfg.attention_dir == "causal" if config is None else _is_decoder(config)
    if not causal or not getattr(model.adapter, "supports_causal_loss", True):
        return "its attention is bidirectional (an encoder, or a diffusion model); only causal attention can be made sparse"
    if getattr(config, "add_cross_attention", False):
        return "it reads another text (cross-attention); only attention to the text itself can be made sparse"
    if not attention_layers(model):
        return (
            "TransformerLens shows no softmax attention of its layers, no blocks.N.attn with hook_attn_scores and hook_pattern "
            "(a state space model, a recurrent one, or one whose attention it leaves inside a larger part)"
        )
    if _behind_another_bridge(model):
        return (
            "another TransformerBridge was booted around the same Hugging Face model afterwards, so that this one's hooks no "
            "longer fire; use that one, or boot each around a model of its own"
        )
    layers = attention_layers(model)
    for layer, block in enumerate(model.blocks):
        reason = _why_not_attention(model, block, layers[layer]) if layer in layers else _why_not_block(block)
        if reason:
            return f"layer {layer}: {reason}"
    return None


def keywords(model: Any) -> set[str]:
    """What a run takes beside the parameters of the bridge's own methods: those of the Hugging Face model and its parts."""
    modules = [each for each in model.original_model.modules() if isinstance(each, PreTrainedModel)]
    found = set().union(*(parameters(each.forward) for each in [model.original_model, *modules]))
    return found | set(TransformersKwargs.__annotations__) | _KEYWORDS


def attention_layers(model: Any) -> dict[int, AttentionBridge]:
    """The softmax attention of each layer that has one, whatever it is wrapped in."""
    found = {layer: _attentions(_place(block)) for layer, block in enumerate(getattr(model, "blocks", ()))}
    return {layer: parts[0] for layer, parts in found.items() if len(parts) == 1}


def install(model: Any, installation: Installation) -> None:
    """Put Stream between q . k and the softmax of every attention layer."""
    overrides, layers = installation.overrides, attention_layers(model)
    overrides.entry(model.original_model, partial(_check_input, model, installation))
    overrides.uncompiled(model.original_model, layers.values())
    serve(model, overrides)
    traced = []
    for layer, attn in layers.items():
        traced.append(BridgeAttention(attn, partial(installation.origin, layer), *_head_counts(model.cfg, attn)))
        traced[-1].install(overrides)
        never_dense(overrides, model.blocks[layer], attn.hook_attn_scores, layer)
    own_implementation(overrides, _configs(model, traced), partial(_attend, _by_module(traced)))


@contextmanager
def unchanged_on_error(run_arguments: dict[str, Any]) -> Iterator[None]:
    """What an interrupted run appended to a KV cache is taken back."""
    past = run_arguments.get("past_key_values", run_arguments.get("cache"))  # its name from transformers 5.24 on
    layers = getattr(past, "layers", None)
    if layers is None:
        yield
        return
    before = [(layer, dict(layer.__dict__)) for layer in layers]
    try:
        yield
    except BaseException:
        layers[:] = [layer for layer, _ in before]
        for layer, attributes in before:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
        raise


def _is_decoder(config: Any) -> bool:
    """Whether a Hugging Face config describes a decoder. (Families that can be both say `is_decoder`.)"""
    both = getattr(config, "model_type", None) in ("bert", "roberta")
    return bool(getattr(config, "is_decoder", False)) if both else bool(getattr(config, "is_causal", True))


def _behind_another_bridge(model: Any) -> bool:
    """Whether the modules that run are another bridge's, which holds this one's for the original ones."""
    wrapped = {each.original_component for each in model.original_model.modules() if isinstance(each, AttentionBridge)}
    return not wrapped.isdisjoint(attention_layers(model).values())


def _place(block: Module) -> Module | None:
    """Where a block has its attention: anywhere, in a block that isn't TransformerLens's."""
    return block._modules.get("attn", None if is_own(type(block)) else block)


def _attentions(place: Module | None) -> list[AttentionBridge]:
    if place is None or isinstance(place, AttentionBridge):
        return [] if place is None else [place]
    return [] if is_own(type(place)) else parts_of(place, AttentionBridge)


def _why_not_block(block: Module) -> str | None:
    """Layers without softmax attention run as they are."""
    place = _place(block)
    found = len(_attentions(place))
    if place is None or is_own(type(place)) or (place is block and not found):
        return None
    return f"its {name_of(type(place))} holds {found} of TransformerLens's attention modules; expected one"


def _why_not_attention(model: Any, block: Module, attn: AttentionBridge) -> str | None:
    if attn.is_cross_attention or getattr(attn.original_component, "is_cross_attention", False):
        return "it reads another text (cross-attention)"
    if not attn.is_causal or getattr(attn.original_component, "is_causal", None) is False:
        return "its attention is bidirectional; only causal attention can be made sparse"
    if attn.requires_relative_position_bias:
        return "its relative position bias (T5) is a learned query_pos x key_pos table"
    kind = type(attn.original_component).__name__
    unsupported = _UNSUPPORTED.get(type(attn).__name__) or _UNSUPPORTED.get(kind)
    running = block._modules.get("_original_component") or model.original_model
    if attn not in set(running.modules()):
        return f"its attention is not a part of the {type(running).__name__} that runs any more; another module is in its place"
    return unsupported or why_not_steps(attn, *_head_counts(model.cfg, attn))


def _head_counts(cfg: Any, attn: AttentionBridge) -> tuple[int, int]:
    """Query and key-value heads of one attention module."""
    n_heads = int(cfg.n_heads)
    groups = getattr(attn.original_component, "num_key_value_groups", None)
    if groups:
        return n_heads, n_heads // int(groups)
    return n_heads, int(getattr(cfg, "n_key_value_heads", None) or n_heads)


def _configs(model: Any, traced: list[BridgeAttention]) -> list[Any]:
    """Every Hugging Face config in which a traced module, or the code that makes its masks, looks up the implementation."""
    config = getattr(model.original_model, "config", None)
    found = [config, None if config is None else config.get_text_config()]
    found += [getattr(module, "config", None) for each in traced for module in each.attn.original_component.modules()]
    return list({id(one): one for one in found if hasattr(one, "_attn_implementation_internal")}.values())


def _by_module(traced: list[BridgeAttention]) -> dict[Module, BridgeAttention]:
    return {module: each for each in traced for module in each.attn.original_component.modules()}


def _attend(traced: dict[Module, BridgeAttention], module: Module, *args: Any, **kwargs: Any) -> Any:
    if module not in traced:
        raise NotImplementedError(
            f"A {type(module).__name__} outside the model's attention layers asked for attention; it can't be traced."
        )
    attend = users_attention(module)  # takes a product that is captured
    return traced[module].attend(*args, **kwargs) if attend is None else attend(module, *args, **kwargs)


def _check_input(model: Any, installation: Installation, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    tokens, embedded = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    limit = _limit(model.cfg, model.original_model)
    if isinstance(embedded, Tensor) and embedded.is_floating_point() and embedded.dim() == 3:
        check_length(embedded, limit)
    else:
        tokens = embedded if tokens is None else tokens  # a bridge takes any floats for embeddings
    if isinstance(tokens, Tensor):
        beyond = kwargs.get("pixel_values") is not None  # places of images may have numbers of their own
        check_tokens(tokens, _ANY_NUMBER if beyond else model.embed.W_E.shape[0], limit)
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask was a tensor of shape {tuple(attention_mask.shape)}; expected None or [batch, pos] with 0 for "
            "padding: a query_pos x key_pos mask can't be traced in linear memory. Knock entries out in hook_attn_scores."
        )
    installation.note_tokens(tokens if attention_mask is None else None)
    kind = type(model.original_model)
    for name in _CACHE_NAMES & kwargs.keys() - inspect.signature(kind.forward).parameters.keys():
        raise TypeError(f"{name} was given, which {kind.__name__} doesn't read; pass a KV cache as past_key_values.")
    return args, kwargs


def _limit(cfg: Any, module: Module) -> int:
    """The longest text: n_ctx, but for position schemes that grow with the text."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    grows = rope.get("rope_type") in _GROWING_ROPE or getattr(cfg, "positional_embedding_type", None) == "alibi"
    return 2**31 if grows else int(cfg.n_ctx)

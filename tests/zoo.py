"""Small random models, one for each way in which a HookedTransformer's attention can differ.

TransformerLens 4 has no HookedTransformer: there, bridges that compute in float64 throughout take the place of a few variants
(`test_families` has all others), and tests of the other variants are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from tl_stream import SparseActivationCache
from tl_stream.hosts import model_classes
from tl_stream.tensors.wrapper import SparseTensor

HAS_HOOKED = "hooked_transformer" in model_classes().values()
NEEDS_HOOKED = pytest.mark.skipif(not HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
BRIDGES = {"standard": "GPT-2", "gqa": "GPT-2", "rotary": "GPT-NeoX"}
GQA = {"n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 8},
    "gqa": GQA,
    "ungrouped gqa": {**GQA, "ungroup_grouped_query_attention": True},
    "soft-capped": {"attn_scores_soft_cap": 2.0},
    "alibi": {"positional_embedding_type": "alibi"},
    "local": {"use_local_attn": True, "attn_types": ["local", "global", "local"], "window_size": 9},
    "split qkv": {"use_split_qkv_input": True},
    "attn_in": {"use_attn_in": True},
    "attn_result": {"use_attn_result": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "qk-norm": {**GQA, "use_qk_norm": True},
    "sinks": {"use_attention_sinks": True},
    "layer-scaled": {"scale_attn_by_inverse_layer_idx": True},
    "parallel": {"parallel_attn_mlp": True},
}


def build(variant: str = "gqa", dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A 3-layer model of 4 heads with n_ctx 128; weights large enough for attention to be far from uniform."""
    if not HAS_HOOKED:
        return _bridge(variant, dtype, **overrides)
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings: dict[str, Any] = {
        "n_layers": 3, "d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 48, "n_ctx": 128, "d_vocab": 40,
        "act_fn": "gelu", "normalization_type": "LN", "seed": 0, "dtype": dtype, **VARIANTS[variant], **overrides,
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("W_Q", "W_K", "sinks", "w")) or "_W_K" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.5)
    return model.eval()


def _bridge(variant: str, dtype: torch.dtype, n_ctx: int = 128, **overrides: Any) -> Any:
    """The bridge that stands for a variant, with the same sizes; ends the test where there is none."""
    overrides = {name: value for name, value in overrides.items() if (name, value) != ("d_vocab", 40)}
    if variant not in BRIDGES or overrides:
        pytest.skip(f"HookedTransformer only, which transformer-lens 4 doesn't have: {variant} {overrides or ''}")
    return families.build(BRIDGES[variant], dtype, n_ctx)


def tokens(length: int = 61, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(text: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A text after `n` tokens of padding, and the attention mask of that."""
    padded = torch.cat([text.new_zeros(len(text), n), text], 1)
    return padded, (torch.arange(padded.shape[1]) >= n).long().expand(len(text), -1)


def mask_hooks(cache: SparseActivationCache) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
    """Hooks that make a dense model the masked one that a sparse run should equal."""
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def mask(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(~keep[hook.layer()], -torch.inf)

    return [(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in keep]


def dense(x: Any) -> Tensor:
    return x.to_dense() if isinstance(x, SparseTensor) else x


def gap(a: Any, b: Any) -> float:
    """Greatest absolute difference; equal infinities differ by 0, unequal ones by inf."""
    a, b = dense(a), dense(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = (x if x.is_floating_point() else x.double() for x in (a, b))
    difference = torch.where(a == b, torch.zeros_like(a), (a - b).abs())
    return difference.nan_to_num(nan=torch.inf).max().item() if a.numel() else 0.0

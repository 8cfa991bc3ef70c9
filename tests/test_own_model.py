"""A user's own Hugging Face model, whose attention calls `transformers`' attention interface, behind a plain bridge."""

from __future__ import annotations

from typing import Any

import architectures
import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import tl_stream
from tl_stream import StreamConfig

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
LENGTH = 61


class OwnAttention(nn.Module):
    """Grouped queries without positions; everything else is left to the attention interface."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.num_key_value_groups = 8, 2
        self.q_proj, self.o_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, pattern = attend(self, q, k, v, attention_mask, scaling=0.5, dropout=0.0)
        return self.o_proj(z.flatten(-2)), pattern


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer, block in enumerate(self.model.layers):
            block.self_attn = OwnAttention(config, layer)


class OwnAdapter(LlamaArchitectureAdapter):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        parts: Any = {name: LinearBridge(name=f"{name}_proj") for name in "qkvo"}
        attn = AttentionBridge(name="self_attn", config=self.cfg, submodules=parts, maintain_native_attention=True)
        assert self.component_mapping is not None
        self.component_mapping["blocks"].submodules["attn"] = attn


@pytest.fixture(scope="module")
def model() -> Any:
    ArchitectureAdapterFactory.register_adapter("OwnForCausalLM", OwnAdapter)
    torch.manual_seed(0)
    config: Any = LlamaConfig(**architectures.LLAMA)
    config._attn_implementation = "eager"
    hf = OwnForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return families.boot(hf)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@torch.no_grad()
def test_it_traces(model: Any) -> None:
    text = families.tokens(LENGTH)
    assert tl_stream.supports(model).layers == (0, 1, 2)
    logits, cache = model.run_with_sparse_cache(text, config=FULL)
    assert close(logits, model(text))
    assert cache["pattern", 1].shape == (2, 4, LENGTH, LENGTH)
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED)
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    with EditedAttention(keep, LENGTH, masked(keep)):
        assert close(logits, model(text))
    assert not close(logits, model(text))
    assert model.original_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
@torch.no_grad()
def test_its_hooks_count(model: Any, point: str) -> None:
    text, value = families.tokens(LENGTH), -torch.inf if "scores" in point else 0.0

    def knock_out(x: Tensor, hook: Any) -> Tensor:
        x[:, 2, 30:, :7] = value
        return x

    with tl_stream.sparse(model, FULL):
        logits = model.run_with_hooks(text, fwd_hooks=[(f"blocks.1.attn.{point}", knock_out)])

    def edit(layer: int, x: Tensor) -> Tensor:
        return knock_out(x.clone(), None) if layer == 1 else x

    on_scores, on_pattern = (edit, None) if "scores" in point else (None, edit)
    with EditedAttention(range(3), LENGTH, on_scores, on_pattern):
        expected = model(text)
    assert close(logits, expected)
    assert not close(logits, model(text))


@torch.no_grad()
def test_padding(model: Any) -> None:
    text = families.tokens(LENGTH)
    valid = torch.ones_like(text)
    valid[1, :11] = 0
    logits, _ = model.run_with_sparse_cache(text, config=FULL, attention_mask=valid)
    assert close(logits[valid.bool()], model(text, attention_mask=valid)[valid.bool()])

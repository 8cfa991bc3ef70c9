"""What can't be traced is refused before anything runs, says why, and is left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from architectures import GPT, LLAMA, MLA, NATIVE, VOCABULARY
from families import boot, build, tokens
from transformer_lens.model_bridge import TransformerBridge
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tl_stream

ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
MAMBA2 = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16}


def hugging_face(model: str, config: str, architecture: Any = None, **settings: Any) -> Callable[[], TransformerBridge]:
    def make() -> TransformerBridge:
        with patch.dict(ROPE_INIT_FUNCTIONS):  # some adapters put their own there
            hf_model = getattr(transformers, model)(getattr(transformers, config)(**settings))
            return boot(hf_model, architecture)

    return make


def cross_attention() -> TransformerBridge:
    bridge = build("GPT-2")
    bridge.blocks[1].attn.is_cross_attention = True
    return bridge


ENCODER_DECODER = "it is an encoder-decoder model, whose attention isn't causal; only decoders can be traced"
BIDIRECTIONAL = "its attention is bidirectional"
NOT_SHOWN = "TransformerLens shows no softmax attention of its layers, no blocks.N.attn with hook_attn_scores and hook_pattern"
REFUSED: dict[str, tuple[Callable[[], TransformerBridge], str]] = {
    "T5": (
        hugging_face("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1,
                     num_heads=4),
        ENCODER_DECODER,
    ),
    "BART": (hugging_face("BartForConditionalGeneration", "BartConfig", **BART), ENCODER_DECODER),
    "BERT": (hugging_face("BertForMaskedLM", "BertConfig", **ENCODER), BIDIRECTIONAL),
    "ViT": (
        hugging_face("ViTModel", "ViTConfig", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48),
        f"layer 0: {BIDIRECTIONAL}",
    ),
    "Dream (diffusion)": (hugging_face("Qwen2ForCausalLM", "Qwen2Config", "DreamModel", **LLAMA), BIDIRECTIONAL),
    "native, bidirectional": (
        lambda: TransformerBridge.boot_native({**NATIVE, "attention_dir": "bidirectional"}, device="cpu"), BIDIRECTIONAL,
    ),
    "Mamba": (
        hugging_face("MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1), NOT_SHOWN
    ),
    "Nemotron-H": (
        hugging_face("NemotronHForCausalLM", "NemotronHConfig", layers_block_type=["mamba", "attention"], head_dim=8, **MAMBA2,
                     **{**LLAMA, "num_hidden_layers": 2}),
        NOT_SHOWN,
    ),
    "RecurrentGemma": (
        hugging_face("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", block_types=["recurrent", "attention"], **LLAMA),
        NOT_SHOWN,
    ),
    "Zamba2": (
        hugging_face("Zamba2ForCausalLM", "Zamba2Config", layers_block_type=["mamba", "hybrid"], mamba_d_state=8,
                     n_mamba_heads=4, chunk_size=16, **{**LLAMA, "num_hidden_layers": 2}),
        NOT_SHOWN,
    ),
    "HRM-Text": (
        hugging_face("HrmTextForCausalLM", "HrmTextConfig", head_dim=8, **{**LLAMA, "num_hidden_layers": 2}), NOT_SHOWN
    ),
    "DeepSeek V4": (hugging_face("DeepseekV4ForCausalLM", "DeepseekV4Config", **LLAMA), NOT_SHOWN),
    "GLM-5 (DeepSeek sparse attention)": (
        hugging_face("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", **{**LLAMA, **MLA}),
        "layer 0: it chooses keys itself (DeepSeek sparse attention)",
    ),
    "cross-attention in the config": (
        hugging_face("GPT2LMHeadModel", "GPT2Config", add_cross_attention=True, **GPT),
        "it reads another text (cross-attention)",
    ),
    "cross-attention": (cross_attention, "layer 1: it reads another text (cross-attention)"),
}  # fmt: skip


def state(model: Any) -> list[Any]:
    """Everything that tracing changes: attributes of modules and their hooks, and the attention implementation."""
    modules = [model, *model.modules()]
    hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules]
    configs = [getattr(module, "config", None) for module in modules]
    chosen = [getattr(config, "_attn_implementation_internal", None) for config in configs]
    return [[sorted(vars(module)) for module in modules], hooks, chosen]


@pytest.mark.parametrize("name", REFUSED)
def test_models(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    before = state(model)
    support = tl_stream.supports(model)
    assert not support
    assert support.layers == ()
    assert support.reason is not None
    assert f"model can't be traced: {reason}" in support.reason
    with pytest.raises(ValueError, match=re.escape(f"model can't be traced: {reason}")), tl_stream.sparse(model):
        pass
    with pytest.raises(ValueError, match=re.escape(reason)):
        model.run_with_sparse_cache(tokens())
    assert state(model) == before


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "gpt2"], ids=["module", "None", "name"])
def test_no_models(model: Any) -> None:
    text = f"model was a {type(model).__name__}; expected a "
    with pytest.raises(TypeError, match=text):
        tl_stream.run_with_sparse_cache(model, tokens())
    with pytest.raises(TypeError, match=text), tl_stream.sparse(model):
        pass
    support = tl_stream.supports(model)
    assert not support
    assert text in str(support.reason)
    assert "TransformerBridge of transformer_lens" in str(support.reason)


def test_remote_bridges() -> None:
    module = pytest.importorskip("transformer_lens.model_bridge.remote_bridge")
    remote = object.__new__(module.RemoteBridge)
    text = "model was a RemoteBridge; .* remote drivers don't compute attention here"
    with pytest.raises(TypeError, match=text):
        tl_stream.run_with_sparse_cache(remote, tokens())
    assert re.search(text, str(tl_stream.supports(remote).reason))


@pytest.mark.parametrize(
    ("name", "layers"), [("Llama", (0, 1, 2)), ("GPT-2", (0, 1, 2)), ("Native", (0, 1, 2)), ("Jamba", (1,))]
)
def test_supported_models(name: str, layers: tuple[int, ...]) -> None:
    support = tl_stream.supports(build(name))
    assert support
    assert support.layers == layers
    assert support.reason is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["GPT-2", "GPT-J", "Llama", "Gemma 3", "Native"])
def test_attention_masks_of_query_pos_x_key_pos(name: str, dtype: torch.dtype) -> None:
    model, text = build(name), tokens(9)
    logits, _ = model.run_with_cache(text)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"attention_mask was a tensor of shape \(2, 1, 9, 9\); expected None or \[batch, pos\]"
    ):
        model.run_with_sparse_cache(text, attention_mask=torch.ones(2, 1, 9, 9).tril().to(dtype))
    assert state(model) == before
    assert torch.equal(model(text), logits)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "OPT", "BLOOM"])
def test_attention_dropout(name: str) -> None:
    model, text = build(name), tokens(9)
    for module in model.original_model.modules():
        for probability in {"p", "dropout", "attention_dropout"} & set(vars(module)):
            setattr(module, probability, 0.3)
    logits, _ = model.run_with_cache(text)
    before = state(model)
    model.train()
    with pytest.raises(NotImplementedError, match=r"training mode with an attention dropout of 0.3; call model.eval\(\)"):
        model.run_with_sparse_cache(text)
    model.eval()
    assert state(model) == before
    assert torch.equal(model(text), logits)
    model.run_with_sparse_cache(text)

"""Small random models of every family of decoders, built from their Hugging Face configs and booted as TransformerBridge."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
N_CTX = 128
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": N_CTX, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": N_CTX, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@dataclass(frozen=True)
class Family:
    """How a model of one family is built.

    Attributes:
        config: Name of its config class in transformers.
        settings: What the config is made with, beside or instead of `base`.
        base: Settings in the family's own words.
        note: What is special about it.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: LLAMA)
    note: str = ""


FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2Config", {}, GPT),
    "GPT-Neo": Family(
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "max_position_embeddings": N_CTX, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global", "local"], 1]], "window_size": 27},
        {}, "local layers",
    ),
    "GPT-J": Family("GPTJConfig", {"rotary_dim": 4}, GPT),
    "GPT-NeoX": Family("GPTNeoXConfig", {"rotary_pct": 0.5, "num_key_value_heads": 4}),
    "GPT-BigCode": Family("GPTBigCodeConfig", {}, GPT, "multi-query"),
    "CodeGen": Family("CodeGenConfig", {"rotary_dim": 4}, GPT),
    "OPT": Family("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": Family(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, "seq_length": N_CTX}, {}, "ALiBi",
    ),
    "Falcon": Family("FalconConfig", {"multi_query": True, "num_key_value_heads": 1}, note="multi-query"),
    "Falcon (ALiBi)": Family(
        "FalconConfig", {"alibi": True, "multi_query": False, "num_key_value_heads": 4, "parallel_attn": False}, note="ALiBi"
    ),
    "MPT": Family(
        "MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": N_CTX}, {}, "ALiBi"
    ),
    "Llama": Family("LlamaConfig"),
    "Llama 3": Family(
        "LlamaConfig",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        note="rope scaling",
    ),
    "Llama, YaRN": Family("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "Llama, dynamic NTK": Family("LlamaConfig", {**rope("dynamic", factor=2.0), "max_position_embeddings": 32}),
    "Llama, linear": Family("LlamaConfig", rope("linear", factor=4.0)),
    "Mistral": Family("MistralConfig", {"sliding_window": 27}, note="sliding window"),
    "Mixtral": Family("MixtralConfig", {"num_local_experts": 4, "sliding_window": 27}, note="experts, sliding window"),
    "Ministral 3": Family("Ministral3Config"),
    "Qwen2": Family("Qwen2Config"),
    "Qwen2-MoE": Family("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3": Family("Qwen3Config"),
    "Qwen3-MoE": Family("Qwen3MoeConfig", EXPERTS),
    "Gemma": Family("GemmaConfig"),
    "Gemma 2": Family("Gemma2Config", {"sliding_window": 27, "query_pre_attn_scalar": 8}, note="soft-cap, alternating windows"),
    "Gemma 3": Family("Gemma3TextConfig", {"sliding_window": 27, "query_pre_attn_scalar": 8}, note="alternating windows"),
    "Phi": Family("PhiConfig"),
    "Phi-3": Family("Phi3Config"),
    "OLMo": Family("OlmoConfig"),
    "OLMo-2": Family("Olmo2Config"),
    "OLMo-3": Family("Olmo3Config", {"sliding_window": 27}),
    "OLMoE": Family("OlmoeConfig", EXPERTS),
    "StableLM": Family("StableLmConfig"),
    "Cohere": Family("CohereConfig"),
    "Cohere 2": Family("Cohere2Config", {"sliding_window": 27}),
    "GPT-OSS": Family(
        "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 27}, note="attention sinks"
    ),
    "DeepSeek V2": Family("DeepseekV2Config", MLA, note="MLA"),
    "DeepSeek V3": Family("DeepseekV3Config", MLA, note="MLA"),
    "SmolLM3": Family("SmolLM3Config"),
    "Granite": Family("GraniteConfig"),
    "Granite-MoE": Family("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "StarCoder2": Family("Starcoder2Config", {"sliding_window": None}),
    "GLM": Family("GlmConfig"),
    "GLM-4": Family("Glm4Config"),
    "Nemotron": Family("NemotronConfig"),
    "ERNIE 4.5": Family("Ernie4_5Config"),
    "Exaone 4": Family("Exaone4Config", {"sliding_window": 27}),
    "HunYuan": Family("HunYuanDenseV1Config", {"head_dim": 8}),
    "Seed-OSS": Family("SeedOssConfig"),
    "Apertus": Family("ApertusConfig"),
    "Arcee": Family("ArceeConfig"),
}  # fmt: skip


@functools.cache
def folder() -> str:
    """A folder with a word-level tokenizer."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    path = tempfile.mkdtemp()
    tokenizer.save_pretrained(path)
    return path


def build_hf(name: str, dtype: torch.dtype = torch.float32, n_ctx: int | None = None) -> Any:
    """The Hugging Face model of a family, with weights large enough for attention to be far from uniform."""
    family = FAMILIES[name]
    settings = {**family.base, **family.settings}
    if n_ctx is not None:
        settings[next(key for key in _LENGTHS if key in settings)] = n_ctx
    config = getattr(transformers, family.config)(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.15)
    return model


def build(name: str, dtype: torch.dtype = torch.float32, n_ctx: int | None = None) -> Any:
    """A bridge around a small random model of a family."""
    return boot(build_hf(name, dtype, n_ctx))


def boot(model: Any) -> Any:
    """A bridge around a Hugging Face model."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder())
    return TransformerBridge.boot_transformers(
        folder(), hf_model=model, tokenizer=tokenizer, dtype=model.dtype, device="cpu"
    ).eval()


def tokens(length: int = 61, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

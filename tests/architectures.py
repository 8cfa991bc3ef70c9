"""Every family of decoders, by the config of a small model of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from packaging.version import Version

VOCABULARY = 64
N_CTX = 128
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
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
CONVOLUTIONS = ["conv", "full_attention", "conv"]
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
GEMMA_4 = {
    "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "sliding_window": 27, "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
CLIP = {**VISION, "model_type": "clip_vision_model"}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
NATIVE = {
    "n_layers": 3, "d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 48, "n_ctx": N_CTX, "d_vocab": VOCABULARY,
    "act_fn": "gelu", "normalization_type": "LN", "seed": 0,
}  # fmt: skip
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
NO_CACHE = {"KV cache": "native models keep none"}
TRANSFORMER_LENS_3 = Version(version("transformer-lens")) < Version("4")
TRANSFORMERS_5_24 = Version(version("transformers")) >= Version("5.24")
ALIBI_STEPS = (
    dict.fromkeys(("cached steps", "KV cache"), "TransformerLens 3 gives them a wrong ALiBi") if TRANSFORMER_LENS_3 else {}
)
NO_BUFFER = {"forward": "TransformerLens reads a buffer that transformers 5.24 doesn't have"} if TRANSFORMERS_5_24 else {}
NO_CONVOLUTION = (
    {"forward": "TransformerLens 3 calls a convolution that transformers 5.24 doesn't have"}
    if TRANSFORMER_LENS_3 and TRANSFORMERS_5_24
    else {}
)
BAMBA_POSITIONS = "without position_ids transformers counts them from 0 again"
COMPATIBLE = "compatibility mode"
UNCAUSAL = "shows every query the keys after it"


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@dataclass(frozen=True)
class Family:
    """How a model of one family is built.

    Attributes:
        config: Name of its config class in transformers; "native": TransformerLens's own model.
        settings: What the config is made with, beside or instead of `base`.
        base: Settings in the family's own words.
        note: What is special about it.
        model: Name of its model class, where transformers doesn't take it for a causal language model.
        architecture: What its checkpoints call it, where the class has another name.
        compatibility: Whether the bridge is in compatibility mode (layer norms folded, weights centred).
        library: A library that TransformerLens needs for it, beyond its own dependencies.
        lacks: What the untraced model can't do either, and why: "forward", "generation", "KV cache" (give it several tokens),
            "cached steps" (of `generate`, which is refused), "float64".
        refuses: Sides of padding that can't be traced, and what the error says.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: LLAMA)
    note: str = ""
    model: str | None = None
    architecture: str | None = None
    compatibility: bool = False
    library: str | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)


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
    "CodeGen": Family("CodeGenConfig", {"rotary_dim": 4}, GPT, lacks=NO_BUFFER),
    "OPT": Family("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": Family(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, "seq_length": N_CTX}, {}, "ALiBi",
    ),
    "Falcon": Family("FalconConfig", {"multi_query": True, "num_key_value_heads": 1}, note="multi-query"),
    "Falcon (ALiBi)": Family(
        "FalconConfig", {"alibi": True, "multi_query": False, "num_key_value_heads": 4, "parallel_attn": False}, note="ALiBi",
        lacks=ALIBI_STEPS,
    ),
    "MPT": Family(
        "MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": N_CTX}, {}, "ALiBi",
        lacks=ALIBI_STEPS,
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
        "GptOssConfig", {**LOCAL_EXPERTS, "sliding_window": 27}, note="attention sinks"
    ),
    "DeepSeek V2": Family("DeepseekV2Config", MLA, note="MLA"),
    "DeepSeek V3": Family("DeepseekV3Config", MLA, note="MLA"),
    "SmolLM3": Family("SmolLM3Config"),
    "Granite": Family("GraniteConfig"),
    "Granite-MoE": Family("GraniteMoeConfig", LOCAL_EXPERTS),
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
    "GPT-1": Family(
        "OpenAIGPTConfig", {}, GPT, lacks={"KV cache": "the model keeps none"}, refuses={"left": UNCAUSAL, "right": UNCAUSAL}
    ),
    "GPT-2, scaled by layer": Family(
        "GPT2Config", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, GPT
    ),
    "BERT decoder": Family(
        "BertConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": N_CTX, "is_decoder": True}, {},
        lacks={"generation": "TransformerLens doesn't generate with BERT"},
    ),
    "ModernBERT decoder": Family("ModernBertDecoderConfig", {"local_attention": 54}, note="alternating windows"),
    "XGLM": Family(
        "XGLMConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48,
         "max_position_embeddings": N_CTX}, {}, "batch and heads merged",
        lacks={"float64": "its code makes the smallest score in float32"},
    ),
    "Jais 2": Family("Jais2Config"),
    "BitNet": Family("BitNetConfig"),
    "NanoChat": Family("NanoChatConfig"),
    "VaultGemma": Family(
        "VaultGemmaConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 27},
        note="soft-cap, alternating windows",
    ),
    "Gemma 4": Family("Gemma4TextConfig", GEMMA_4, note="alternating windows, shared keys and values"),
    "Llama 4": Family(
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 27, "intermediate_size_mlp": 48,
         "no_rope_layers": [1, 1, 0], "floor_scale": 16},
        note="experts, chunked attention", refuses={"left": "chunks of attention that begin at different positions"},
    ),
    "Phi-MoE": Family("PhimoeConfig", LOCAL_EXPERTS, note="experts", architecture="PhiMoEForCausalLM"),
    "FlexOlmo": Family("FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}, note="experts"),
    "GLM-4-MoE": Family("Glm4MoeConfig", {**EXPERTS, "n_routed_experts": 4, "head_dim": 8}, note="experts"),
    "GLM-4-MoE-Lite": Family("Glm4MoeLiteConfig", MLA, note="MLA, experts"),
    "Youtu": Family("YoutuConfig", MLA, note="MLA"),
    "MiniMax-M2": Family("MiniMaxM2Config", {**LOCAL_EXPERTS, "head_dim": 8}, note="experts"),
    "ERNIE 4.5 MoE": Family(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}, note="experts",
    ),
    "JetMoe": Family("JetMoeConfig", {"kv_channels": 8, **LOCAL_EXPERTS}, note="experts for queries"),
    "Laguna": Family(
        "LagunaConfig", {**EXPERTS, "head_dim": 8, "sliding_window": 27, "shared_expert_intermediate_size": 16}, note="experts"
    ),
    "AfMoE": Family(
        "AfmoeConfig",
        {**EXPERTS, "head_dim": 8, "sliding_window": 27, "num_shared_experts": 1, "global_attn_every_n_layers": 2},
        note="experts, alternating windows",
    ),
    "Jamba": Family(
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
        note="Mamba in other layers",
        lacks={"KV cache": "transformers drops the state of its Mamba layers where more than one token follows"},
    ),
    "Bamba": Family(
        "BambaConfig", {**MAMBA2, "attn_layer_indices": [1]}, note="Mamba 2 in other layers",
        lacks={"KV cache": BAMBA_POSITIONS, "cached steps": BAMBA_POSITIONS},
    ),
    "Falcon-H1": Family("FalconH1Config", {**MAMBA2, "mamba_d_ssm": 64}, note="Mamba 2 beside the attention"),
    "Granite-MoE hybrid": Family(
        "GraniteMoeHybridConfig",
        {**MAMBA2, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2, "shared_intermediate_size": 16,
         "position_embedding_type": "rope"},
        note="Mamba 2 in other layers",
    ),
    "LFM2": Family("Lfm2Config", {"layer_types": CONVOLUTIONS}, note="convolutions in other layers"),
    "LFM2-MoE": Family(
        "Lfm2MoeConfig", {**EXPERTS, "layer_types": CONVOLUTIONS, "num_dense_layers": 1}, note="convolutions in other layers"
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig", {**SHARED_EXPERT, **DELTA}, note="delta nets in other layers", lacks=NO_CONVOLUTION
    ),
    "Qwen3.5": Family(
        "Qwen3_5TextConfig", DELTA, note="delta nets in other layers", lacks=NO_CONVOLUTION
    ),
    "Qwen3.5-MoE": Family(
        "Qwen3_5MoeTextConfig", {**SHARED_EXPERT, **DELTA}, note="delta nets in other layers", lacks=NO_CONVOLUTION
    ),
    "OLMo hybrid": Family(
        "OlmoHybridConfig", DELTA, note="delta nets in other layers",
        lacks={"generation": "TransformerLens imports a cache class that transformers 5 doesn't have"},
    ),
    "LLaVA": Family(
        "LlavaConfig", {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP}, {}, "text only",
        "LlavaForConditionalGeneration",
    ),
    "Mistral 3": Family(
        "Mistral3Config",
        {"text_config": {**LLAMA, "model_type": "mistral", "head_dim": 8},
         "vision_config": {**VISION, "model_type": "pixtral"}}, {}, "text only", "Mistral3ForConditionalGeneration",
    ),
    "Gemma 3, multimodal": Family(
        "Gemma3Config",
        {"text_config": {**LLAMA, "sliding_window": 27, "query_pre_attn_scalar": 8, "head_dim": 8},
         "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
        {}, "text only", "Gemma3ForConditionalGeneration",
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLConfig", {"text_config": {**LLAMA, **MROPE}, "vision_config": QWEN_VISION}, {}, "text only",
        "Qwen2_5_VLForConditionalGeneration", library="torchvision",
    ),
    "Qwen3-VL": Family(
        "Qwen3VLConfig",
        {"text_config": {**LLAMA, "head_dim": 8, **MROPE}, "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}},
        {}, "text only", "Qwen3VLForConditionalGeneration", library="torchvision",
    ),
    "Native": Family("native", {}, NATIVE, lacks=NO_CACHE),
    "Native, rotary": Family(
        "native", {**ROTARY, "n_key_value_heads": 2, "normalization_type": "RMS", "gated_mlp": True}, NATIVE, lacks=NO_CACHE
    ),
    "Native, soft-cap": Family("native", {"attn_scores_soft_cap": 2.0}, NATIVE, "soft-cap", lacks=NO_CACHE),
    "Native, attention only": Family("native", {"attn_only": True, "normalization_type": "LNPre"}, NATIVE, lacks=NO_CACHE),
    "GPT-2, compatible": Family("GPT2Config", {}, GPT, COMPATIBLE, compatibility=True),
    "Llama, compatible": Family("LlamaConfig", note=COMPATIBLE, compatibility=True),
    "Gemma 2, compatible": Family(
        "Gemma2Config", {"sliding_window": 27, "query_pre_attn_scalar": 8}, note=COMPATIBLE, compatibility=True
    ),
    "Native, compatible": Family("native", ROTARY, NATIVE, COMPATIBLE, compatibility=True, lacks=NO_CACHE),
}  # fmt: skip

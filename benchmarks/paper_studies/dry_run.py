"""Small models with random weights, in the likeness of the two that the paper studied, saved as folders.

A layer, a head, a window and a tokenizer of each kind that the real ones have, so that the same code runs on both: Gemma 3's
five local layers to a global one, one key-value head, byte fallback, a BOS, its turns; DeepSeek-R1-Distill-Qwen's grouped
queries with biases, byte-level pairs, `<think>`.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tl_stream.tasks.filler import essays
from tl_stream.tasks.vocabulary import KEYS, NAMES, NOISE

N_CTX = 4096
VOCABULARY = 1500
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ('<|User|>' if message['role'] == 'user' else '<|Assistant|>') + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


def save_gemma(folder: Path) -> None:
    """A Gemma 3 with random weights, and its tokenizer."""
    tokenizer = gemma_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=128,
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        max_position_embeddings=N_CTX,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(Gemma3ForCausalLM, config, tokenizer, folder)


def save_qwen(folder: Path) -> None:
    """A Qwen2 with random weights, and a tokenizer as DeepSeek-R1-Distill-Qwen has it."""
    tokenizer = qwen_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _save(Qwen2ForCausalLM, config, tokenizer, folder)


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gemma_tokenizer() -> Any:
    """Pieces with byte fallback, BOS first, no space before a text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    vocabulary, merges = _trained(trained, special_tokens=[*special, *single_bytes])
    tokenizer = GemmaTokenizer(vocabulary, merges, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"])
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def qwen_tokenizer() -> Any:
    """Byte-level pairs, one digit a token; BOS first, as DeepSeek has it."""
    bos, eos = "<|begin▁of▁sentence|>", "<|end▁of▁sentence|>"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary, merges = _trained(trained, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocabulary, merges, bos_token=bos, eos_token=eos, pad_token=eos, add_bos_token=True)
    tokenizer.add_tokens(["<|User|>", "<|Assistant|>", "<think>", "</think>"])
    tokenizer.chat_template = R1_TEMPLATE
    return tokenizer


def _trained(tokenizer: Tokenizer, **begin: Any) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges, learnt from the texts of the package's tasks."""
    texts = [*essays(), *NOISE, " ".join(KEYS), " ".join(NAMES), string.printable]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **begin))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]

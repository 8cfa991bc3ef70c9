"""How much memory a sparse run of a Llama-shaped TransformerBridge takes: `python benchmarks/bridge_memory.py [--tokens N]`.

A model with random weights (4 layers, d_model 256, 4 heads of 64 over 2 key-value heads, gated MLP of 1,024) reads the tokens
once, with the patterns of all layers cached. First, at 1,024 tokens, the logits are checked against the dense model masked
with the blocks kept. Peak memory is that of the process; "before" is what it was with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM

import tl_stream
from tl_stream import StreamConfig
from tl_stream.cache import is_pattern

CONFIG = StreamConfig(block_q=64, block_k=64, k=16, estimator="dual", beam=2, leaf_queries=4, max_dense=0)


def build(n_ctx: int) -> Any:
    """The bridge, with the bundled model's tokenizer."""
    tokenizer = tl_stream.models.load_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=n_ctx,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = LlamaForCausalLM(config).eval()
        return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu").eval()


def check(model: Any, vocabulary: int) -> float:
    """Greatest difference to the masked dense model, relative to its largest logit."""
    tokens = torch.randint(0, vocabulary, (1, 1024))
    logits, cache = model.run_with_sparse_cache(tokens, config=CONFIG, names_filter=is_pattern)
    keep = {f"blocks.{layer}.attn.hook_attn_scores": cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def mask(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.masked_fill(~keep[hook.name], -torch.inf)

    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, mask) for name in keep])
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def peak_bytes() -> int:
    """The most memory that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = build(arguments.tokens)
    vocabulary = model.cfg.d_vocab
    error = check(model, vocabulary)
    if error > 1e-4:
        raise SystemExit(f"The sparse model differs from the masked dense one by {error:.1e}; no figures.")
    before = peak_bytes()
    tokens = torch.randint(0, vocabulary, (1, arguments.tokens))
    _, cache = model.run_with_sparse_cache(tokens, config=CONFIG, names_filter=is_pattern, logits_to_keep=1)
    result = {
        "tokens": arguments.tokens,
        "peak_bytes": peak_bytes(),
        "before_bytes": before,
        "cache_bytes": cache.nbytes,
        "pruned": cache.pruned,
        "error_at_1024": error,
        "versions": {"torch": torch.__version__, "transformer_lens": version("transformer-lens")},
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Head scores against TransformerLens's definitions on dense patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformer_lens import head_detector
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import head_scores

LENGTH = 61
FULL = StreamConfig(block_q=8, block_k=8, k=100, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
DETECTED = {"previous_token": "previous_token_head", "duplicate_token": "duplicate_token_head", "induction": "induction_head"}


def check(pattern: Tensor, text: Tensor, scores: Any, layer: int) -> None:
    """Each score recomputed from the dense pattern `[batch, head_index, query_pos, key_pos]`."""
    for head in (head for head in scores.heads if head.layer == layer):
        dense = pattern[head.text, head.head].double()
        for name, known_as in DETECTED.items():
            wanted = getattr(head_detector, f"get_{known_as}_detection_pattern")(text[head.text : head.text + 1])
            expected = head_detector.compute_head_attention_similarity_score(
                dense, wanted, exclude_bos=False, exclude_current_token=False, error_measure="mul"
            )
            assert getattr(head, name) == pytest.approx(expected, abs=1e-6)
        assert head.sink == pytest.approx(float(dense[:, 0].mean()), abs=1e-6)
        assert head.entropy == pytest.approx(float(-torch.special.xlogy(dense, dense).sum(-1).mean()), abs=1e-6)


@pytest.mark.parametrize("config", [FULL, PRUNED, replace(PRUNED, dense_layers=1)], ids=["full", "pruned", "a dense layer"])
@pytest.mark.parametrize("variant", ["gqa", "alibi", "local", "soft-capped", "sinks"])
@torch.no_grad()
def test_scores_equal_transformer_lenss(variant: str, config: StreamConfig) -> None:
    text = tokens(LENGTH) % 7
    _, cache = build(variant).run_with_sparse_cache(text, config=config)
    scores = head_scores(cache, text)
    assert len(scores.heads) == 2 * 3 * 4
    for layer, pattern in cache.patterns.items():
        check(pattern.to_dense(), text, scores, layer)
    assert not cache.fallbacks
    assert scores.exact_for == "the sparse model"


@NEEDS_HOOKED
@torch.no_grad()
def test_scores_equal_detect_head_on_the_bundled_model() -> None:
    model: Any = tl_stream.models.load(host="hooked")
    text = tl_stream.tasks.niah_single_1(model.tokenizer, 128, seed=3).prompt
    tokens = model.to_tokens(text)
    for config in (replace(FULL, block_q=32), replace(FULL, k=8, forward="exact")):
        _, cache = model.run_with_sparse_cache(tokens, config=config)
        scores = {(head.layer, head.head): head for head in head_scores(cache, tokens).heads}
        for name, known_as in DETECTED.items():
            expected = head_detector.detect_head(model, text, known_as) if config.forward == "sparse" else None
            for (layer, head), score in scores.items() if expected is not None else ():
                assert getattr(score, name) == pytest.approx(float(expected[layer, head]), abs=1e-5)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "GPT-OSS", "DeepSeek V3"])
@torch.no_grad()
def test_families_on_the_bridge(family: str) -> None:
    text = families.tokens(LENGTH)
    _, cache = families.build(family, torch.float64 if family == "Llama" else torch.float32).run_with_sparse_cache(
        text, config=PRUNED
    )
    scores = head_scores(cache, text)
    for layer, pattern in cache.patterns.items():
        check(pattern.to_dense(), text, scores, layer)

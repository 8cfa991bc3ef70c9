"""Head scores against TransformerLens's definitions on dense patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformer_lens import head_detector
from zoo import NEEDS_HOOKED, build, left_padded, tokens

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
    for config in (replace(FULL, block_q=32), replace(FULL, forward="exact")):
        _, cache = model.run_with_sparse_cache(tokens, config=config)
        scores = {(head.layer, head.head): head for head in head_scores(cache, tokens).heads}
        for name, known_as in DETECTED.items():
            wanted = getattr(head_detector, f"get_{known_as}_detection_pattern")(tokens)
            expected = head_detector.detect_head(model, text, wanted)
            for (layer, head), score in scores.items():
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


@torch.no_grad()
def test_the_exact_forward_scores_its_record() -> None:
    text = tokens(LENGTH) % 7
    _, cache = build().run_with_sparse_cache(text, config=replace(PRUNED, forward="exact"))
    scores = head_scores(cache, text)
    for layer, pattern in cache.patterns.items():
        check(pattern.to_dense(), text, scores, layer)
    assert scores.exact_for == "the real model, its recorded entries alone"


@torch.no_grad()
def test_previous_token_and_induction_are_the_known_diagonals() -> None:
    """On a sequence of random tokens and its repetition, in which no token stands twice otherwise."""
    half = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:20]
    text = torch.cat([half, half])[None]
    _, cache = build("rotary").run_with_sparse_cache(text, config=FULL)
    for head in head_scores(cache, text).heads:
        pattern = cache["pattern", head.layer].to_dense()[0, head.head]
        assert head.previous_token == pytest.approx(float(pattern.diagonal(-1).sum()) / 40, abs=1e-6)
        assert head.induction == pytest.approx(float(pattern.diagonal(1 - 20).sum() - pattern[19, 0]) / 40, abs=1e-6)
        assert head.duplicate_token == pytest.approx(float(pattern.diagonal(-20).sum()) / 40, abs=1e-6)


def copied(pattern: Tensor, text: Tensor, needle: range, answer: range) -> float:
    """Wu et al.'s count, as their code loops."""
    score = 0.0
    for position in answer:
        top = int(pattern[position - 1].argmax())
        if top in needle and text[top] == text[position]:
            score += 1 / len(needle)
    return score


@torch.no_grad()
def test_retrieval_counts_copied_tokens() -> None:
    text = tokens(LENGTH) % 5
    for config in (FULL, PRUNED):
        _, cache = build().run_with_sparse_cache(text, config=config)
        found = 0.0
        for head in head_scores(cache, text, needle=slice(4, 24), answer=range(30, LENGTH)).heads:
            pattern = cache["pattern", head.layer].to_dense()[head.text, head.head]
            assert head.retrieval == pytest.approx(copied(pattern, text[head.text], range(4, 24), range(30, LENGTH)))
            found += head.retrieval or 0.0
        assert found > 0


@torch.inference_mode()
def test_the_bundled_models_retrieval_heads() -> None:
    """Its second layer copies the number, its first reads the previous token."""
    model: Any = tl_stream.models.load()
    task = tl_stream.tasks.niah_single_1(model.tokenizer, 1024, depth=0.3, seed=5)
    text = model.to_tokens(f"{task.prompt} {task.answer}")
    _, cache = model.run_with_sparse_cache(text, config=StreamConfig(k=6), logits_to_keep=1)
    scores = head_scores(cache, text, needle=task.value, answer=slice(1024, text.shape[1]))
    assert scores.top("previous_token", 1)[0].layer == 0
    assert scores.top("previous_token", 1)[0].previous_token > 0.9
    best = scores.top("retrieval", 2)
    assert all(head.layer == 1 and (head.retrieval or 0) > 0.8 for head in best)


@NEEDS_HOOKED
@torch.no_grad()
def test_padding_is_left_out() -> None:
    model = build("rotary", default_prepend_bos=False)
    text = tokens(40, batch=1)
    padded, mask = left_padded(text, 8)
    config = replace(PRUNED, k=100)
    _, alone = model.run_with_sparse_cache(text, config=config)
    _, cache = model.run_with_sparse_cache(padded, config=config, attention_mask=mask)
    for a, b in zip(head_scores(alone, text).heads, head_scores(cache, padded).heads, strict=True):
        for name in (*DETECTED, "sink", "entropy"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-6)


@torch.no_grad()
def test_shown_as_table_and_frame() -> None:
    text = tokens(LENGTH)
    _, cache = build().run_with_sparse_cache(text, config=PRUNED)
    scores = head_scores(cache, text)
    assert scores.table().row_count == len(scores.to_dataframe()) == len(scores.heads) == 24
    assert scores.heads[0].retrieval is None
    assert [head.sink for head in scores.top("sink", 3)] == sorted((head.sink for head in scores.heads), reverse=True)[:3]
    with pytest.raises(ValueError, match="kind was 'retrieval', which needs a needle"):
        scores.top("retrieval")
    with pytest.raises(ValueError, match="kind was 'copy'; expected one of previous_token"):
        scores.top("copy")


@torch.no_grad()
def test_bad_arguments() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=PRUNED)
    with pytest.raises(ValueError, match=r"tokens were of shape \(2, 60\); expected \(2, 61\)"):
        head_scores(cache, text[:, 1:])
    with pytest.raises(TypeError, match="tokens was str; expected the run's token ids"):
        head_scores(cache, "a text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected both, or neither"):
        head_scores(cache, text, needle=slice(3, 5))
    with pytest.raises(ValueError, match="answer began at token 4; expected it after the needle, from 5 on"):
        head_scores(cache, text, needle=slice(3, 5), answer=slice(4, 9))
    with pytest.raises(ValueError, match="needle was tokens 3 to 99"):
        head_scores(cache, text, needle=slice(3, 99), answer=slice(4, 9))
    with pytest.raises(TypeError, match="cache was a dict; expected a SparseActivationCache"):
        head_scores({}, text)
    _, slices = model.run_with_sparse_cache(text, config=PRUNED, pos_slice=slice(5, 20))
    with pytest.raises(ValueError, match="expected that of a whole text"):
        head_scores(slices, text)

"""Keeping the blocks of one run in another, and freezing its patterns."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
LENGTH = 61


@pytest.fixture(scope="module")
def model() -> Any:
    return families.build("Llama")


def kept(cache: Any) -> dict[int, Tensor]:
    return {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}


@torch.no_grad()
def test_a_run_on_the_blocks_of_another(model: Any) -> None:
    clean, corrupted = families.tokens(LENGTH), families.tokens(LENGTH, seed=1)
    _, cache = model.run_with_sparse_cache(clean, config=CONFIG)
    config = StreamConfig(layout_from=cache, max_dense=0)
    logits, frozen = model.run_with_sparse_cache(corrupted, config=config)
    for layer, keep in kept(cache).items():
        assert torch.equal(frozen.block_layout(layer).to_dense(), keep)
    with EditedAttention(kept(cache), LENGTH, masked(kept(cache))):
        expected = model(corrupted)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (logits - model.run_with_sparse_cache(corrupted, config=CONFIG)[0]).abs().max() > 0.01


@torch.no_grad()
def test_one_text_gives_its_blocks_to_a_batch(model: Any) -> None:
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH, batch=1), config=CONFIG)
    _, frozen = model.run_with_sparse_cache(families.tokens(LENGTH, batch=3), config=StreamConfig(layout_from=cache))
    assert torch.equal(frozen.block_layout(1).to_dense()[2], cache.block_layout(1).to_dense()[0])


@torch.no_grad()
def test_path_patching_with_frozen_patterns(model: Any) -> None:
    """With every pattern of the clean run put back, a change of the input reaches the logits through values alone."""
    clean, corrupted = families.tokens(LENGTH), families.tokens(LENGTH, seed=1)
    _, cache = model.run_with_sparse_cache(clean, config=CONFIG)

    def freeze(pattern: Tensor, hook: Any) -> Tensor:
        return cache[hook.name]

    with tl_stream.sparse(model, CONFIG):
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), freeze)])
    dense = {layer: pattern.to_dense() for layer, pattern in cache.patterns.items()}
    with EditedAttention(dense, LENGTH, on_pattern=lambda layer, _: dense[layer]):
        expected = model(corrupted)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_another_length_is_refused(model: Any) -> None:
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=CONFIG)
    with pytest.raises(ValueError, match=r"layout_from held a layout of .* = \(2, 4, 61, 61\); expected \(2, 4, 40, 40\)"):
        model.run_with_sparse_cache(families.tokens(40), config=StreamConfig(layout_from=cache))


@torch.no_grad()
def test_a_cache_without_patterns_is_refused_before_the_run(model: Any) -> None:
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=CONFIG, names_filter="blocks.0.attn.hook_pattern")
    with pytest.raises(KeyError, match="expected one whose pattern is in the cache"):
        model.run_with_sparse_cache(families.tokens(LENGTH), config=StreamConfig(layout_from=cache))


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="layout_from was a dict; expected a SparseActivationCache"):
        StreamConfig(layout_from={})


@torch.no_grad()
def test_saved_without_its_source(model: Any, tmp_path: Any) -> None:
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=CONFIG)
    _, frozen = model.run_with_sparse_cache(families.tokens(LENGTH), config=StreamConfig(layout_from=cache))
    frozen.save(tmp_path / "cache.safetensors")
    loaded = tl_stream.SparseActivationCache.load(tmp_path / "cache.safetensors")
    assert loaded.config.layout_from is None
    assert torch.equal(loaded.block_layout(0).to_dense(), cache.block_layout(0).to_dense())

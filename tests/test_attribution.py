"""Attribution patching (AtP) on patterns and on z: against the dense masked model, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
LENGTH, LAYER = 61, 1
PATTERN, Z = f"blocks.{LAYER}.attn.hook_pattern", f"blocks.{LAYER}.attn.o.hook_in"


@pytest.fixture(scope="module")
def model() -> Any:
    return families.build("GPT-2", torch.float64)


@pytest.fixture(scope="module")
def runs(model: Any) -> Any:
    """Config with the corrupted run's blocks, the texts, and both caches (the corrupted one with gradients)."""
    clean, corrupted = families.tokens(LENGTH), families.tokens(LENGTH, seed=1)
    _, first = model.run_with_sparse_cache(corrupted, config=CONFIG)
    config = replace(CONFIG, layout_from=first)
    _, clean_cache = model.run_with_sparse_cache(clean, config=config)
    _, cache = model.run_with_sparse_cache(corrupted, config=config, incl_bwd=True, return_type="loss")
    return config, corrupted, clean_cache, cache


def loss_with(model: Any, config: StreamConfig, text: Tensor, point: str, edit: Callable[[Any], Any]) -> float:
    with tl_stream.sparse(model, config):
        hooks = [(point, lambda x, hook: edit(x))]
        return model.run_with_hooks(text, fwd_hooks=hooks, return_type="loss").item()


@pytest.mark.parametrize("point", [PATTERN, Z])
def test_attribution_is_the_slope_towards_the_clean_run(model: Any, runs: Any, point: str) -> None:
    config, text, clean_cache, cache = runs
    effect = ((clean_cache[point] - cache[point]) * cache[f"{point}_grad"]).sum().item()
    step = 1e-5

    def moved(by: float) -> float:
        with torch.no_grad():
            return loss_with(model, config, text, point, lambda x: x + by * (clean_cache[point] - cache[point]))

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert effect == pytest.approx(slope, rel=1e-4)
    assert abs(effect) > 1e-6


@pytest.mark.parametrize("point", [PATTERN, Z])
def test_attribution_by_head_equals_the_dense_masked_models(model: Any, runs: Any, point: str) -> None:
    _, text, clean_cache, cache = runs
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    patterns: dict[int, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def note(layer: int, pattern: Tensor) -> Tensor:
        patterns[layer] = pattern
        return pattern

    def note_z(z: Tensor, hook: Any) -> Tensor:
        seen["z"] = z
        return z  # the heads were split for the hook: what is returned goes on

    with EditedAttention(keep, LENGTH, masked(keep), note), model.hooks(fwd_hooks=[(Z, note_z)]):
        loss = model(text, return_type="loss")
    target = patterns[LAYER] if point == PATTERN else seen["z"]
    gradient = torch.autograd.grad(loss, target)[0].detach()
    clean = clean_cache[point]
    clean = clean.to_dense() if point == PATTERN else clean
    product = (clean - target.detach()) * gradient
    found = (clean_cache[point] - cache[point]) * cache[f"{point}_grad"]
    dims = (-2, -1) if point == PATTERN else (1, -1)
    assert torch.allclose(found.sum(dims), product.sum(dims), rtol=1e-8, atol=1e-12)


def test_patching_between_runs_of_different_blocks(model: Any) -> None:
    """What a patched pattern brings along is kept; the rest of the run is the corrupted one's."""
    clean, corrupted = families.tokens(LENGTH), families.tokens(LENGTH, seed=1)
    _, cache = model.run_with_sparse_cache(clean, config=CONFIG)
    patched: dict[int, Tensor] = {}

    def patch(pattern: Any, hook: Any) -> None:
        pattern[:, 1] = cache[hook.name][:, 1]
        pattern[:, 2, 40:50] = cache[hook.name][:, 2, 40:50]
        pattern[0, 3, 60, 60] = cache[hook.name][0, 3, 60, 60]

    def note(pattern: Any, hook: Any) -> None:
        patched[pattern._data.origin.layer] = pattern.to_dense()

    everywhere = [(lambda name: name.endswith("hook_pattern"), note)]
    with torch.no_grad(), tl_stream.sparse(model, CONFIG):
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(PATTERN, patch), *everywhere])
    with torch.no_grad(), EditedAttention(range(3), LENGTH, on_pattern=lambda layer, _: patched[layer]):
        expected = model(corrupted)
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(patched[LAYER][:, 1], cache["pattern", LAYER].to_dense()[:, 1])
    assert patched[LAYER][0, 3, 60, 60] == cache["pattern", LAYER][0, 3, 60, 60]

"""bfloat16 and float16 on CPU, and autocast: no further from the exact model than the dense one in that type."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import families
import pytest
import torch
import zoo
from dense_reference import EditedAttention, masked
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)


@pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Gemma 2", "GPT-NeoX", "OPT", "BLOOM", "GPT-OSS"])
@torch.no_grad()
def test_low_precision(family: str, dtype: torch.dtype, config: StreamConfig) -> None:
    text = families.tokens()
    low = families.build(family, dtype)
    logits, cache = low.run_with_sparse_cache(text, config=config)
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def dense(model: Any) -> torch.Tensor:
        with EditedAttention(keep, text.shape[1], masked(keep)):
            return model(text).double()

    exact = dense(families.build(family, torch.float32).to(torch.float64) if "OSS" not in family else families.build(family))
    ours, theirs = ((x.double() - exact).abs().mean() for x in (logits, dense(low)))
    assert logits.dtype == dtype
    assert cache["pattern", 1].dtype == dtype
    assert ours <= 2 * theirs


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def build(name: str) -> Any:
    return zoo.build("gqa", torch.float32) if name == "HookedTransformer" else families.build(name)


MODELS = [*(["HookedTransformer"] if zoo.HAS_HOOKED else []), "Llama", "GPT-2", "OPT", "BLOOM", "GPT-OSS"]
TEXT = zoo.tokens()


def masked_dense(model: Any, cache: Any, low: bool) -> dict[str, Tensor]:
    """What the dense model under the blocks that a run kept gives, under autocast or not."""
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=low))
        if cache.config.forward == "sparse" and hasattr(model, "original_model"):
            stack.enter_context(EditedAttention(keep, TEXT.shape[1], masked(keep)))
        elif cache.config.forward == "sparse":
            stack.enter_context(model.hooks(fwd_hooks=zoo.mask_hooks(cache)))
        logits, found = model.run_with_cache(TEXT)
    return {"z": found["z", 0].float(), "logits": logits.float()}


@pytest.mark.parametrize("forward", ["sparse", "exact"])
@pytest.mark.parametrize("k", [1000, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_autocast(name: str, k: int, forward: str) -> None:
    model = build(name)
    config = StreamConfig(block_q=8, block_k=8, k=k, forward=forward, max_dense=0)
    with autocast():
        _, dense = model.run_with_cache(TEXT)
        logits, cache = model.run_with_sparse_cache(TEXT, config=config)
        pattern = cache["pattern", 1]
        within = [pattern.sum(-1), pattern.retained_mass(), pattern.block_values, cache.exact_rows(1, [60]), cache.audit()]
    outside = [pattern.sum(-1), pattern.retained_mass(), pattern.block_values, cache.exact_rows(1, [60]), cache.audit()]
    for a, b in zip(within, outside, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert pattern.sum(-1).max() <= 1 + 1e-4
    assert pattern.retained_mass().max() <= 1 + 1e-5
    for point in ("z", "v", "resid_post"):
        assert cache[point, 1].dtype == dense[point, 1].dtype
    exact, theirs = (masked_dense(model, cache, low) for low in (False, True))
    ours = {"z": cache["z", 0].float(), "logits": logits.float()}
    for what in ("z",) if name == "GPT-OSS" else ("z", "logits"):  # other experts may be chosen there after the first attention
        error, expected = ((x[what] - exact[what]).abs().mean() for x in (ours, theirs))
        assert 0 < error <= 1.2 * expected, what


@pytest.mark.parametrize("backward", ["within", "outside"])
@pytest.mark.parametrize("watched", [False, True], ids=["", "with a backward hook"])
@pytest.mark.parametrize("name", MODELS[:2])
def test_gradients_under_autocast(name: str, watched: bool, backward: str) -> None:
    model = build(name)
    weight = model.blocks[0].attn.W_Q if name == "HookedTransformer" else model.blocks[0].attn.q.original_component.weight

    def gradient(low: bool, sparse: bool) -> Tensor:
        bwd_hooks = [("blocks.1.attn.hook_pattern", lambda grad, hook: None)] if watched else []
        with torch.autocast("cpu", torch.bfloat16, enabled=low), model.hooks(bwd_hooks=bwd_hooks):
            if sparse:
                with tl_stream.sparse(model, StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)):
                    loss = model(TEXT, return_type="loss")
            else:
                loss = model(TEXT, return_type="loss")
            if backward == "within":
                return torch.autograd.grad(loss, weight)[0]
        return torch.autograd.grad(loss, weight)[0]

    exact = gradient(low=False, sparse=False)
    ours, theirs = ((gradient(low=True, sparse=sparse) - exact).norm() for sparse in (True, False))
    assert 0 < ours <= 1.2 * theirs


@torch.no_grad()
def test_estimates_are_the_same_under_autocast() -> None:
    q, k = (torch.randn(1, 2, 256, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for estimator in ("exact", "dual", "stream", "hip", "box"):
        config = StreamConfig(block_q=8, block_k=8, k=4, beam=1, estimator=estimator)
        expected = tl_stream.estimate_layout(q, k, config)
        with autocast():
            found = tl_stream.estimate_layout(q, k, config)
        assert torch.equal(found.to_dense(), expected.to_dense())

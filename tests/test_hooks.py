"""Interventions on a sparse run give what they give on the equally masked dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from zoo import build, gap, mask_hooks, tokens

import tl_stream
from tl_stream import StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
Edit = Callable[[Any, Any], Any]


def head_zero(z: Any, hook: Any) -> Any:
    z[:, :, 1] = 0
    return z


def pattern_entry(pattern: Any, hook: Any) -> Any:
    key = pattern[0, 2, 50].argmax()
    pattern[0, 2, 50, key] = 0.0
    return pattern


def scores_key(scores: Any, hook: Any) -> Any:
    scores[:, :, :, 5] = -torch.inf
    return scores


def scores_head_key(scores: Any, hook: Any) -> Any:
    scores[:, 1, :, 3:9] = float("-inf")
    return scores


def scores_view(scores: Any, hook: Any) -> None:
    scores[0, 1][:, 4] = -1e9 if scores.fill != scores.fill else -torch.inf


def pattern_column(pattern: Any, hook: Any) -> None:
    pattern[:, 2, :, 0].zero_()


def pattern_column_of_view(pattern: Any, hook: Any) -> None:
    pattern[0, 1][:, 2] = 0


def pattern_head_zero(pattern: Any, hook: Any) -> Any:
    pattern[:, 0] = 0
    return pattern


def pattern_head_scaled(pattern: Any, hook: Any) -> None:
    pattern[:, 3] *= 0.5


def pattern_replaced(pattern: Any, hook: Any) -> Any:
    return pattern * torch.linspace(0, 1, 61, dtype=torch.float64)


def pattern_head_mask(pattern: Any, hook: Any) -> Any:
    return pattern * torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)[:, None, None]


def pattern_renormalised(pattern: Any, hook: Any) -> Any:
    pattern[:, :, :, 7] = 0
    return pattern / pattern.sum(-1, keepdim=True).clamp(min=1e-9)


def scores_temperature(scores: Any, hook: Any) -> Any:
    return scores / 2.0


def scores_bias(scores: Any, hook: Any) -> Any:
    return scores + torch.linspace(-1, 1, 61, dtype=torch.float64)


def scores_masked_fill(scores: Any, hook: Any) -> Any:
    columns = torch.zeros(61, dtype=torch.bool)
    columns[10:14] = True
    return scores.masked_fill(columns, -torch.inf)


def scores_rows(scores: Any, hook: Any) -> None:
    scores[:, :, 30:40, 8:12] = -torch.inf


def scores_fancy(scores: Any, hook: Any) -> None:
    scores[:, :, torch.arange(1, 61), torch.arange(60)] = -torch.inf


def noise(x: Any, hook: Any) -> Any:
    return x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)


def matrix_in_q(q: Any, hook: Any) -> Any:
    """A user's own 4-D products in a hook are none of Stream's business."""
    turn = torch.eye(8, dtype=q.dtype).roll(1, 0).expand(2, 61, 8, 8)
    assert type(q @ turn) is Tensor
    return q @ turn


PATTERN: list[Edit] = [
    pattern_entry, pattern_column, pattern_column_of_view, pattern_head_zero, pattern_head_scaled, pattern_replaced,
    pattern_head_mask, pattern_renormalised,
]  # fmt: skip
SCORES: list[Edit] = [
    scores_key, scores_head_key, scores_view, scores_temperature, scores_bias, scores_masked_fill, scores_rows, scores_fancy,
]  # fmt: skip
OTHERS = [
    ("hook_q", noise), ("hook_k", noise), ("hook_v", noise), ("hook_rot_q", noise), ("hook_rot_k", noise),
    ("hook_z", head_zero), ("hook_rot_q", matrix_in_q),
]  # fmt: skip
CASES = (
    [(f"blocks.1.attn.{point}", edit) for point, edit in OTHERS]
    + [("blocks.1.attn.hook_pattern", edit) for edit in PATTERN]
    + [("blocks.1.attn.hook_attn_scores", edit) for edit in SCORES]
    + [("blocks.1.hook_resid_pre", noise), ("blocks.0.hook_mlp_out", noise), ("blocks.2.hook_resid_mid", noise)]
)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].split('.')[-1]}-{case[1].__name__}")
def test_edit_equals_that_of_the_masked_dense_model(case: tuple[str, Edit], grad: bool) -> None:
    model, text = build("gqa"), tokens()
    point, edit = case
    if point not in model.hook_dict:
        pytest.skip(f"this model has no {point}")

    def dense_edit(activation: Any, hook: Any) -> Any:
        if "scores" in point or "pattern" in point:
            activation = activation.clone()
            activation.fill = -torch.inf if "scores" in point else 0.0
            result = edit(activation, hook)
            return activation if result is None else result
        return edit(activation.clone(), hook)

    def sparse_edit(activation: Any, hook: Any) -> Any:
        return edit(activation if hasattr(activation, "block_layout") else activation.clone(), hook)

    with torch.set_grad_enabled(grad):
        untouched, _ = model.run_with_sparse_cache(text, config=CONFIG)
        with model.hooks(fwd_hooks=[(point, sparse_edit)]):
            logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
        expected = model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), (point, dense_edit)])
    assert gap(logits, expected) < 1e-10
    assert gap(logits, untouched) > 1e-6
    assert not cache.fallbacks
    if grad:
        found, wanted = (torch.autograd.grad(x.square().sum(), model.W_E)[0] for x in (logits, expected))
        assert gap(found, wanted) < 1e-9 * wanted.abs().max().clamp(min=1)


PATCHING = [name for name in dir(patching) if name.startswith("get_act_patch_")]


@pytest.mark.parametrize("name", PATCHING, ids=lambda name: name.removeprefix("get_act_patch_"))
@torch.no_grad()
def test_transformer_lens_patching(name: str) -> None:
    """With layouts that don't depend on the input, so that one mask serves every patched run."""
    assert len(PATCHING) >= 18
    function = getattr(patching, name)
    model = build("gqa" if "_every" not in name else "standard", n_layers=2)
    clean, corrupted = tokens(14, batch=1, seed=1), tokens(14, batch=1, seed=2)
    config = StreamConfig(block_q=4, block_k=4, k=2, estimator="window", max_dense=0)
    _, clean_cache = model.run_with_sparse_cache(clean, config=config)
    masks = mask_hooks(clean_cache)
    with model.hooks(fwd_hooks=masks):
        _, dense_cache = model.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 3] - logits[0, -1, 4]

    with tl_stream.sparse(model, config) as trace:
        found = function(model, corrupted, clean_cache, metric)
    with model.hooks(fwd_hooks=masks):
        expected = function(model, corrupted, dense_cache, metric)
    assert gap(found, expected) < 1e-6  # the functions themselves store float32
    assert found.std() > 1e-3
    assert not trace.fallbacks


@pytest.mark.parametrize("whole", [True, False], ids=["whole heads", "rows"])
@torch.no_grad()
def test_patching_between_layouts_brings_the_blocks_along(whole: bool) -> None:
    model = build("gqa")
    _, clean = model.run_with_sparse_cache(tokens(seed=1), config=CONFIG)
    _, before = model.run_with_sparse_cache(tokens(seed=2), config=CONFIG)
    assert not torch.equal(clean.block_layout(1).to_dense(), before.block_layout(1).to_dense())
    rows = slice(None) if whole else slice(21, 45)

    def patch(pattern: Any, hook: Any) -> None:
        pattern[:, 1, rows] = clean["pattern", 1][:, 1, rows]
        pattern[:, 2, 50] = clean["pattern", 1][:, 2, 50]

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", patch)]):
        output, cache = model.run_with_sparse_cache(tokens(seed=2), config=CONFIG)
    expected_pattern = before["pattern", 1].to_dense()
    expected_pattern[:, 1, rows] = clean["pattern", 1].to_dense()[:, 1, rows]
    expected_pattern[:, 2, 50] = clean["pattern", 1].to_dense()[:, 2, 50]
    assert gap(cache["pattern", 1], expected_pattern) < 1e-12
    later = [hook for hook in mask_hooks(cache) if "blocks.1" not in str(hook[0])]
    replace = ("blocks.1.attn.hook_pattern", lambda pattern, hook: expected_pattern)
    assert gap(model.run_with_hooks(tokens(seed=2), fwd_hooks=[*later, replace]), output) < 1e-10


@torch.no_grad()
def test_user_hooks_at_the_scores_see_sparse_scores_whatever_the_order() -> None:
    model, text = build("gqa"), tokens()
    kinds: list[str] = []
    model.add_hook("blocks.0.attn.hook_attn_scores", lambda scores, hook: kinds.append(type(scores).__name__))
    with tl_stream.sparse(model, CONFIG):
        model.add_hook("blocks.0.attn.hook_attn_scores", lambda scores, hook: kinds.append(type(scores).__name__))
        model(text)
        model.reset_hooks()
        output = model(text)
    assert kinds == ["BlockSparseScores"] * 2
    assert gap(output, model.run_with_sparse_cache(text, config=CONFIG)[0]) == 0

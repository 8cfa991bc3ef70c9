"""Patching by block equals patching by hand in the masked dense model, finds what matters, and keeps to its plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import build, mask_hooks

from tl_stream import StreamConfig
from tl_stream.analysis import patch_by_block
from tl_stream.analysis.refinement import Refinement

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, max_dense=0)
CLEAN = torch.randint(0, 40, (100,), generator=torch.Generator().manual_seed(0))
CORRUPTED = CLEAN.clone()
CORRUPTED[41:43] = (CLEAN[41:43] + 7) % 40


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 3] - logits[0, -1, 5]


@pytest.mark.parametrize("point", ["hook_resid_pre", "attn.hook_z", "hook_mlp_out"])
def test_effects_are_those_in_the_masked_dense_model(point: str) -> None:
    model = build("gqa")
    result = patch_by_block(
        model, CLEAN, CORRUPTED, metric, config=CONFIG, layers=[1], point=point, block=16, starts=2, progress=False
    )
    name = f"blocks.1.{point}"
    _, clean = model.run_with_sparse_cache(CLEAN[None], config=CONFIG)
    assert any(abs(each.effect) > 1e-3 for each in result.effects)
    for each in result.effects:

        def patch(x: Tensor, hook: Any, start: int = each.start, stop: int = each.stop) -> Tensor:
            return torch.cat([x[:, :start], clean[name][:, start:stop], x[:, stop:]], 1)

        with model.hooks(fwd_hooks=[(name, patch)]):
            _, patched = model.run_with_sparse_cache(CORRUPTED[None], config=CONFIG)
        masked = model.run_with_hooks(CORRUPTED[None], fwd_hooks=[(name, patch), *mask_hooks(patched)])
        assert each.metric == pytest.approx(metric(masked).item(), abs=1e-10)
        effect = (each.metric - result.corrupted) / (result.clean - result.corrupted)
        assert each.effect == pytest.approx(effect, abs=1e-10)


def test_with_nothing_pruned_it_patches_the_dense_model() -> None:
    model = build("gqa")
    everything = StreamConfig(k=10**6, max_dense=0)
    result = patch_by_block(model, CLEAN, CORRUPTED, metric, config=everything, block=10, starts=10, progress=False)
    assert result.clean == pytest.approx(metric(model(CLEAN[None])).item(), abs=1e-10)
    assert result.corrupted == pytest.approx(metric(model(CORRUPTED[None])).item(), abs=1e-10)
    for each in result.effects:  # what enters layer 0 is the tokens
        text = CORRUPTED.clone()
        text[each.start : each.stop] = CLEAN[each.start : each.stop]
        assert each.metric == pytest.approx(metric(model(text[None])).item(), abs=1e-10)


def test_the_block_that_differs_is_found() -> None:
    result = patch_by_block(build("gqa"), CLEAN, CORRUPTED, metric, config=CONFIG, block=2, starts=4, split=3, progress=False)
    (best, *others) = result.finest
    assert (best.start, best.stop) in ((40, 42), (42, 44))
    assert all(abs(each.effect) < 1e-6 for each in others if each.stop <= 40 or each.start >= 44)
    assert result.effects[0].stop > 2
    assert result.n_forwards == len(result.effects) + 2 <= result.planned


def test_batches_of_any_size_give_the_same() -> None:
    one, many = (
        patch_by_block(build("gqa"), CLEAN, CORRUPTED, metric, config=CONFIG, block=8, batch_size=n, progress=False)
        for n in (1, 5)
    )
    assert [each.metric for each in one.effects] == pytest.approx([each.metric for each in many.effects], abs=1e-10)


def test_sentences_as_spans_and_several_layers() -> None:
    spans = [(0, 30), (35, 41), (41, 60), (60, 99)]
    result = patch_by_block(
        build("gqa"),
        CLEAN,
        CORRUPTED,
        metric,
        config=CONFIG,
        layers=(0, 2),
        spans=spans,
        starts=1,
        split=2,
        keep=1,
        progress=False,
    )
    assert {each.layer for each in result.effects} == {0, 2}
    assert [(each.start, each.stop) for each in result.effects if each.layer == 0] == [
        (0, 99), (0, 41), (41, 99), (41, 60), (60, 99)
    ]  # fmt: skip
    assert result.finest[0].layer == 0
    assert (result.finest[0].start, result.finest[0].stop) == (41, 60)
    assert result.finest[0].effect == pytest.approx(1)
    assert result.table().row_count == 4
    assert len(result.to_dataframe()) == 10
    (first, second) = result.plot().data
    assert (first.name, second.name) == ("layer 0", "layer 2")
    assert "tokens 41 to 59, layer 0" in repr(result)


@pytest.mark.parametrize(
    ("n", "starts", "split", "keep"), [(1, 4, 2, 1), (7, 2, 2, 3), (1000, 16, 4, 4), (64, 1, 2, 1), (65, 8, 3, 2)]
)
def test_the_plan_is_kept(n: int, starts: int, split: int, keep: int) -> None:
    plan = Refinement.of(n, None, 1, starts, split, keep)
    stretches, tried, seen = plan.first(), 0, []
    assert len(stretches) <= starts
    assert [i for a, b in stretches for i in range(a, b)] == list(range(n))
    while stretches:
        tried += len(stretches)
        seen = stretches
        stretches = plan.next(stretches, [float(a <= n // 3 < b) for a, b in stretches])
    assert any(plan.is_finest(x) and x[0] == n // 3 for x in seen)
    assert tried <= plan.n_patches


def test_the_model_is_left_as_it_was() -> None:
    model = build("gqa")
    model(CLEAN[None])
    before = {name: (set(module.__dict__), len(module._forward_hooks)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError):
        patch_by_block(model, CLEAN, CORRUPTED, lambda logits: 1 / 0, config=CONFIG, progress=False)
    patch_by_block(model, CLEAN, CORRUPTED, metric, config=CONFIG, progress=False)
    assert {name: (set(module.__dict__), len(module._forward_hooks)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"corrupted": CORRUPTED[:50]}, ValueError, "of the same length"),
        ({"clean": CLEAN[None].repeat(2, 1)}, ValueError, "expected one text"),
        ({"clean": 3}, TypeError, "tokens was int"),
        ({"metric": lambda logits: logits}, TypeError, r"metric gave a tensor of shape \(1, 1, \d+\)"),
        ({"metric": lambda logits: logits.sum() * torch.nan}, ValueError, "metric gave NaN"),
        ({"metric": lambda logits: 1.0}, ValueError, "metric gave 1.0 for both texts"),
        ({"layers": 3}, ValueError, "layers had 3; expected indices from 0 to 2"),
        ({"point": "hook_pattern"}, ValueError, "point was 'hook_pattern'"),
        ({"point": "attn.hook_pattern"}, ValueError, "point was 'attn.hook_pattern'"),
        ({"spans": []}, ValueError, "spans was empty"),
        ({"spans": [(0, 101)]}, ValueError, r"spans had \(0, 101\)"),
        ({"spans": [(5, 9), (8, 12)]}, ValueError, r"spans had \(8, 12\) after 9"),
        ({"spans": [(5, 5)]}, ValueError, r"spans had \(5, 5\)"),
        ({"block": 0}, ValueError, "block was 0"),
        ({"split": 1}, ValueError, "split was 1; expected an int >= 2"),
        ({"keep": 0}, ValueError, "keep was 0"),
        ({"batch_size": 0}, ValueError, "batch_size was 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": metric, "config": CONFIG, "progress": False, **change}
    with pytest.raises(error, match=match):
        patch_by_block(build("gqa"), **arguments)

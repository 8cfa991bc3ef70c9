"""The oracle: with nothing pruned everything equals the dense model; pruned, the dense model masked with the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from zoo import NEEDS_HOOKED, VARIANTS, build, dense, gap, mask_hooks, tokens

import tl_stream
from tl_stream import StreamConfig

pytestmark = NEEDS_HOOKED

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def assert_same_run(dense_run: Any, sparse_run: Any, tolerance: float) -> None:
    """Equal output and activations, relative to the largest logit (activations: to their own largest number)."""
    (expected, expected_cache), (output, cache) = dense_run, sparse_run
    assert gap(expected, output) <= tolerance * expected.abs().max()
    assert list(expected_cache.keys()) == list(cache.keys())
    for name in expected_cache.keys():
        activation = expected_cache[name]
        size = activation[activation.isfinite()].abs().max().clamp(min=1.0)
        assert gap(activation, cache[name]) <= tolerance * size, name
    assert not cache.fallbacks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_nothing_pruned_equals_run_with_cache(variant: str, dtype: torch.dtype) -> None:
    model, text = build(variant, dtype), tokens()
    sparse_run = model.run_with_sparse_cache(text, config=FULL)
    assert_same_run(model.run_with_cache(text), sparse_run, TOLERANCE[dtype])
    assert sparse_run[1].pruned == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pruned_equals_the_masked_dense_model(variant: str, dtype: torch.dtype) -> None:
    model, text = build(variant, dtype), tokens()
    sparse_run = model.run_with_sparse_cache(text, config=PRUNED)
    assert sparse_run[1].pruned > 0.2
    with model.hooks(fwd_hooks=mask_hooks(sparse_run[1])):
        masked_run = model.run_with_cache(text)
    assert_same_run(masked_run, sparse_run, TOLERANCE[dtype])


@pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["standard", "gqa", "local", "alibi", "sinks"])
@torch.no_grad()
def test_padded_batch(variant: str, side: str, config: StreamConfig) -> None:
    model, text = build(variant), tokens()
    attention_mask = torch.ones_like(text)
    attention_mask[0, slice(0, 13) if side == "left" else slice(-13, None)] = 0
    sparse_run = model.run_with_sparse_cache(text, config=config, attention_mask=attention_mask)
    with model.hooks(fwd_hooks=mask_hooks(sparse_run[1])):
        masked_run = model.run_with_cache(text, attention_mask=attention_mask)
    if config is FULL:
        assert_same_run(model.run_with_cache(text, attention_mask=attention_mask), sparse_run, 1e-10)
    assert_same_run(masked_run, sparse_run, 1e-10)


@pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("variant", ["standard", "gqa", "local", "alibi", "sinks", "soft-capped"])
@torch.no_grad()
def test_kv_cached_continuation(variant: str, config: StreamConfig) -> None:
    model, text = build(variant), tokens()

    def continuation(run: Any, hooks: Any = ()) -> Any:
        past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(text[:, :37], past_kv_cache=past, attention_mask=torch.ones_like(text[:, :37]))
        with model.hooks(fwd_hooks=list(hooks)):
            return run(text[:, 37:], past_kv_cache=past, attention_mask=torch.ones_like(text[:, 37:]))

    sparse_run = continuation(lambda *a, **kw: model.run_with_sparse_cache(*a, config=config, **kw))
    assert sparse_run[1]["pattern", 0].shape == (2, 4, 24, 61)
    assert_same_run(continuation(model.run_with_cache, mask_hooks(sparse_run[1])), sparse_run, 1e-10)
    if config is FULL:
        assert_same_run(continuation(model.run_with_cache), sparse_run, 1e-10)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 64, 97])
@torch.no_grad()
def test_any_length(length: int) -> None:
    model, text = build("gqa"), tokens(length, batch=1)
    sparse_run = model.run_with_sparse_cache(text, config=PRUNED)
    with model.hooks(fwd_hooks=mask_hooks(sparse_run[1])):
        assert_same_run(model.run_with_cache(text), sparse_run, 1e-10)


@torch.no_grad()
def test_a_batch_equals_its_rows() -> None:
    model, text = build("gqa"), tokens(batch=3)
    together, cache = model.run_with_sparse_cache(text, config=PRUNED)
    for i in range(3):
        alone, one = model.run_with_sparse_cache(text[i : i + 1], config=PRUNED)
        assert gap(together[i : i + 1], alone) < 1e-12
        assert torch.equal(cache.block_layout(1).to_dense()[i : i + 1], one.block_layout(1).to_dense())


@pytest.mark.parametrize(
    "options",
    [
        {"remove_batch_dim": True},
        {"names_filter": lambda name: name.endswith("pattern")},
        {"names_filter": ["blocks.1.attn.hook_pattern", "blocks.2.hook_resid_post"]},
        {"pos_slice": (5, 30)},
        {"pos_slice": -1},
        {"stop_at_layer": 2},
        {"return_type": "loss"},
        {"return_type": "both"},
        {"return_type": None},
        {"device": "cpu"},
        {"loss_per_token": True, "return_type": "loss"},
    ],
    ids=lambda options: ", ".join(options),
)
@torch.no_grad()
def test_options_of_run_with_cache(options: dict[str, Any]) -> None:
    model, text = build("gqa"), tokens(batch=1)
    expected, expected_cache = model.run_with_cache(text, **options)
    output, cache = model.run_with_sparse_cache(text, config=FULL, **options)
    for a, b in zip(_outputs(expected), _outputs(output), strict=True):
        assert gap(a, b) < 1e-10
    assert list(cache.keys()) == list(expected_cache.keys())
    for name in cache.keys():
        assert gap(expected_cache[name], cache[name]) < 1e-9, name
    assert not cache.fallbacks


def _outputs(output: Any) -> list[Any]:
    if output is None:
        return []
    return list(output) if isinstance(output, tuple) else [output]


@torch.no_grad()
def test_text_input() -> None:
    model: Any = tl_stream.models.load(host="hooked")
    text = ["the grass is green .", "the sky is blue . the sun is yellow ."]
    for options in ({}, {"prepend_bos": False}, {"padding_side": "left"}):
        expected, _ = model.run_with_cache(text, **options)
        output, cache = model.run_with_sparse_cache(text, config=FULL, **options)
        assert gap(expected, output) < 1e-4 * expected.abs().max()
        assert cache.pruned == 0.0


@pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])
@torch.no_grad()
def test_dense_layers(config: StreamConfig) -> None:
    model, text = build("gqa"), tokens()
    sparse_run = model.run_with_sparse_cache(text, config=replace(config, dense_layers=(0, 2)))
    layouts = [sparse_run[1].block_layout(layer) for layer in range(3)]
    assert [layout.is_full for layout in layouts] == [True, config is FULL, True]
    with model.hooks(fwd_hooks=mask_hooks(sparse_run[1])):
        assert_same_run(model.run_with_cache(text), sparse_run, 1e-10)
    pairs = 61 * 62 // 2 * 2 * 4
    kept = sum(int(layout.to_dense().sum()) for layout in layouts)
    assert sparse_run[1].pruned == pytest.approx(1 - kept / (3 * pairs))


@torch.no_grad()
def test_first_layers_dense() -> None:
    model, text = build("gqa"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=StreamConfig(block_q=8, block_k=8, k=3, dense_layers=2))
    assert [cache.block_layout(layer).is_full for layer in range(3)] == [True, True, False]


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, text = build("gqa"), tokens()
    everything, _ = model.run_with_sparse_cache(text, config=PRUNED)
    last, _ = model.run_with_sparse_cache(text, config=PRUNED, logits_to_keep=3)
    assert gap(last, everything[:, -3:]) < 1e-12
    with pytest.raises(ValueError, match="logits_to_keep was 1 with return_type='loss'"):
        model.run_with_sparse_cache(text, logits_to_keep=1, return_type="loss")


@torch.no_grad()
def test_generation_within_the_context() -> None:
    model = tl_stream.models.load(host="hooked")
    text = "the grass is green . the sky is blue ."
    expected = model.generate(text, max_new_tokens=6, do_sample=False, verbose=False)
    with tl_stream.sparse(model, FULL) as trace:
        assert model.generate(text, max_new_tokens=6, do_sample=False, verbose=False) == expected
    assert not trace.fallbacks


@torch.no_grad()
def test_two_runs_are_bit_identical() -> None:
    model, text = build("gqa", torch.float32), tokens()
    for config in (PRUNED, StreamConfig(block_q=8, block_k=8, k=3, estimator="random", seed=3)):
        (first, one), (second, two) = (model.run_with_sparse_cache(text, config=config) for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(dense(one["pattern", i]), dense(two["pattern", i])) for i in range(3))


@pytest.mark.parametrize("k", [3, 1000])
@torch.no_grad()
def test_bfloat16_is_as_good_as_the_dense_model(k: int) -> None:
    exact, text = build("gqa", torch.float64), tokens()
    low = build("gqa", torch.float32).to(torch.bfloat16)
    for parameter, source in zip(exact.parameters(), low.parameters(), strict=True):
        parameter.copy_(source)
    output, cache = low.run_with_sparse_cache(text, config=StreamConfig(block_q=8, block_k=8, k=k, max_dense=0))
    hooks = mask_hooks(cache)
    truth = exact.run_with_hooks(text, fwd_hooks=hooks)
    dense_error = (low.run_with_hooks(text, fwd_hooks=hooks) - truth).abs().mean()
    assert output.dtype == torch.bfloat16
    assert (output - truth).abs().mean() <= 2 * dense_error


@torch.no_grad()
def test_the_reference_backend_gives_the_same() -> None:
    model, text = build("gqa"), tokens()
    output, _ = model.run_with_sparse_cache(text, config=PRUNED)
    reference, _ = model.run_with_sparse_cache(text, config=StreamConfig(**{**vars(PRUNED), "backend": "reference"}))
    assert gap(output, reference) < 1e-12

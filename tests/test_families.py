"""The oracle on every family of decoders behind TransformerBridge, each against its own dense model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from allocations import LargestTensor
from dense_reference import EditedAttention, masked
from families import FAMILIES, build, tokens
from torch import Tensor
from transformers import DynamicCache

import tl_stream
from tl_stream import StreamConfig

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
TOLERANCE = 1e-4
LENGTH = 61


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    library = FAMILIES[request.param].library
    if library and not find_spec(library):
        pytest.skip(f"TransformerLens needs {library} for it")
    need(request.param, "forward")
    return request.param, build(request.param)


def off(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """Greatest difference relative to the largest number of `b`, or of `scale`."""
    return ((a - b).abs().max() / (b if scale is None else scale).abs().max()).item()


def kept(cache: Any) -> dict[int, Tensor]:
    return {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}


def masked_logits(model: Any, keep: dict[int, Tensor], text: Tensor, on_pattern: Any = None, **kwargs: Any) -> Tensor:
    with EditedAttention(keep, next(iter(keep.values())).shape[-1], masked(keep), on_pattern):
        return model(text, **kwargs)


@pytest.fixture(autouse=True)
def _noted(request: pytest.FixtureRequest, family: tuple[str, Any], record_property: Any) -> None:
    """For the table of families (docs/families.md)."""
    record_property("family", family[0])
    record_property("note", FAMILIES[family[0]].note)
    record_property("test", request.function.__name__)


@pytest.fixture
def assert_agree(record_property: Any) -> Any:
    """Check that one tensor is another one, but for rounding."""

    def check(a: Tensor, b: Tensor, scale: Tensor | None = None) -> None:
        error = off(a, b, scale)
        record_property("error", error)
        assert error <= TOLERANCE

    return check


def need(name: str, what: str) -> None:
    if what in FAMILIES[name].lacks:
        pytest.skip(f"no {what}: {FAMILIES[name].lacks[what]}")


@torch.no_grad()
def test_nothing_pruned_equals_the_model(family: tuple[str, Any], assert_agree: Any) -> None:
    _, model = family
    text = tokens(LENGTH)
    logits, cache = model.run_with_sparse_cache(text, config=FULL)
    assert_agree(logits, model(text))
    assert cache.pruned == 0.0
    assert not cache.fallbacks


@torch.no_grad()
def test_pruned_equals_the_masked_model(family: tuple[str, Any], assert_agree: Any) -> None:
    _, model = family
    text = tokens(LENGTH)
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED)
    expected = masked_logits(model, kept(cache), text)
    assert_agree(logits, expected)
    assert off(model(text), expected) > 100 * TOLERANCE
    assert not cache.fallbacks


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded(family: tuple[str, Any], assert_agree: Any, side: str) -> None:
    name, model = family
    text = tokens(LENGTH)
    valid = torch.ones_like(text)
    valid[0, slice(0, 13) if side == "left" else slice(-13, None)] = 0
    if side in FAMILIES[name].refuses:
        with pytest.raises(NotImplementedError, match=FAMILIES[name].refuses[side]):
            model.run_with_sparse_cache(text, config=FULL, attention_mask=valid)
        pytest.skip(f"padding on the {side} is refused ({FAMILIES[name].refuses[side]})")
    real = valid.bool()
    logits, _ = model.run_with_sparse_cache(text, config=FULL, attention_mask=valid)
    assert_agree(logits[real], model(text, attention_mask=valid)[real])
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED, attention_mask=valid)
    expected = masked_logits(model, kept(cache), text, attention_mask=valid)
    assert_agree(logits[real], expected[real])


@torch.no_grad()
def test_kv_cached_generation(family: tuple[str, Any]) -> None:
    name, model = family
    need(name, "generation")
    expected = text = tokens(30)
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with tl_stream.sparse(model, FULL):
        if "cached steps" in FAMILIES[name].lacks:
            with pytest.raises(NotImplementedError, match="model can't generate with a KV cache"):
                model.generate(text, **options)
            need(name, "cached steps")
        assert torch.equal(model.generate(text, **options), expected)


@torch.no_grad()
def test_continuation_of_a_kv_cache(family: tuple[str, Any], assert_agree: Any) -> None:
    name, model = family
    need(name, "KV cache")
    text = tokens(LENGTH)
    expected = model(text)[:, 37:]  # before: dynamic rotary positions depend on the longest text so far
    past = DynamicCache(config=model.original_model.config)
    with tl_stream.sparse(model, FULL):
        model(text[:, :37], past_key_values=past, use_cache=True)
        logits = model(text[:, 37:], past_key_values=past, use_cache=True)
    assert_agree(logits, expected)


def test_gradients(family: tuple[str, Any], assert_agree: Any) -> None:
    """In float64: in float32 the gradients of some random models round by 1e-4 themselves."""
    model = build(family[0], torch.float32 if "float64" in FAMILIES[family[0]].lacks else torch.float64)
    text = tokens(LENGTH)
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED)
    keep, layer = kept(cache), max(cache.patterns)
    pattern = cache["pattern", layer]
    parameters = [p for p in model.original_model.parameters() if p.requires_grad]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    gradient, *found = torch.autograd.grad((logits * weights).sum(), [pattern, *parameters], allow_unused=True)

    patterns: dict[int, Tensor] = {}

    def note(layer: int, pattern: Tensor) -> Tensor:
        patterns[layer] = pattern
        return pattern

    dense = masked_logits(model, keep, text, note)
    expected, *wanted = torch.autograd.grad((dense * weights).sum(), [patterns[layer], *parameters], allow_unused=True)
    assert_agree(gradient.to_dense(), expected.masked_fill(~keep[layer], 0))
    scale = max(x.abs().max() for x in wanted if x is not None)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert_agree(ours, theirs, scale)


@pytest.mark.parametrize("where", ["attn_scores", "pattern"])
@torch.no_grad()
def test_knock_out(family: tuple[str, Any], assert_agree: Any, where: str) -> None:
    _, model = family
    text, keep = tokens(LENGTH), {}
    value = -torch.inf if where == "attn_scores" else 0.0

    def knock_out(x: Tensor, hook: Any) -> Tensor:
        x[:, 1, 20:, :5] = value
        return x

    def note(pattern: Any, hook: Any) -> Tensor:
        keep[pattern._data.origin.layer] = pattern.block_layout.to_dense()
        return pattern

    hooks = [(lambda name: name.endswith(f"hook_{where}"), knock_out), (lambda name: name.endswith("hook_pattern"), note)]
    with tl_stream.sparse(model, PRUNED):
        logits = model.run_with_hooks(text, fwd_hooks=hooks)

    def edit(layer: int, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1, 20:, :5] = value
        return x

    def edited_scores(layer: int, x: Tensor) -> Tensor:
        return edit(layer, masked(keep)(layer, x)) if where == "attn_scores" else masked(keep)(layer, x)

    with EditedAttention(keep, LENGTH, edited_scores, edit if where == "pattern" else None):
        expected = model(text)
    assert_agree(logits, expected)
    assert off(masked_logits(model, keep, text), expected) > 10 * TOLERANCE


@torch.no_grad()
def test_largest_allocation_at_4096_tokens(family: tuple[str, Any], record_property: Any) -> None:
    name, _ = family
    length = 4096
    model = build(name, n_ctx=length)
    config = StreamConfig(block_q=64, block_k=64, k=4, beam=1, max_dense=0)
    with LargestTensor() as seen:
        model.run_with_sparse_cache(tokens(length, batch=1), config=config, logits_to_keep=1, names_filter=lambda _: False)
    record_property("largest", seen.numel / length**2)
    assert seen.numel < length**2 / 2

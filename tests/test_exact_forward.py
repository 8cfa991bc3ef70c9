"""`forward="exact"`: the model computes full attention, and the kept blocks are a record of it with the real probabilities."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from allocations import LargestTensor
from dense_reference import EditedAttention
from torch import Tensor
from transformers import DynamicCache
from zoo import NEEDS_HOOKED, VARIANTS, build, dense, gap, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.hosts.hooks import complete

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0, forward="exact")
FAMILIES = ("GPT-2", "Llama", "Mistral", "Gemma 2", "Gemma 3", "GPT-OSS", "DeepSeek V3", "OPT", "BLOOM", "GPT-J", "XGLM")


def keep_of(cache: SparseActivationCache, name: str) -> Tensor:
    return cache.block_layout(int(name.split(".")[1])).to_dense()


def is_attention(name: str) -> bool:
    return name.endswith(("hook_pattern", "hook_attn_scores"))


def recorded(activation: Tensor, name: str, cache: SparseActivationCache) -> Tensor:
    """What of a dense activation a cache should hold."""
    if not is_attention(name):
        return activation
    fill = 0.0 if name.endswith("pattern") else -torch.inf
    return activation.masked_fill(~keep_of(cache, name), fill)


def assert_records(expected_cache: Any, cache: SparseActivationCache, tolerance: float) -> None:
    assert list(expected_cache.keys()) == list(cache.keys())
    for name in list(cache.keys()):
        activation = expected_cache[name]
        size = activation[activation.isfinite()].abs().max().clamp(min=1.0)
        assert gap(recorded(activation, name, cache), cache[name]) <= tolerance * size, name
    assert not cache.fallbacks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
@NEEDS_HOOKED
@torch.no_grad()
def test_everything_is_the_dense_models(variant: str, dtype: torch.dtype) -> None:
    model, text = build(variant, dtype), tokens()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    expected, expected_cache = model.run_with_cache(text)
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    assert gap(expected, logits) <= tolerance * expected.abs().max()
    assert_records(expected_cache, cache, tolerance)
    assert cache.pruned > 0.2
    for layer, pattern in cache.patterns.items():
        mass = pattern.retained_mass()
        assert gap(mass, pattern.sum(-1)) < 10 * tolerance
        rows = range(3, 20)
        assert gap(pattern[:, 1, 3:20].retained_mass(), mass[:, 1, 3:20]) < tolerance
        assert gap(cache.exact_rows(layer, list(rows)), expected_cache["pattern", layer][:, :, 3:20]) < tolerance
        if variant != "sinks":
            assert mass.max() <= 1 + tolerance
        assert mass.min() < 0.95 or variant == "local"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["standard", "gqa", "local", "alibi", "sinks"])
@NEEDS_HOOKED
@torch.no_grad()
def test_padded_batch(variant: str, side: str) -> None:
    model, text = build(variant), tokens()
    attention_mask = torch.ones_like(text)
    attention_mask[0, slice(0, 13) if side == "left" else slice(-13, None)] = 0
    expected, expected_cache = model.run_with_cache(text, attention_mask=attention_mask)
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG, attention_mask=attention_mask)
    assert gap(expected, logits) <= 1e-10 * expected.abs().max()
    assert_records(expected_cache, cache, 1e-10)


@pytest.mark.parametrize("variant", ["gqa", "local", "alibi", "sinks", "soft-capped"])
@NEEDS_HOOKED
@torch.no_grad()
def test_kv_cached_continuation(variant: str) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model, text = build(variant), tokens()

    def continuation(run: Any) -> Any:
        past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(text[:, :37], past_kv_cache=past, attention_mask=torch.ones_like(text[:, :37]))
        return run(text[:, 37:], past_kv_cache=past, attention_mask=torch.ones_like(text[:, 37:]))

    expected, expected_cache = continuation(model.run_with_cache)
    logits, cache = continuation(lambda *a, **kw: model.run_with_sparse_cache(*a, config=CONFIG, **kw))
    assert gap(expected, logits) <= 1e-10 * expected.abs().max()
    assert_records(expected_cache, cache, 1e-10)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64])
@torch.no_grad()
def test_any_length(length: int) -> None:
    model, text = build("gqa"), tokens(length, batch=1)
    expected, expected_cache = model.run_with_cache(text)
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    assert gap(expected, logits) <= 1e-10 * expected.abs().max()
    assert_records(expected_cache, cache, 1e-9)


# Gradients


Hooks = Sequence[tuple[Any, Callable[..., Any]]]


def run_with_grad(model: Any, text: Tensor, hooks: Hooks = (), backward_hooks: Hooks = ()) -> tuple[Tensor, dict[str, Any]]:
    """A loss, and the attention scores and patterns as the hooks left them."""
    seen: dict[str, Any] = {}
    note = (is_attention, lambda x, hook: seen.update({hook.name: x}))
    with model.hooks(fwd_hooks=[*hooks, note], bwd_hooks=list(backward_hooks)):
        return model(text).square().sum(), seen


def parameter_gradients(model: Any, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [grad for grad in found if grad is not None]


def assert_same_gradients(model: Any, expected: Tensor, found: Tensor) -> None:
    pairs = list(zip(parameter_gradients(model, expected), parameter_gradients(model, found), strict=True))
    largest = max(a.abs().max().item() for a, _ in pairs)
    assert all(gap(a, b) < 1e-9 * largest for a, b in pairs)


WATCHED = {
    "lazy": [],
    "hook_pattern watched": [(lambda name: name.endswith("hook_pattern"), lambda grad, hook: None)],
    "hook_attn_scores watched": [(lambda name: name.endswith("hook_attn_scores"), lambda grad, hook: None)],
    "both watched": [(is_attention, lambda grad, hook: None)],
}


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("variant", ["gqa", "soft-capped", "alibi", "local", "sinks"])
@NEEDS_HOOKED
def test_gradients_are_the_dense_models(variant: str, watched: str) -> None:
    model, text = build(variant), tokens()
    expected, dense_seen = run_with_grad(model, text)
    with tl_stream.sparse(model, CONFIG) as trace:
        loss, seen = run_with_grad(model, text, backward_hooks=WATCHED[watched])
    assert_same_gradients(model, expected, loss)
    for name, x in seen.items():
        wanted = torch.autograd.grad(expected, dense_seen[name], retain_graph=True)[0]
        found = torch.autograd.grad(loss, x, retain_graph=True)[0]
        keep = x.block_layout.to_dense()
        assert gap(wanted.masked_fill(~keep, 0.0), found) < 1e-10 * wanted.abs().max(), name
    assert not trace.fallbacks


def test_incl_bwd() -> None:
    model, text = build("gqa"), tokens()
    _, expected = model.run_with_cache(text, incl_bwd=True, return_type="loss")
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, incl_bwd=True, return_type="loss")
    assert list(expected.keys()) == list(cache.keys())
    names = [name for name in list(cache.keys()) if name.endswith("_grad")]
    assert len(names) > 20
    for name in names:
        wanted = expected[name]
        if is_attention(name.removesuffix("_grad")):
            wanted = wanted.masked_fill(~keep_of(cache, name), 0.0)
        assert gap(wanted, cache[name]) < 1e-10, name


# Edits by hooks


def assign(index: Any, value: float) -> Callable[[Any], Any]:
    def edit(x: Any) -> Any:
        x[index] = value
        return x

    return edit


def in_place(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def edit(x: Any) -> Any:
        write(x)
        return x

    return edit


def scale_head(x: Any) -> None:
    x[:, 1] *= 0.5


def scale_rows(x: Any) -> None:
    x[:, 2:, 30:57] *= 0.25
    x[0, 3, 40:] /= 3


def scale_then_assign(x: Any) -> None:
    x[:, 1] *= 0.5
    x[:, 1, :, 5] = 0.0
    x *= 2
    x[:, :2, 33, 2:9] = 0.125


def scale_then_hide(x: Any) -> None:
    x[:, 1] *= 0.5
    x[:, 1, :, 5] = -torch.inf
    x *= 2
    x[:, :2, 33, 2:9] = 0.125


def head_by_head(x: Any) -> None:
    for head in range(4):
        x[:, head] = x[:, head] * (0.25 * head)


def shift_head(x: Any) -> None:
    x[:, 1] += 1.5
    x[1, 2] -= 0.5


HEADS = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)[:, None, None]
ROWS = torch.linspace(0.25, 2, 61, dtype=torch.float64)[:, None]
PATTERN_EDITS = {
    "a column": assign((slice(None), 1, slice(None), 5), 0.0),
    "columns": assign((slice(None), slice(None), slice(None), slice(11, 30)), 0.0),
    "a row": assign((slice(None), 1, 40), 0.0),
    "a head": assign((slice(None), 2), 0.0),
    "rows": assign((0, slice(None), slice(20, 50)), 0.0),
    "an entry": assign((1, 0, 50, 3), 0.75),
    "listed entries": assign((0, 1, [40, 50], [3, 9]), 0.25),
    "scaled": lambda p: p * 0.5,
    "scaled from the left": lambda p: torch.mul(HEADS, p),
    "divided and negated": lambda p: -(p / 3) * 2,
    "heads scaled": lambda p: p * HEADS,
    "rows scaled": lambda p: p * ROWS,
    "scaled in place": in_place(lambda p: p.mul_(0.5)),
    "a head scaled": in_place(scale_head),
    "a head zeroed": in_place(lambda p: p[:, 1].zero_()),
    "some rows scaled": in_place(scale_rows),
    "scaled, then assigned": in_place(scale_then_assign),
    "a scaled head assigned": in_place(lambda p: p.__setitem__((slice(None), 2), p[:, 2] * 0.5)),
    "head by head": in_place(head_by_head),
    "a clone scaled": lambda p: p.clone().mul_(HEADS),
    "nothing": lambda p: p.clone(),
    "zeroed": lambda p: torch.zeros_like(p),
}
SCORE_EDITS = {
    "a column": assign((slice(None), 1, slice(None), 5), -torch.inf),
    "columns": assign((slice(None), slice(None), slice(None), slice(11, 30)), -torch.inf),
    "a window": assign((0, slice(None), slice(30, None), slice(0, 8)), -torch.inf),
    "an entry": assign((1, 0, 50, 3), 25.0),
    "scaled": lambda s: s * 0.5,
    "heads scaled": lambda s: s / HEADS,
    "a head scaled": in_place(scale_head),
    "scaled, then assigned": in_place(scale_then_hide),
    "scaled and shifted": lambda s: 1.0 + (s - 1.0) * ROWS,
    "shifted": lambda s: s - 1.0,
    "heads shifted": lambda s: s + HEADS,
    "a head shifted": in_place(shift_head),
    "nothing": lambda s: s.clone(),
}
EDITS = {
    **{f"pattern, {name}": ("hook_pattern", edit) for name, edit in PATTERN_EDITS.items()},
    **{f"scores, {name}": ("hook_attn_scores", edit) for name, edit in SCORE_EDITS.items()},
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("variant", ["gqa", "sinks"])
@pytest.mark.parametrize("edit", EDITS)
@NEEDS_HOOKED
def test_edits_count_as_in_the_dense_model(edit: str, variant: str, grad: bool) -> None:
    point, change = EDITS[edit]
    model, text = build(variant), tokens()
    name = f"blocks.1.attn.{point}"
    with torch.set_grad_enabled(grad):
        expected, dense_seen = run_with_grad(model, text, [(name, lambda x, hook: change(x.clone()))])
        with tl_stream.sparse(model, CONFIG) as trace:
            loss, seen = run_with_grad(model, text, [(name, lambda x, hook: change(x))])
    plain = model(text).square().sum()
    assert abs(loss - expected) < 1e-10 * expected.abs()
    changes_nothing = "nothing" in edit or (variant == "gqa" and edit.endswith("shifted") and "scaled" not in edit)
    assert changes_nothing == bool(abs(plain - expected) < 1e-10 * expected.abs())
    after = seen["blocks.1.attn.hook_pattern"]
    assert gap(dense_seen["blocks.1.attn.hook_pattern"] * after.block_layout.to_dense(), after) < 1e-12
    if grad:
        assert_same_gradients(model, expected, loss)
    assert not trace.fallbacks


@pytest.mark.parametrize("what", ["everything", "a head"])
@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
@torch.no_grad()
def test_a_pattern_of_another_run_takes_the_place(kind: str, what: str) -> None:
    """The other run records other blocks: entries that either records are the other run's."""
    model, clean, text = build("gqa"), tokens(seed=1), tokens()
    _, clean_dense = model.run_with_cache(clean)
    _, cache = model.run_with_sparse_cache(clean, config=CONFIG)
    _, own = model.run_with_sparse_cache(text, config=CONFIG)
    name = f"blocks.1.attn.hook_{kind}"
    either = keep_of(cache, name) | keep_of(own, name)
    assert not torch.equal(keep_of(cache, name), keep_of(own, name))

    def patch(x: Any, hook: Any) -> Any:
        other = clean_dense[name] if type(x) is Tensor else cache[name]
        if what == "everything":
            return other
        x = x.clone()
        x[:, 2] = torch.where(either, other, x)[:, 2] if type(x) is Tensor else other[:, 2]
        return x

    expected = model.run_with_hooks(text, fwd_hooks=[(name, patch)])
    with tl_stream.sparse(model, CONFIG) as trace:
        logits = model.run_with_hooks(text, fwd_hooks=[(name, patch)])
    assert gap(expected, logits) < 1e-10 * expected.abs().max()
    assert gap(expected, model(text)) > 1e-3
    assert not trace.fallbacks


@torch.no_grad()
def test_edits_elsewhere_count() -> None:
    model, text = build("gqa"), tokens()

    def half(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5

    for point in ("blocks.1.attn.hook_v", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"):
        expected = model.run_with_hooks(text, fwd_hooks=[(point, half)])
        with tl_stream.sparse(model, CONFIG):
            assert gap(expected, model.run_with_hooks(text, fwd_hooks=[(point, half)])) < 1e-10 * expected.abs().max()


def other_record() -> Any:
    return build("gqa").run_with_sparse_cache(tokens(seed=1), config=CONFIG)[1]["pattern", 1]


LOST = {
    "an ordinary tensor": (lambda p: p.to_dense(), NotImplementedError, "returned a Tensor; under forward='exact' expected"),
    "masked_fill": (lambda p: p.masked_fill(torch.ones(61, dtype=torch.bool), 0), NotImplementedError, "would not reach what"),
    "arithmetic on different records": (
        lambda p: p * 0.5 + other_record() * 0.5,
        ValueError,
        "its values on further ones are not known",
    ),
    "values for what was not recorded": (
        lambda p: p.__setitem__((0, 0, 60), torch.zeros(61)),
        ValueError,
        "of the entries written to were not recorded in layer 1",
    ),
    "a number added": (lambda p: p + 0.1, NotImplementedError, "added a number to a pattern"),
    **{
        name: (edit, NotImplementedError, "what became of the rest isn't known")
        for name, edit in {
            "squared": lambda p: p**2,
            "half of each of two": lambda p: (p + other_record()) * 0.5,
            "clamped": lambda p: p.clamp(max=0.5),
            "divided by its rows": lambda p: 1 / (p + 1),
            "keys scaled": lambda p: p * torch.linspace(0, 1, 61),
            "top entry only": lambda p: p * (p >= p.amax(-1, keepdim=True)),
            "mean of the heads": lambda p: p.mean(1, keepdim=True).expand_as(p),
            "lower triangle": lambda p: p.tril(-1),
            "a head squared in place": in_place(lambda p: p[:, 1].pow_(2)),
            "a squared head assigned": in_place(lambda p: p.__setitem__((slice(None), 1), p[:, 1] ** 2)),
            "squared, then scaled": lambda p: p.pow_(2) * 0.5,
        }.items()
    },
}


@pytest.mark.parametrize("case", LOST)
@torch.no_grad()
def test_no_write_is_lost(case: str) -> None:
    edit, error, message = LOST[case]
    model, text = build("gqa"), tokens()
    with tl_stream.sparse(model, CONFIG), pytest.raises(error, match=message):
        model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: edit(p))])
    assert gap(model(text), model.run_with_sparse_cache(text, config=CONFIG)[0]) < 1e-10


def test_a_learned_factor_has_the_dense_models_gradient() -> None:
    model, text = build("gqa"), tokens()
    found = []
    for run in (tl_stream.sparse(model, CONFIG), contextlib.nullcontext()):
        weights = HEADS.clone().requires_grad_()
        with run:
            logits = model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook, w=weights: p * w)])
        found.append(torch.autograd.grad(logits.square().sum(), weights)[0])
    assert gap(*found) < 1e-9 * found[1].abs().max()
    with tl_stream.sparse(model, CONFIG), pytest.raises(NotImplementedError, match="requires a gradient"):
        model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_attn_scores", lambda s, hook: s * weights)])


@torch.no_grad()
def test_a_scaled_pattern_of_another_run_takes_the_place() -> None:
    model, text = build("gqa"), tokens()
    _, clean = model.run_with_cache(tokens(seed=1))
    name = "blocks.1.attn.hook_pattern"
    expected = model.run_with_hooks(text, fwd_hooks=[(name, lambda p, hook: clean[name] * 0.5)])
    other = other_record()
    with tl_stream.sparse(model, CONFIG):
        logits = model.run_with_hooks(text, fwd_hooks=[(name, lambda p, hook: other * 0.5)])
    assert gap(logits, expected) < 1e-10 * expected.abs().max()


@torch.no_grad()
def test_a_model_that_changes_what_its_hook_points_gave_is_refused() -> None:
    """No model of the tests does; it would lose what was not recorded."""
    model, text = build("gqa"), tokens()

    def run(change: Callable[[Any], Any]) -> None:
        def note(pattern: Any, hook: Any) -> None:
            change(complete(pattern, pattern, hook))

        with tl_stream.sparse(model, CONFIG):
            model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", note)])

    with pytest.raises(NotImplementedError, match="mul: the model does this between its hook points"):
        run(lambda pattern: pattern * 0.5)
    with pytest.raises(NotImplementedError, match="takes its attention apart by head or text"):
        run(lambda pattern: pattern[:, :2] @ torch.ones(2, 2, 61, 8, dtype=torch.float64))


# The record


@torch.no_grad()
def test_a_record_of_the_same_blocks() -> None:
    model, text = build("gqa"), tokens()
    _, sparse_cache = model.run_with_sparse_cache(text, config=replace(CONFIG, forward="sparse"))
    _, cache = model.run_with_sparse_cache(text, config=replace(CONFIG, layout_from=sparse_cache))
    for layer in range(3):
        assert torch.equal(cache.block_layout(layer).to_dense(), sparse_cache.block_layout(layer).to_dense())
    assert cache.pruned == sparse_cache.pruned
    assert gap(cache["pattern", 2], sparse_cache["pattern", 2]) > 1e-3


@torch.no_grad()
def test_dense_layers_record_everything() -> None:
    model, text = build("gqa"), tokens()
    _, expected = model.run_with_cache(text)
    _, cache = model.run_with_sparse_cache(text, config=replace(CONFIG, dense_layers=(1,)))
    assert gap(expected["pattern", 1], cache["pattern", 1]) < 1e-12
    assert gap(cache["pattern", 1].retained_mass(), torch.ones(2, 4, 61)) < 1e-12
    assert_records(expected, cache, 1e-10)


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model, text = build("gqa"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SparseActivationCache.load(tmp_path / "cache.safetensors")
    assert loaded.config.forward == "exact"
    for name in list(cache.keys()):
        assert gap(cache[name], loaded[name]) == 0.0, name
    pattern = pickle.loads(pickle.dumps(cache["pattern", 1]))
    assert gap(pattern, cache["pattern", 1]) == 0.0
    assert gap(pattern.retained_mass(), cache["pattern", 1].sum(-1)) < 1e-12


@torch.no_grad()
def test_what_was_recorded_reads_as_its_dense_copy() -> None:
    model, text = build("gqa"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    pattern = cache["pattern", 1]
    values, v = pattern.to_dense(), torch.randn(2, 4, 61, 8, dtype=torch.float64)
    assert gap(pattern @ v, values @ v) < 1e-12
    assert gap(pattern[:, 2] @ v[:, 2], values[:, 2] @ v[:, 2]) < 1e-12
    assert gap(pattern[0, 1, -1], values[0, 1, -1]) < 1e-12
    assert gap(pattern.diagonal(-1, 2, 3), values.diagonal(-1, 2, 3)) < 1e-12
    assert "forward='exact'" in repr(pattern)
    assert "forward='exact'" in repr(cache)
    assert gap(cache["attn_scores", 1].logsumexp(-1), values.sum(-1).log() + cache["pattern", 1]._data.row_lse()) < 1e-10


def test_a_cache_does_not_keep_the_graph_alive() -> None:
    model, text = build("gqa"), tokens()
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    torch.autograd.grad(logits.sum(), cache["pattern", 1])
    del logits
    assert [tap() for tap in cache["pattern", 1]._data.taps] == [None]


def test_the_model_is_left_as_it_was() -> None:
    model, text = build("gqa"), tokens()
    model(text)  # TransformerLens notes the batch's size in some modules
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}

    def stop(x: Any, hook: Any) -> Any:
        raise KeyboardInterrupt

    with tl_stream.sparse(model, CONFIG):
        model(text)
    with pytest.raises(KeyboardInterrupt), tl_stream.sparse(model, CONFIG):
        model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", stop)])
    model.reset_hooks()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert dict(module._forward_pre_hooks) == hooks[name]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("edit", [None, "pattern, scaled", "scores, a column"])
def test_no_tensor_is_of_t_by_t_elements(edit: str | None, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr("tl_stream.estimator.problem.CHUNK_ENTRIES", 2**17)
    length, model = 2048, build("gqa", torch.float32, n_ctx=2048, d_vocab=40)
    config = StreamConfig(block_q=16, block_k=16, k=4, beam=2, max_dense=0, forward="exact")
    point, change = EDITS[edit or "pattern, nothing"]
    with LargestTensor() as watch, torch.set_grad_enabled(grad), tl_stream.sparse(model, config):
        hooks = [(f"blocks.1.attn.{point}", lambda x, hook: change(x))] if edit else []
        loss = model.run_with_hooks(tokens(length, batch=1), return_type="loss", fwd_hooks=hooks)
        if grad:
            loss.backward()
    assert watch.numel < length * length / 4


def test_unknown_forward() -> None:
    with pytest.raises(ValueError, match="forward was 'dense'; expected one of 'sparse', 'exact'"):
        StreamConfig(forward="dense")


# Bridges


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return families.build(request.param)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@torch.no_grad()
def test_bridges_equal_the_dense_model(family: Any) -> None:
    text = families.tokens(61)
    patterns: dict[int, Tensor] = {}

    def note(layer: int, pattern: Tensor) -> Tensor:
        patterns[layer] = pattern.clone()
        return pattern

    logits, cache = family.run_with_sparse_cache(text, config=replace(CONFIG, k=1))
    with EditedAttention(cache.patterns, 61, on_pattern=note):
        expected = family(text)
    assert close(logits, expected)
    assert cache.pruned > 0.1
    assert not cache.fallbacks
    for layer, pattern in cache.patterns.items():
        assert gap(patterns[layer] * pattern.block_layout.to_dense(), pattern.to_dense()) < 1e-4
        assert gap(pattern.retained_mass(), pattern.sum(-1)) < 1e-4


@pytest.mark.parametrize("edit", ["pattern, columns", "pattern, scaled", "scores, columns", "scores, shifted"])
@torch.no_grad()
def test_bridge_edits_count(family: Any, edit: str) -> None:
    text = families.tokens(61)
    point, change = EDITS[edit]
    _, cache = family.run_with_sparse_cache(text, config=CONFIG, names_filter=is_attention)
    layer = next(iter(cache.patterns))

    def on(number: int, x: Tensor) -> Tensor:
        return change(x.clone()) if number == layer else x

    edits: Any = {"on_pattern" if point == "hook_pattern" else "on_scores": on}
    with EditedAttention(cache.patterns, 61, **edits):
        expected = family(text)
    with tl_stream.sparse(family, CONFIG) as trace:
        name = f"blocks.{layer}.attn.{point}"
        logits = family.run_with_hooks(text, fwd_hooks=[(name, lambda x, hook: change(x))])
    assert close(logits, expected)
    assert not trace.fallbacks


@torch.no_grad()
def test_bridge_padding_and_steps(family: Any) -> None:
    text = families.tokens(48)
    past = DynamicCache(config=family.original_model.config)
    with tl_stream.sparse(family, CONFIG):
        logits = [family(text[:, :32], past_key_values=past, use_cache=True)]
        logits += [family(text[:, i : i + 1], past_key_values=past, use_cache=True) for i in range(32, 48)]
    assert close(torch.cat(logits, 1), family(text))


@torch.no_grad()
def test_bridge_generation(family: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    text = families.tokens(40)
    with tl_stream.sparse(family, CONFIG):
        generated = family.generate(text, **options)
    assert torch.equal(generated, family.generate(text, use_past_kv_cache=False, **options))


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
def test_bridge_gradients(name: str, kind: str) -> None:
    model, text = families.build(name, torch.float64), families.tokens(61)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, names_filter=is_attention)
    seen: dict[str, Tensor] = {}

    def note(layer: int, x: Tensor) -> Tensor:
        if layer == 1:
            seen["x"] = x = x * 1.0
        return x

    edits: Any = {"on_pattern" if kind == "pattern" else "on_scores": note}
    with EditedAttention(cache.patterns, 61, **edits):
        expected = torch.autograd.grad(model(text).square().sum(), seen["x"])[0]
    logits, live = model.run_with_sparse_cache(text, config=CONFIG)
    found = torch.autograd.grad(logits.square().sum(), live[kind, 1])[0]
    keep = cache.block_layout(1).to_dense()
    assert gap(expected.masked_fill(~keep, 0.0), dense(found)) < 1e-5 * expected.abs().max()

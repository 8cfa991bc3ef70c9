"""Gradients of a sparse run equal those of the masked dense model, on the kept entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from zoo import build, dense, gap, mask_hooks, tokens

import tl_stream
from tl_stream import StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
VARIANTS = ["standard", "gqa", "soft-capped", "alibi", "local", "sinks"]


def assert_same_gradients(model: Any, text: Tensor, config: StreamConfig) -> None:
    """Of all weights and activations, of the loss: those of the dense model masked with the layouts."""
    _, cache = model.run_with_sparse_cache(text, config=config, return_type="loss", incl_bwd=True)
    weights = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with model.hooks(fwd_hooks=mask_hooks(cache)):
        _, expected = model.run_with_cache(text, return_type="loss", incl_bwd=True)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert gap(parameter.grad, weights[name]) < 1e-12, name
    assert set(cache.keys()) == set(expected.keys())
    for name in expected.keys():
        a, b = expected[name], dense(cache[name])
        if name.endswith(("hook_pattern_grad", "hook_attn_scores_grad")):
            a = a * cache.block_layout(int(name.split(".")[1])).to_dense()
            assert a.abs().max() > 1e-6
        assert gap(a, b) < 1e-12 or ("attn_scores" in name and gap(a, b) < 1e-10), name
    assert not cache.fallbacks


@pytest.mark.parametrize("variant", VARIANTS)
def test_incl_bwd(variant: str) -> None:
    assert_same_gradients(build(variant), tokens(), CONFIG)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
def test_autograd_grad_to_a_cached_tensor(variant: str, kind: str) -> None:
    model, text = build(variant), tokens()
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    loss = logits.square().sum()
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept[hook.name] = tensor

    hooks = [*mask_hooks(cache), (lambda name: name.endswith(f"hook_{kind}"), keep)]
    expected_loss = model.run_with_hooks(text, fwd_hooks=hooks).square().sum()
    names = list(kept)
    expected = torch.autograd.grad(expected_loss, [kept[name] for name in names])
    found = torch.autograd.grad(loss, [cache[name] for name in names])
    for layer, (a, b) in enumerate(zip(expected, found, strict=True)):
        a = a * cache.block_layout(layer).to_dense()
        assert a.abs().max() > 1e-4
        assert gap(a, b) < 1e-10 * a.abs().max().clamp(min=1)


def _read_copy(x: Any, extra: list[Tensor]) -> Any:
    copied = x.clone()
    extra.append(copied[:, 1].exp().sum())
    return copied


def _read_original_then_use_copy(x: Any, extra: list[Tensor]) -> Any:
    copied = x.clone()
    extra.append(x[:, 1].exp().sum())
    return copied


def _edit_copy(x: Any, extra: list[Tensor]) -> Any:
    copied = x.clone()
    copied *= 0.5
    return copied


def _use_copy_of_copy(x: Any, extra: list[Tensor]) -> Any:
    copied = x.clone().clone()
    extra.append(x[:, 2].exp().sum())
    return copied


COPIES = {
    "copied": lambda x, extra: x.clone(),
    "copied twice": lambda x, extra: x.clone().clone(),
    "in another dtype": lambda x, extra: x.float().double(),
    "copy read": _read_copy,
    "original read, copy used": _read_original_then_use_copy,
    "copy edited": _edit_copy,
    "original read, copy of a copy used": _use_copy_of_copy,
}


@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
@pytest.mark.parametrize("use", COPIES)
def test_gradient_of_what_the_model_used_a_copy_of(kind: str, use: str) -> None:
    """As Hugging Face's code does, which takes the softmax in float32 and casts its result back."""
    model, text = build("gqa"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)

    def gradient(masking: Any) -> Tensor:
        extra: list[Tensor] = []
        seen: list[Tensor] = []

        def copy(x: Any, hook: Any) -> Any:
            seen.append(x)
            return COPIES[use](x, extra)

        logits = model.run_with_hooks(text, fwd_hooks=[*masking, (f"blocks.1.attn.hook_{kind}", copy)])
        loss = sum(extra, logits.square().sum())
        return dense(torch.autograd.grad(loss, seen)[0])

    with tl_stream.sparse(model, replace(CONFIG, layout_from=cache)) as trace:
        found = gradient([])
    expected = gradient(mask_hooks(cache)) * cache.block_layout(1).to_dense()
    tolerance = 1e-5 if use == "in another dtype" else 1e-10
    assert expected.abs().max() > 1e-4
    assert gap(expected, found) < tolerance * expected.abs().max().clamp(min=1)
    assert not trace.fallbacks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["GPT-J", "Llama"])
def test_gradient_of_a_cached_pattern_that_hugging_face_casts(family: str, dtype: torch.dtype) -> None:
    model, text = families.build(family, dtype), families.tokens(61)
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    for kind in ("pattern", "attn_scores"):
        grad = torch.autograd.grad(logits.float().square().mean(), cache[kind, 1], retain_graph=True)[0]
        assert grad.to_dense().abs().max() > 0


def test_a_cache_does_not_keep_the_graph_alive() -> None:
    model, text = build("gqa"), tokens()
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    loss = logits.sum()
    torch.autograd.grad(loss, cache["pattern", 1])
    del logits, loss
    assert [tap() for tap in cache["pattern", 1]._data.taps] == [None]
    with pytest.raises(RuntimeError, match="not part of the graph"):
        torch.autograd.grad(torch.ones((), requires_grad=True) * 2, cache["pattern", 1])


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_z", "hook_q"])
def test_backward_hooks_fire_and_replace(point: str) -> None:
    """A backward hook that halves the gradient of one layer changes the embedding's gradient as in the dense model."""
    model, text = build("gqa"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    seen: list[Tensor] = []

    def halve(grad: Any, hook: Any) -> Any:
        seen.append(dense(grad).clone())
        return grad * 0.5

    def embedding_gradient(forward_hooks: Any) -> Tensor:
        model.zero_grad()
        with model.hooks(fwd_hooks=forward_hooks, bwd_hooks=[(f"blocks.1.attn.{point}", halve)]):
            model(text, return_type="loss").backward()
        assert model.W_E.grad is not None
        return model.W_E.grad.clone()

    with tl_stream.sparse(model, CONFIG) as trace:
        found = embedding_gradient([])
    expected = embedding_gradient(mask_hooks(cache))
    assert len(seen) == 2
    keep = cache.block_layout(1).to_dense() if "hook_pattern" in point or "scores" in point else 1
    assert gap(seen[0], seen[1] * keep) < 1e-12
    assert gap(expected, found) < 1e-12
    assert not trace.fallbacks


def test_backward_hook_sees_the_output_of_forward_hooks() -> None:
    """With a forward edit at the same point, grad_output is taken after the edit, as torch does."""
    model, text = build("gqa"), tokens()
    edit = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.25)
    with model.hooks(fwd_hooks=[edit]):
        _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    seen: list[Tensor] = []

    def note(grad: Any, hook: Any) -> None:
        seen.append(dense(grad).clone())

    def run(before: Any) -> None:
        with model.hooks(fwd_hooks=[*before, edit], bwd_hooks=[("blocks.1.attn.hook_pattern", note)]):
            model(text, return_type="loss").backward()

    with tl_stream.sparse(model, CONFIG):
        run([])
    run(mask_hooks(cache))
    assert gap(seen[0], seen[1] * cache.block_layout(1).to_dense()) < 1e-12


def test_register_hook_and_retain_grad_inside_a_hook() -> None:
    model, text = build("gqa"), tokens()
    grads: dict[str, Any] = {}
    kept: dict[str, Any] = {}

    def attach(pattern: Any, hook: Any) -> None:
        pattern.register_hook(lambda grad: grads.update(hook=dense(grad).clone()))
        pattern.retain_grad()
        kept["pattern"] = pattern

    with tl_stream.sparse(model, CONFIG):
        loss = model.run_with_hooks(text, return_type="loss", fwd_hooks=[("blocks.1.attn.hook_pattern", attach)])
    loss.backward()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, return_type="loss", incl_bwd=True)
    expected = cache["blocks.1.attn.hook_pattern_grad"]
    assert gap(grads["hook"], expected) < 1e-12
    assert gap(kept["pattern"].grad, expected) < 1e-12


def test_gradient_through_a_value_that_a_hook_reads() -> None:
    """What a hook computes from the pattern is part of the graph."""
    model, text = build("gqa"), tokens()
    read: list[Tensor] = []
    hook = ("blocks.2.attn.hook_pattern", lambda pattern, hook: read.append(pattern[:, 1, 40].square().sum()))
    with tl_stream.sparse(model, CONFIG):
        model.run_with_hooks(text, fwd_hooks=[hook])
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), hook])
    found, expected = (torch.autograd.grad(x, model.W_E)[0] for x in read)
    assert gap(expected, found) < 1e-12


def test_finite_differences() -> None:
    model, text = build("gqa"), tokens()
    logits, cache = model.run_with_sparse_cache(text, config=CONFIG)
    key = cache["pattern", 1][0, 2, 50].argmax().item()
    gradient = torch.autograd.grad(logits[:, 50:, 0].sum(), cache["pattern", 1])[0][0, 2, 50, key].item()
    step = 1e-6

    def moved(by: float) -> float:
        def nudge(pattern: Any, hook: Any) -> None:
            pattern[0, 2, 50, key] = pattern[0, 2, 50, key] + by

        with tl_stream.sparse(model, CONFIG):
            return model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", nudge)])[:, 50:, 0].sum().item()

    with torch.no_grad():
        slope = (moved(step) - moved(-step)) / (2 * step)
    assert gradient == pytest.approx(slope, rel=1e-5)
    assert abs(gradient) > 1e-8


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_detaching_stops_the_gradient(point: str) -> None:
    """Freezing attention, as in attribution patching."""
    model, text = build("gqa"), tokens()
    freeze = (f"blocks.1.attn.{point}", lambda activation, hook: activation.detach())
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    with tl_stream.sparse(model, CONFIG):
        output = model.run_with_hooks(text, fwd_hooks=[freeze])
    expected = model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), freeze])
    found, wanted = (torch.autograd.grad(x.square().sum(), model.W_E)[0] for x in (output, expected))
    assert gap(found, wanted) < 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_a_write_under_no_grad_does_not_cut_the_graph(point: str) -> None:
    model, text = build("gqa"), tokens()

    def edit(activation: Any, hook: Any) -> None:
        with torch.no_grad():
            activation[:, 0, :, 3] = activation.fill

    def recorded(activation: Any, hook: Any) -> Any:
        activation = activation.clone()
        activation[:, 0, :, 3] = -torch.inf if "scores" in point else 0
        return activation

    name = f"blocks.1.attn.{point}"
    with model.hooks(fwd_hooks=[(name, edit)]):
        output, cache = model.run_with_sparse_cache(text, config=CONFIG)
    expected = model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), (name, recorded)])
    found, wanted = (torch.autograd.grad(x.square().sum(), model.W_E)[0] for x in (output, expected))
    assert gap(found, wanted) < 1e-9 * wanted.abs().max()


def test_a_pattern_that_is_used_twice() -> None:
    """The gradient is the sum over both uses."""
    model, text = build("gqa"), tokens()
    weights = torch.linspace(0, 1, 61, dtype=torch.float64)[:, None]
    kept: list[Any] = []

    def use(pattern: Any, hook: Any) -> None:
        kept.extend([pattern, (pattern @ weights).square().sum()])

    hook = ("blocks.1.attn.hook_pattern", use)
    with model.hooks(fwd_hooks=[hook]):
        output, cache = model.run_with_sparse_cache(text, config=CONFIG)
    expected = model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), hook])
    losses = [logits.square().sum() + 1e3 * extra for logits, extra in ((output, kept[1]), (expected, kept[3]))]
    found, wanted = (torch.autograd.grad(loss, pattern)[0] for loss, pattern in zip(losses, kept[::2], strict=True))
    assert gap(found, wanted * cache.block_layout(1).to_dense()) < 1e-9 * wanted.abs().max()


def test_hooks_that_would_never_fire_are_refused() -> None:
    model, text = build("gqa"), tokens()
    kept: list[Any] = []
    points = ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores")
    with tl_stream.sparse(model, CONFIG):
        output = model.run_with_hooks(text, fwd_hooks=[(name, lambda x, hook: kept.append(x)) for name in points])
    for late in kept:
        with pytest.raises(RuntimeError, match="was used by the model already"):
            late.register_hook(print)
        with pytest.raises(RuntimeError, match="was used by the model already"):
            late.retain_grad()
        assert torch.autograd.grad(output.sum(), late, retain_graph=True)[0].shape == late.shape
    extra = kept[1][0, 1, 50].square().sum()
    with pytest.raises(RuntimeError, match="read with gradients after the model had used it"):
        torch.autograd.grad(output.sum() + extra, kept[1])


def test_backward_hooks_after_edits_that_mix_tensors() -> None:
    model, text = build("gqa"), tokens()
    _, clean = model.run_with_sparse_cache(tokens(seed=5), config=CONFIG)
    clean_dense = clean["pattern", 1].to_dense()
    name = "blocks.1.attn.hook_pattern"
    edits = [
        (lambda p, hook: clean["pattern", 1] * 0.5 + p * 0.5, lambda p, hook: clean_dense * 0.5 + p * 0.5),
        (lambda p, hook: torch.where(p > 0.3, torch.zeros_like(p), p),) * 2,
    ]
    for sparse_edit, dense_edit in edits:
        grads: list[Tensor] = []

        def halve(grad: Any, hook: Any, grads: list[Tensor] = grads) -> Any:
            grads.append(dense(grad).clone())
            return grad * 0.5

        with model.hooks(fwd_hooks=[(name, sparse_edit)]):
            _, cache = model.run_with_sparse_cache(text, config=CONFIG)
        later = [hook for hook in mask_hooks(cache) if "blocks.1" not in str(hook[0])]
        keep = model.run_with_sparse_cache(text, config=CONFIG)[1].block_layout(1).to_dense()
        own = ("blocks.1.attn.hook_attn_scores", lambda s, hook, keep=keep: s.masked_fill(~keep, -torch.inf))
        embeddings = []
        for before, edit in (([], sparse_edit), ([*later, own], dense_edit)):
            model.zero_grad()
            with model.hooks(fwd_hooks=[*before, (name, edit)], bwd_hooks=[(name, halve)]):
                if before:
                    model(text, return_type="loss").backward()
                else:
                    with tl_stream.sparse(model, CONFIG):
                        model(text, return_type="loss").backward()
            embeddings.append(model.W_E.grad.clone())
        assert gap(grads[0] * keep, grads[1] * keep) < 1e-12
        assert gap(*embeddings) < 1e-12


def test_nested_contexts_fire_a_backward_hook_once() -> None:
    model, text = build("gqa"), tokens()
    fired: list[int] = []
    with tl_stream.sparse(model, CONFIG), tl_stream.sparse(model, CONFIG):
        hooks = [
            (f"blocks.1.attn.{point}", lambda grad, hook: fired.append(1)) for point in ("hook_pattern", "hook_attn_scores")
        ]
        with model.hooks(bwd_hooks=hooks):
            model(text, return_type="loss").backward()
    assert len(fired) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_backward(dtype: torch.dtype) -> None:
    model, text = build("gqa", torch.float32), tokens()
    loss, cache = model.run_with_sparse_cache(text, config=CONFIG, return_type="loss")
    exact = torch.autograd.grad(loss, model.W_E)[0]
    low = build("gqa", torch.float32).to(dtype)
    with low.hooks(fwd_hooks=mask_hooks(cache)):
        dense_grad = torch.autograd.grad(low(text, return_type="loss").float(), low.W_E)[0]
    with tl_stream.sparse(low, replace(CONFIG, layout_from=cache)):
        found = torch.autograd.grad(low(text, return_type="loss").float(), low.W_E)[0]
    assert (found - exact).abs().mean() <= 2 * (dense_grad - exact).abs().mean()

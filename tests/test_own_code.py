"""A user's own code in a model's attention is called, and counts; or it is refused by name, by `supports` and before a run."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import einops
import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from test_bridge import assert_same_state, state
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.opt import modeling_opt
from zoo import HAS_HOOKED, NEEDS_HOOKED, VARIANTS, build, gap, mask_hooks, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.hosts.own_code import is_own

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=1, max_dense=0)
LENGTH = 61


def assert_counts(model: Any, text: Tensor, plain: Tensor, precision: float = 1e-10) -> None:
    """Both oracles, that pruning changes something, and that the user's code does."""
    dense = model(text)
    assert gap(dense, plain) > 1e-3
    assert_traced(model, text, precision)


def assert_traced(model: Any, text: Tensor, precision: float = 1e-10) -> None:
    """Both oracles, and that pruning changes something."""
    assert tl_stream.supports(model).layers == tuple(range(len(model.blocks)))
    dense = model(text)
    logits, cache = model.run_with_sparse_cache(text, config=FULL)
    assert gap(logits, dense) <= precision * dense.abs().max()
    assert not cache.fallbacks
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED)
    assert gap(logits, masked_output(model, text, cache)) <= precision * dense.abs().max()
    assert gap(logits, dense) > 1e-3


def masked_output(model: Any, text: Tensor, cache: Any) -> Tensor:
    """The dense model's output under the layouts of a sparse run."""
    if HAS_HOOKED and type(model).__name__ == "HookedTransformer":
        return model.run_with_hooks(text, fwd_hooks=mask_hooks(cache))
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    with EditedAttention(keep, LENGTH, masked(keep)):
        return model(text)


def assert_refused(model: Any, text: Tensor, *names: str) -> None:
    dense = model(text)
    before, support = state(model), tl_stream.supports(model)
    assert not support
    assert support.reason is not None
    for name in names:
        assert name in support.reason
    with pytest.raises(ValueError, match=re.escape(support.reason)):
        model.run_with_sparse_cache(text, config=FULL)
    assert_same_state(before, state(model))
    assert torch.equal(model(text), dense)


# HookedTransformer: what a subclass, an instance or a patched class may have of its own. `original` is TransformerLens's.


def cooler(original: Any, self: Any, q: Tensor, k: Tensor) -> Tensor:
    return original(q, k) * 0.25


def by_einsum(original: Any, self: Any, q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bkhd, bqhd -> bhqk", k.repeat_interleave(2, 2), q) / 2


def by_named_einsum(original: Any, self: Any, q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(2, 2)
    return einops.einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key") / 1.5


def in_place(original: Any, self: Any, q: Tensor, k: Tensor) -> Tensor:
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, 2).transpose(1, 2).mT
    scores.mul_(0.5)
    scores.sub_(torch.linspace(0, 1, k.shape[1], dtype=q.dtype))
    return scores


def distances(original: Any, self: Any, q: Tensor, k: Tensor) -> Tensor:
    return -torch.cdist(q.transpose(1, 2), k.repeat_interleave(2, 2).transpose(1, 2))


def later_first(original: Any, self: Any, attn_scores: Tensor, *args: Any) -> Tensor:
    return original(attn_scores, *args) + torch.linspace(0, 2, attn_scores.shape[-1], dtype=attn_scores.dtype)


def triangles(original: Any, self: Any, attn_scores: Tensor, *args: Any) -> Tensor:
    n = attn_scores.shape[-1]
    far = torch.ones(n, n, dtype=torch.bool).tril(-8)
    return attn_scores.masked_fill(far, -torch.inf) + torch.full((n, n), -torch.inf).triu(1)


def window(original: Any, self: Any, query_ctx_length: int, key_ctx_length: int, **_: Any) -> Tensor:
    i, j = torch.arange(query_ctx_length)[:, None], torch.arange(key_ctx_length)
    return ((j <= i) & (j > i - 7))[None, None]


def without_first(original: Any, self: Any, **kwargs: Any) -> Tensor:
    return original(**kwargs) & (torch.arange(kwargs["key_ctx_length"]) > 0)[None, None, None]


def strictly_before(original: Any, self: Any, query_ctx_length: int, key_ctx_length: int, **_: Any) -> Tensor:
    return torch.ones(query_ctx_length, key_ctx_length, dtype=torch.bool).tril(-1)


def dilated(original: Any, self: Any, query_ctx_length: int, key_ctx_length: int, **_: Any) -> Tensor:
    i, j = torch.arange(query_ctx_length)[:, None], torch.arange(key_ctx_length)
    return ((j <= i) & ((i - j) % 3 == 0))[None, None]


def look_ahead(original: Any, self: Any, query_ctx_length: int, key_ctx_length: int, **_: Any) -> Tensor:
    return torch.ones(1, 1, query_ctx_length, key_ctx_length, dtype=torch.bool).tril(2)


METHODS = {
    "calculate_attention_scores": (cooler, by_einsum, by_named_einsum, in_place, distances),
    "apply_causal_mask": (later_first, triangles),
    "_make_causal_mask": (window, without_first, strictly_before, dilated, look_ahead),
}
UNKNOWN = (distances, dilated, look_ahead)
CASES = [(name, function) for name, functions in METHODS.items() for function in functions]


@contextmanager
def put(attn: Any, name: str, function: Any, how: str) -> Iterator[None]:
    """Have a user's method in a module: of a subclass, of the instance, or in the class itself, under a borrowed name."""
    kind = type(attn)
    original, standing = getattr(kind, name), getattr(attn, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(functools.partial(original, self), self, *args, **kwargs)

    if how == "subclass":
        attn.__class__ = type(function.__name__, (kind,), {name: method})
        yield
    elif how == "instance":
        attn.__dict__[name] = functools.partial(function, standing, attn)
        yield
    else:
        with patch.object(kind, name, functools.wraps(original)(method)):
            yield


@pytest.mark.parametrize("how", ["subclass", "instance", "patched class"])
@pytest.mark.parametrize(("name", "function"), CASES, ids=[function.__name__ for _, function in CASES])
@NEEDS_HOOKED
@torch.no_grad()
def test_methods_of_hooked_transformer(name: str, function: Any, how: str) -> None:
    model, text = build("gqa"), tokens(LENGTH)
    plain = model(text)
    with put(model.blocks[1].attn, name, function, how):
        if function in UNKNOWN:
            assert_refused(model, text, "layer" if how == "patched class" else "layer 1: its own ", "can't be traced")
        else:
            assert_counts(model, text, plain)


@NEEDS_HOOKED
@torch.no_grad()
def test_own_masks_and_padding() -> None:
    model, text = build("gqa"), tokens(LENGTH)
    valid = torch.ones_like(text)
    valid[0, :13] = 0
    with put(model.blocks[1].attn, "_make_causal_mask", window, "subclass"):
        logits, _ = model.run_with_sparse_cache(text, config=FULL, attention_mask=valid)
        assert gap(logits, model(text, attention_mask=valid)) < 1e-10


@NEEDS_HOOKED
@torch.no_grad()
def test_forwards_of_hooked_transformer() -> None:
    model, text = build("standard"), tokens(LENGTH)
    plain, attn = model(text), model.blocks[1].attn

    class Louder(type(attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 1.5

    class Everywhere(type(attn)):  # type: ignore[misc]
        def forward(self, query_input: Tensor, key_input: Tensor, value_input: Tensor, **kwargs: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in self.calculate_qkv_matrices(query_input, key_input, value_input))
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
            return torch.einsum("bhqd,hdm->bqm", z, self.W_O) + self.b_O

    class Now(Everywhere):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    attn.__class__ = Louder
    assert_counts(model, text, plain)
    attn.__class__ = Everywhere
    assert_refused(model, text, "layer 1: its own ", "Everywhere.forward never calls calculate_attention_scores")
    attn.__class__ = Now  # names a forward, and never gets to TransformerLens's: seen when it runs
    before = state(model)
    with pytest.raises(
        NotImplementedError, match=r"Layer 1 ran without the attention that blocks.1.attn.hook_attn_scores shows"
    ):
        model.run_with_sparse_cache(text, config=FULL)
    assert_same_state(before, state(model))
    attn.__class__ = Louder.__base__
    forward = attn.forward
    vars(attn)["forward"] = lambda *args, **kwargs: forward(*args, **kwargs) * 2
    assert_counts(model, text, plain)


@NEEDS_HOOKED
@torch.no_grad()
def test_own_alibi() -> None:
    from transformer_lens.components.abstract_attention import AbstractAttention

    model, text = build("alibi"), tokens(LENGTH)
    model(text)
    assert tl_stream.supports(model)  # what a run left there is TransformerLens's own
    model.blocks[1].attn.alibi = model.blocks[1].attn.alibi * 2
    assert_refused(model, text, "layer 1: its own alibi would be lost")
    model.blocks[1].attn.alibi = None
    original = AbstractAttention.create_alibi_multipliers
    with patch.object(AbstractAttention, "create_alibi_multipliers", staticmethod(lambda *args: original(*args) / 2)):
        assert_refused(model, text, "layer 0: its own test_own_code.")


@NEEDS_HOOKED
@torch.no_grad()
def test_own_to_tokens() -> None:
    model: Any = tl_stream.models.load(host="hooked")
    text, original = "the grass is green .", model.to_tokens
    vars(model)["to_tokens"] = lambda *args, **kwargs: original(*args, **kwargs).flip(-1)
    logits, _ = model.run_with_sparse_cache(text, config=FULL)
    assert gap(logits, model(text)) < 1e-4 * logits.abs().max()


class Wrapped(nn.Module):
    """What adapters do: another module around one."""

    def __init__(self, inner: nn.Module, factor: float = 1.5) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return output * self.factor if isinstance(output, Tensor) else (output[0] * self.factor, *output[1:])


class Instead(Wrapped):
    """Takes the place of a module that it holds."""

    def forward(self, hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden = next(x for x in (hidden, *kwargs.values()) if isinstance(x, Tensor))
        return hidden * self.factor


class Compiled(nn.Module):
    """As `torch._dynamo.OptimizedModule`, but what it compiled is wrong: it must not run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module
        self.forward = lambda *args, **kwargs: pytest.fail("compiled code was traced")


def assert_same_runs(model: Any, text: Tensor, plain: Tensor, pruned: Tensor) -> None:
    """Runs that keep everything and that keep little, as they were before something was wrapped around the attention."""
    for config, expected in ((FULL, plain), (PRUNED, pruned)):
        logits, _ = model.run_with_sparse_cache(text, config=config)
        assert gap(logits, expected) <= 1e-10 * plain.abs().max()
    assert gap(pruned, plain) > 1e-3


@NEEDS_HOOKED
@torch.no_grad()
def test_wrappers_of_hooked_transformer() -> None:
    model, text = build("gqa"), tokens(LENGTH)
    plain, block = model(text), model.blocks[1]
    pruned = model.run_with_sparse_cache(text, config=PRUNED)[0]
    attn = block.attn
    block.attn = Wrapped(attn)
    assert_counts(model, text, plain)
    block.attn = nn.DataParallel(Wrapped(attn))
    assert_counts(model, text, plain)
    block.attn = Instead(attn)
    with pytest.raises(NotImplementedError, match="Layer 1 ran without"):
        model.run_with_sparse_cache(text)
    block.attn = nn.ModuleList([attn, model.blocks[0].attn])
    assert "layer 1: its torch.nn.modules.container.ModuleList holds 2" in str(tl_stream.supports(model).reason)
    block.attn = nn.Identity()
    with pytest.raises(
        ValueError, match=r"layer 1: its torch.nn.modules.linear.Identity holds 0 of TransformerLens's attention"
    ):
        model.run_with_sparse_cache(text)
    block.attn = Compiled(attn)
    assert_same_runs(model, text, plain, pruned)
    block.attn = attn
    attn._compiled_call_impl = lambda *args, **kwargs: pytest.fail("compiled code was traced")
    assert_same_runs(model, text, plain, pruned)
    assert "_compiled_call_impl" in vars(attn)


# The bridge: attention functions, masks and softmaxes of a user's, and torch's own hooks.


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.matmul(query, key.mT) * (kwargs["scaling"] * 0.3)
    scores = scores + attention_mask[..., : key.shape[2]]
    pattern = scores.softmax(-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def masking_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    assert attention_mask is None
    n = query.shape[2]
    return attention(module, query, key, value, query.new_full((n, n), -torch.inf).triu(1), **kwargs)


def fused_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    z = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"] * 0.3)
    return z.transpose(1, 2).contiguous(), None


def own_mask(batch_size: int, q_length: int, kv_length: int, dtype: Any = torch.float32, **_: Any) -> Tensor:
    full = torch.full((q_length, kv_length), torch.finfo(dtype).min, dtype=dtype)
    return (full.triu(1) + full.tril(-9)).expand(batch_size, 1, -1, -1)


def holey_mask(q_length: int, **kwargs: Any) -> Tensor:
    mask = own_mask(q_length=q_length, **kwargs).clone()
    mask[..., range(5, q_length), range(q_length - 5)] = -torch.inf
    return mask


@contextmanager
def registered(model: Any, attend: Any, mask: Any) -> Iterator[None]:
    """`attend` is the model's attention, under a name with a mask function or without."""
    with patch.dict(AttentionInterface._global_mapping), patch.dict(AttentionMaskInterface._global_mapping):
        AttentionInterface.register("users", attend)
        if mask is not None:
            AttentionMaskInterface.register("users", mask)
        model.original_model.config._attn_implementation = "users"
        yield


EAGER_MASK = AttentionMaskInterface._global_mapping["eager"]
OWN_ATTENTION = {
    "under the eager mask": (attention, EAGER_MASK), "under its own mask": (attention, own_mask),
    "that masks itself": (masking_attention, None),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_ATTENTION)
@torch.no_grad()
def test_own_attention_function(name: str) -> None:
    model, text = families.build("OPT", torch.float64), families.tokens(LENGTH)
    plain = model(text)
    with registered(model, *OWN_ATTENTION[name]):
        assert_counts(model, text, plain)
        assert model.original_model.config._attn_implementation == "users"


@torch.no_grad()
def test_own_mask_function() -> None:
    """Under the name of Hugging Face's, beside its attention."""
    for family in ("OPT", "GPT-2"):
        model, text = families.build(family, torch.float64), families.tokens(LENGTH)
        plain = model(text)
        with patch.dict(AttentionMaskInterface._global_mapping, {"eager": own_mask}):
            assert_counts(model, text, plain, 1e-6)  # OPT takes its softmax in float32
        with patch.dict(AttentionMaskInterface._global_mapping, {"eager": holey_mask}):
            assert_refused(model, text, "layer 0: its own test_own_code.holey_mask can't be traced")


def averaging(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    n = torch.arange(1, value.shape[2] + 1, dtype=value.dtype)[:, None]
    return (value.cumsum(2) / n).transpose(1, 2).contiguous(), None


@torch.no_grad()
def test_own_fused_attention_function() -> None:
    model, text = families.build("OPT", torch.float64), families.tokens(LENGTH)
    plain = model(text)
    with registered(model, fused_attention, None):
        assert_counts(model, text, plain)
    with registered(model, averaging, None):
        assert_refused(model, text, "layer 0: its own test_own_code.averaging can't be traced", "no product of q and k")


@pytest.mark.parametrize("is_decorated", [False, True])
@torch.no_grad()
def test_own_default_attention_function(is_decorated: bool) -> None:
    model, text = families.build("OPT", torch.float64), families.tokens(LENGTH)
    plain, kind = model(text), cast("Any", modeling_opt.OPTAttention)
    if is_decorated:  # as transformers does from 5.24 on
        kind = type("Decorated", (kind,), {"forward": torch.no_grad()(kind.forward)})
        for block in model.blocks:
            block.attn.original_component.__class__ = kind
    with patch.object(modeling_opt, "eager_attention_forward", attention):
        assert_counts(model, text, plain)


def add_column(original: Any, self: Any, **kwargs: Any) -> Tensor:
    scores = original(**kwargs)
    return scores + torch.linspace(0, 2, scores.shape[-1], dtype=scores.dtype)


def instead_of_it(original: Any, self: Any, attn_scores: Tensor, **kwargs: Any) -> Tensor:
    n = attn_scores.shape[-1]
    return attn_scores.where(torch.ones(n, n).tril().bool() & ~torch.ones(n, n).tril(-9).bool(), -torch.inf)


def only_every_third(original: Any, self: Any, attn_scores: Tensor, **kwargs: Any) -> Tensor:
    i = torch.arange(attn_scores.shape[-1])
    return attn_scores.masked_fill((i[:, None] < i) | ((i[:, None] - i) % 3 > 0), -torch.inf)


@pytest.mark.parametrize("how", ["subclass", "instance", "patched class"])
@pytest.mark.parametrize("function", [add_column, instead_of_it, only_every_third], ids=lambda function: function.__name__)
@torch.no_grad()
def test_own_mask_of_a_bridge(function: Any, how: str) -> None:
    model, text = families.build("GPT-2", torch.float64), families.tokens(LENGTH)
    plain = model(text)
    with put(model.blocks[1].attn, "_apply_reconstruct_attention_mask", function, how):
        if function is only_every_third:
            assert_refused(model, text, "its own ", "can't be traced")
        else:
            assert_counts(model, text, plain)


@pytest.mark.skipif(not hasattr(AttentionBridge, "_masked_softmax"), reason="transformer-lens 3 has no such step")
@torch.no_grad()
def test_own_softmax_of_a_bridge() -> None:
    model, text = families.build("GPT-2", torch.float64), families.tokens(LENGTH)
    plain = model(text)
    with put(model.blocks[1].attn, "_masked_softmax", lambda original, self, x, **kw: original(x, **kw) * 0.5, "subclass"):
        assert_counts(model, text, plain)


@pytest.mark.parametrize("family", ["GPT-NeoX", "OPT", "Native", "GPT-2"])
@torch.no_grad()
def test_torch_hooks_on_attention(family: str) -> None:
    """They run, before and after, and matrices that they multiply aren't taken for q and k."""
    model, text = families.build(family, torch.float64), families.tokens(LENGTH)
    plain, counts, multiplies = model(text), [0, 0], [True]

    def before(module: Any, args: Any) -> None:
        x = torch.randn(2, 4, LENGTH, 8, dtype=torch.float64)
        counts[0] += not multiplies[0] or tuple((x @ x.mT).softmax(-1).shape) == (2, 4, LENGTH, LENGTH)

    def after(module: Any, args: Any, output: Any) -> Any:
        before(module, args)
        counts[1] += 1
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    attn = model.blocks[1].attn
    for module in (attn, attn.original_component, model.blocks[0].attn.o):
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    dense = model(text)
    expected = counts[:]
    logits, cache = model.run_with_sparse_cache(text, config=FULL)
    assert [n - m for n, m in zip(counts, expected, strict=True)] == expected
    assert gap(logits, dense) <= 1e-6 * dense.abs().max()  # OPT takes its softmax in float32
    assert gap(dense, plain) > 1e-3
    assert not cache.fallbacks
    logits, cache = model.run_with_sparse_cache(text, config=PRUNED)
    multiplies[0] = False  # the oracle counts the softmaxes of the layers
    assert gap(logits, masked_output(model, text, cache)) <= 1e-6 * dense.abs().max()
    assert gap(logits, dense) > 1e-3


@torch.no_grad()
def test_wrappers_of_a_bridge() -> None:
    model, text = families.build("GPT-2", torch.float64), families.tokens(LENGTH)
    plain, layers = model(text), model.original_model.transformer.h
    pruned = model.run_with_sparse_cache(text, config=PRUNED)[0]
    attn = layers[1].attn
    layers[1].attn = Wrapped(attn)
    assert_counts(model, text, plain)
    layers[1].attn = Instead(attn)
    with pytest.raises(NotImplementedError, match="Layer 1 ran without"):
        model.run_with_sparse_cache(text)
    layers[1].attn = Compiled(attn)
    assert_same_runs(model, text, plain, pruned)
    layers[1].attn = nn.Identity()
    assert_reason(model, text, "layer 1: its attention is not a part of the GPT2Block that runs any more")
    layers[1].attn = attn
    model.blocks[1]._modules["attn"] = nn.Identity()
    assert_reason(model, text, "layer 1: its torch.nn.modules.linear.Identity holds 0 of TransformerLens's attention modules")
    model.blocks[1]._modules["attn"] = attn
    model.blocks[0] = Wrapped(model.blocks[0], 1.0)
    assert tl_stream.supports(model).layers == (0, 1, 2)


def assert_reason(model: Any, text: Tensor, reason: str) -> None:
    assert reason in str(tl_stream.supports(model).reason)
    with pytest.raises(ValueError, match=reason):
        model.run_with_sparse_cache(text)


# People's own models, which make their masks themselves.


class OwnAttention(nn.Module):
    """Its mask is made in one of the ways that people write it."""

    seen: Tensor
    hidden: Tensor

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask, self.dropout = mask, nn.Dropout(0.1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("seen", torch.ones(1, 1, 128, 128).tril())
        self.register_buffer("hidden", torch.full((128, 128), -torch.inf).triu(1), persistent=False)

    def masked(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        match self.mask:
            case "added, of -inf":
                return scores + torch.triu(torch.full((n, n), -torch.inf, dtype=scores.dtype), diagonal=1)
            case "added, of the least number":
                scores += torch.full((1, 1, n, n), torch.finfo(scores.dtype).min, dtype=scores.dtype).triu(1)
                return scores
            case "filled":
                scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
                return scores
            case "a buffer of ones":
                return scores.masked_fill(self.seen[:, :, :n, :n] == 0, -1e9)
            case "a buffer of -inf":
                return scores + self.hidden[:n, :n]
            case "a window":
                i = torch.arange(n)
                return torch.where((i <= i[:, None]) & (i > i[:, None] - 9), scores, -torch.inf)
            case "subtracted":
                return scores - 1e10 * (1 - self.seen[:, :, :n, :n])
            case "a bias":
                return scores + torch.full((n, n), -torch.inf).triu(1) + torch.ones(n, n).tril().cumsum(-1)
        raise AssertionError(self.mask)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(self.attended(q, k, v).transpose(1, 2).flatten(-2))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, fused = q.shape[-2], nn.functional.scaled_dot_product_attention
        match self.mask:
            case "fused":
                return fused(q, k, v, is_causal=True)
            case "fused, under a mask":
                return fused(q, k, v, torch.ones(n, n, dtype=torch.bool).tril(), 0.0, scale=0.3)
            case "fused, under a window":
                hidden = torch.full((n, n), -torch.inf, dtype=q.dtype)
                return fused(q, k, v, attn_mask=hidden.triu(1) + hidden.tril(-9))
        scores = q @ k.transpose(-2, -1)
        scores.mul_(8**-0.5)
        return self.dropout(torch.softmax(self.masked(scores), -1)) @ v


class OwnMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class OwnBlock(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.attn, self.mlp = OwnAttention(mask), OwnMLP()

    def forward(self, x: Tensor, cos: Any, sin: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class OwnModel(nn.Module):
    """What TransformerLens's bridge for models in pretraining takes."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.embed, self.lm_head, self.norm_f = nn.Embedding(64, 32), nn.Linear(32, 64), nn.RMSNorm(32)
        self.blocks = nn.ModuleList([OwnBlock(mask) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None, None)
        return {"logits": self.lm_head(self.norm_f(x))}


def own_model(mask: str) -> Any:
    pretrain = pytest.importorskip("transformer_lens.model_bridge.supported_architectures.pretrain")
    from transformer_lens.config import TransformerBridgeConfig

    settings: dict[str, Any] = {"n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 128, "d_vocab": 64}
    model = OwnModel(mask).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    cfg = TransformerBridgeConfig(**settings, d_mlp=48, act_fn="silu", architecture=pretrain.ARCHITECTURE_NAME)
    return pretrain.build_pretrain_bridge(model, cfg, device="cpu", dtype=torch.float64).eval()


@pytest.mark.parametrize(
    "mask",
    [
        "added, of -inf",
        "added, of the least number",
        "filled",
        "a buffer of ones",
        "a buffer of -inf",
        "a window",
        "subtracted",
        "fused",
        "fused, under a mask",
        "fused, under a window",
    ],
)
@torch.no_grad()
def test_masks_of_own_models(mask: str) -> None:
    model, text = own_model(mask), families.tokens(LENGTH)
    assert_counts(model, text, torch.zeros(()).expand_as(model(text)))


@torch.no_grad()
def test_a_bias_of_an_own_model() -> None:
    model, text = own_model("a bias"), families.tokens(LENGTH)
    expected = model(text)
    with pytest.raises(NotImplementedError, match=r"adds a dense tensor of shape .* that is more than a mask"):
        model.run_with_sparse_cache(text, config=FULL)
    assert torch.equal(model(text), expected)


def test_whose_code_it_is() -> None:
    method: Any = AttentionBridge._apply_reconstruct_attention_mask
    assert is_own(method)
    assert is_own(functools.partial(method, None))
    assert is_own(torch.no_grad()(method))
    assert is_own(AttentionBridge)
    assert not is_own(functools.wraps(method)(lambda *args: None))
    assert not is_own(torch.no_grad()(lambda *args: None))
    assert not is_own(max)
    assert not is_own(Wrapped)


CHECKED = [
    *[f"test_exactness.py::test_nothing_pruned_equals_run_with_cache[{variant}-float64]" for variant in ("gqa", "local")],
    *[f"test_exactness.py::test_pruned_equals_the_masked_dense_model[{variant}-float64]" for variant in VARIANTS],
    *[f"test_exactness.py::test_padded_batch[{variant}-left-full]" for variant in ("gqa", "alibi", "sinks")],
    *[f"test_families.py::test_pruned_equals_the_masked_model[{family}]" for family in ("GPT-2", "Llama", "OPT", "Native")],
    *[f"test_own_code.py::test_methods_of_hooked_transformer[{name}-subclass]" for name in ("cooler", "window", "in_place")],
]


def test_under_the_type_checks_of_transformer_lens() -> None:
    """TransformerLens's own tests run with these on; they are made at import, so in a process of their own."""
    here = Path(__file__).parent
    options = ["-q", "-p", "no:warnings", "-p", "no:cacheprovider", "--jaxtyping-packages=transformer_lens,beartype.beartype"]
    path = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *CHECKED],
        cwd=here,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]

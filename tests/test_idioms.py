"""What notebooks do with patterns: on sparse ones it gives what it gives on the equally masked dense model's."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import torch
from allocations import LargestTensor
from circuitsvis import attention as circuitsvis
from torch import Tensor
from transformer_lens.head_detector import detect_head
from zoo import build, gap, mask_hooks, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.tensors.wrapper import SparseTensor

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0, dense_layers=(2,))
T = 61
HEADS = torch.linspace(0.5, 2, 4, dtype=torch.float64)


def ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, int(np.prod(shape)), dtype=torch.float64).reshape(shape)


def n_keys(p: Any) -> int:
    return p.shape[-1]


PATTERN: dict[str, Callable[[Any], Any]] = {
    # Head scores
    "previous-token score": lambda p: p.diagonal(-1, -2, -1).mean(-1),
    "induction score": lambda p: p.diagonal(dim1=-2, dim2=-1, offset=1 - n_keys(p) // 2).mean(-1),
    "current-token score": lambda p: torch.diagonal(p, dim1=-2, dim2=-1).mean(-1),
    "attention to the first token": lambda p: p[..., :, 0].mean(-1),
    "paired positions": lambda p: p[..., torch.arange(1, n_keys(p)), torch.arange(n_keys(p) - 1)].mean(-1),
    "entropy": lambda p: -(p * (p + 1e-9).log()).sum(-1),
    "entropy where positive": lambda p: -torch.where(p > 0, p * p.log(), 0.0).sum(-1),
    "entropy by nansum": lambda p: -(p * p.log()).nansum(-1),
    "entropy by entr": lambda p: torch.special.entr(p).sum(-1),
    "entropy by xlogy": lambda p: -torch.xlogy(p, p).sum(-1).mean(-1),
    "mean distance": lambda p: (p * (torch.arange(n_keys(p))[:, None] - torch.arange(n_keys(p))).clamp(min=0)).sum(-1),
    "effective number of keys": lambda p: 1 / (p**2).sum(-1),
    "share above a threshold": lambda p: (p > 0.1).float().mean((-2, -1)),
    "kept above a threshold": lambda p: p.masked_fill(p < 0.1, 0),
    "attention received": lambda p: p.sum(-2),
    "attention received, later half": lambda p: p[..., n_keys(p) // 2 :, :].mean(-2),
    "maximum of each row": lambda p: p.max(-1),
    "maximum of each column": lambda p: p.amax(-2),
    "key most read": lambda p: p.argmax(-1),
    "greatest entry of all": lambda p: torch.stack(torch.unravel_index(p.argmax(), p.shape)),
    "row of the last token": lambda p: p[..., -1, :].topk(5).indices,
    "top keys of every row": lambda p: p.topk(7).values,
    "least entries": lambda p: p.topk(2, largest=False).values,
    "median of each row": lambda p: p.median(-1).values,
    "key at the median": lambda p: p.gather(-1, p.median(-1, keepdim=True).indices)[..., 0],
    "quantile of each row": lambda p: p.quantile(0.9, -1),
    "quantiles": lambda p: (p - 0.1).quantile(torch.tensor([0.05, 0.5, 0.99], dtype=p.dtype), dim=-1, keepdim=True),
    "lower quartile": lambda p: torch.quantile(p, 0.25, dim=-1, interpolation="lower"),
    "product of each row": lambda p: (p + 0.9).prod(-1),
    "median and quantile of all": lambda p: torch.stack([p.median(), p.quantile(0.995)]),
    "histogram": lambda p: p.histc(20, 0, 1),
    "histogram of all values": lambda p: (p - 0.5).histc(11),
    "variance over keys": lambda p: p.var(-1),
    "deviation over queries": lambda p: p.std(-2),
    "count of what is read": lambda p: p.count_nonzero(-1),
    "entries read": lambda p: (p > 0.2).nonzero(),
    "values read": lambda p: p[p > 0.2],
    "where read": lambda p: torch.where(p > 0.2),
    "lower triangle": lambda p: p.tril(-1).sum(-1),
    "upper triangle": lambda p: torch.triu(p, -3).sum((-2, -1)),
    "nothing above the diagonal": lambda p: (p - torch.tril(p)).abs().sum(),
    # Over heads and texts
    "mean over heads": lambda p: p.mean(-3),
    "mean over heads of rows": lambda p: p[..., 5:30, :].mean(dim=-3, keepdim=True),
    "variance over heads": lambda p: p.var(dim=-3),
    "deviation over heads": lambda p: p.std(-3, unbiased=False),
    "maximum over heads": lambda p: p.amax(-3),
    "head that reads most": lambda p: p.max(dim=-3),
    "sum over the first dimension": lambda p: p.sum(0),
    "one head over texts": lambda p: p.unsqueeze(0)[:, ..., 1, :, :].mean(0),
    "heads weighted": lambda p: (p * HEADS[:, None, None]).sum(-3),
    "some heads": lambda p: p[..., [0, 3], :, :],
    "heads chosen by a mask": lambda p: p[..., HEADS > 1, :, :].sum(-1),
    "index_select": lambda p: p.index_select(-3, torch.tensor([2, 1])),
    "two heads compared": lambda p: (p[..., 0, :, :] - p[..., 1, :, :]).abs().sum((-2, -1)),
    "heads most alike": lambda p: torch.nn.functional.cosine_similarity(p.sum(-2)[..., :1, :], p.sum(-2), dim=-1),
    # Parts
    "one head": lambda p: p[..., 2, :, :],
    "a new axis": lambda p: p[..., None, :, :],
    "a new axis beside an index": lambda p: p[None, ..., 1, :, :] * 2,
    "a window": lambda p: p[..., -9:, -9:],
    "an offset window": lambda p: p[..., 5:16, :11],
    "without the first token": lambda p: p[..., 1:21, 1:21].sum(-1),
    "iteration": lambda p: [head.diagonal(-1, -2, -1).mean() for head in p],
    "unbind": lambda p: p.unbind(-3)[1],
    "split": lambda p: p.split(2, dim=-3)[1],
    "chunk": lambda p: p.chunk(3, dim=-2)[1],
    "narrow": lambda p: p.narrow(-2, -5, 3),
    "gather": lambda p: p.gather(-1, torch.zeros((*p.shape[:-1], 1), dtype=torch.long)),
    "squeeze": lambda p: p[..., :1, :, :].squeeze(-3),
    # Arranged
    "transposed": lambda p: p.transpose(-1, -2),
    "mT": lambda p: p.mT,
    "T of a head": lambda p: p.reshape(-1, *p.shape[-2:])[1].T,
    "permuted": lambda p: p.movedim(-3, 0),
    "heads last": lambda p: p.movedim(-3, -1),
    "received, by transposing": lambda p: p.mT.sum(-1),
    "rows of the transpose": lambda p: p.transpose(-2, -1)[..., :3, :],
    "greatest of the transpose": lambda p: p.mT.amax((-1, -2)),
    "transpose halved": lambda p: p.mT / 2 + 0,
    "columns scaled": lambda p: p.mT * ramp(n_keys(p))[:, None],
    "all heads in one dimension": lambda p: p.reshape(-1, *p.shape[-2:]),
    "one of all heads": lambda p: p.flatten(0, -3)[3],
    "each head flat": lambda p: p.flatten(-2).sum(-1),
    "flat maximum": lambda p: p.reshape(*p.shape[:-2], -1).amax(-1),
    "flat greatest entries": lambda p: p.flatten(-2).topk(9).values,
    "greatest entries of all": lambda p: p.flatten().topk(3).indices,
    "new dimension": lambda p: p.unsqueeze(1).sum(-1),
    "unflattened heads": lambda p: p.flatten(0, -3).unflatten(0, p.shape[:-2]),
    "contiguous": lambda p: p.mT.contiguous().mT,
    "numpy of a reduction": lambda p: p.sum(-2).detach().float().cpu().numpy(),
    "numpy of a row": lambda p: np.asarray(p[..., -1, :].detach().cpu()),
    "list of a row": lambda p: torch.tensor(p[..., -1, :].tolist()),
    # einops, einsum, products
    "einops reduce to heads": lambda p: einops.reduce(p, "... h q k -> h", "mean"),
    "einops reduce to rows": lambda p: einops.reduce(p, "... h q k -> ... q h", "sum"),
    "einops reduce heads": lambda p: einops.reduce(p, "... h q k -> ... q k", "max"),
    "einops rearrange": lambda p: einops.rearrange(p, "... h q k -> h ... q k"),
    "einops rearrange heads": lambda p: einops.rearrange(p, "... h q k -> (... h) q k")[1],
    "einops rearrange keys first": lambda p: einops.rearrange(p, "... q k -> k ... q"),
    "einops repeat of a row": lambda p: einops.repeat(p[..., -1, :], "... k -> ... k twice", twice=2),
    "einsum with v": lambda p: torch.einsum("...hqk,khd->...qhd", p, ramp(n_keys(p), 4, 3)),
    "einsum with v and W_O": lambda p: torch.einsum("khd,...hqk,hdm->...qhm", ramp(n_keys(p), 4, 3), p, ramp(4, 3, 5)),
    "einsum with a vector of keys": lambda p: torch.einsum("...qk,k->...q", p, ramp(n_keys(p))),
    "einsum with a vector of queries": lambda p: torch.einsum("...qk,q->...k", p, ramp(n_keys(p))),
    "einsum over heads": lambda p: torch.einsum("...hqk,h->...qk", p, HEADS),
    "einsum of two": lambda p: torch.einsum("...hqk,...hqk->...h", p, p * 2),
    "einsum of the diagonal": lambda p: torch.einsum("...qq->...", p),
    "einsum of a permuted": lambda p: torch.einsum("h...qk,kd->...hqd", p.movedim(-3, 0), ramp(n_keys(p), 2)),
    "einsum that permutes": lambda p: torch.einsum("...hqk->...qkh", p),
    "einops einsum": lambda p: einops.einsum(p, ramp(n_keys(p), 5), "... h q k, k d -> ... h q d"),
    "times v": lambda p: p @ ramp(n_keys(p), 3),
    "times a vector": lambda p: p @ ramp(n_keys(p)),
    "a vector times it": lambda p: ramp(n_keys(p)) @ p,
    "transpose times x": lambda p: p.mT @ ramp(n_keys(p), 3),
    "rows in part, transposed": lambda p: p[..., 7:30, :].mT @ ramp(23, 3),
    "bmm": lambda p: torch.bmm(p.flatten(0, -3), ramp(p.shape[:-2].numel(), n_keys(p), 2)),
    "two steps of rollout": lambda p: p[..., 1, :, :] @ (p[..., 0, :, :] @ ramp(n_keys(p), 2)),
    # Numbers and comparison
    "half": lambda p: p.half().sum(-1),
    "bfloat16": lambda p: p.to(torch.bfloat16).amax(-1),
    "float, then double": lambda p: p.float().double().mean(-1),
    "clamped": lambda p: p.clamp(0.05, 0.5),
    "masked with a triangle": lambda p: p.masked_fill(torch.ones(T, T).triu(1).bool(), 0.0) if n_keys(p) == T else p,
    "renormalised": lambda p: p / p.sum(-1, keepdim=True).clamp(min=1e-9),
    "norm": lambda p: p.norm(dim=-1),
    "normalised": lambda p: torch.nn.functional.normalize(p, p=1, dim=-1),
    "heads' cosine similarity": lambda p: torch.cosine_similarity(p[..., 0, :, :], p[..., 1, :, :], dim=-1),
    "mean squared difference": lambda p: torch.nn.functional.mse_loss(p[..., 0, :, :], p[..., 1, :, :]),
    "divergence of heads": lambda p: (p[..., 0, :, :] * ((p[..., 0, :, :] + 1e-9) / (p[..., 1, :, :] + 1e-9)).log()).sum(-1),
    "masked_select": lambda p: p.masked_select(p > 0.2),
    "type": lambda p: [p.type(torch.float32), p.type_as(torch.ones(1))],
    "new_zeros": lambda p: p.new_zeros(3),
    "equal": lambda p: torch.tensor([torch.equal(p, p), torch.equal(p, p * 2), bool((p == p).all())]),
    "allclose": lambda p: torch.tensor([torch.allclose(p, p + 1e-12), p.allclose(p * 1.1)]),
    "isclose": lambda p: torch.isclose(p, p.clone()),
    "comparison": lambda p: (p >= p[..., :1, :, :].amax()).any(-1),
    "ratio": lambda p: (p / (1 + p)).sum(-1),
    "rounded": lambda p: p.round(decimals=2),
    "knocked out": lambda p: _written(p, lambda q: q[..., 1, :, 3].zero_()),
    "small entries dropped": lambda p: _written(p, lambda q: q.__setitem__(q < 0.1, 0)),
    "diagonal dropped": lambda p: _written(p[..., 1, :, :].reshape(-1, *p.shape[-2:])[0], lambda q: q.fill_diagonal_(0)),
    "upper part dropped": lambda p: _written(p, lambda q: q.tril_(-1)),
    "head swapped": lambda p: _written(p, lambda q: q[..., 0, :, :].copy_(p[..., 1, :, :])),
    "transpose written to": lambda p: _written(p, lambda q: q.mT[..., 3, :].mul_(0)),
    "permuted and written to": lambda p: _written(p, lambda q: q.movedim(-3, 0)[1].mul_(0.5)),
    "flattened and written to": lambda p: _written(p, lambda q: q.flatten(0, -3)[1].mul_(0.5)),
    # Stacked
    "stack": lambda p: torch.stack([p, p * 2]),
    "stack of heads": lambda p: torch.stack(list(p.unbind(-3)), dim=-3),
    "mean of a stack": lambda p: torch.stack([p, p * 2, p.sqrt()]).mean(0),
    "variance of a stack": lambda p: torch.stack([p, p * 2, p.sqrt()]).var(0),
    "cat": lambda p: torch.cat([p, p * 2], dim=0).sum(-1),
    "cat of parts": lambda p: torch.cat([p[..., :1, :, :], p[..., 2:, :, :]], dim=-3).sum(-1),
    "stack, rows": lambda p: torch.stack([p, p * 2])[:, ..., -1, :],
}  # fmt: skip


def _written(p: Any, write: Callable[[Any], Any]) -> Any:
    changed = p.clone()
    write(changed)
    return changed


STACK: dict[str, Callable[[Any], Any]] = {
    "whole": lambda s: s,
    "layer": lambda s: s[1],
    "last layer": lambda s: s[-1],
    "layer and head": lambda s: s[2][..., 1, :, :],
    "layers": lambda s: s[1:],
    "listed layers": lambda s: s[[0, 2]],
    "head of every layer": lambda s: s[..., 1, :, :],
    "previous-token scores": lambda s: s.diagonal(-1, -2, -1).mean(-1),
    "diagonal": lambda s: torch.diagonal(s, offset=-2, dim1=-2, dim2=-1),
    "last rows": lambda s: s[..., -1, :],
    "entries": lambda s: s[..., 5, 3],
    "paired": lambda s: s[..., torch.arange(1, T), torch.arange(T - 1)].mean(-1),
    "sum over keys": lambda s: s.sum(-1),
    "received": lambda s: s.mean(-2),
    "mean over layers": lambda s: s.mean(0),
    "mean over layers and keys": lambda s: s.mean((0, -1)),
    "mean over layers and heads": lambda s: s.mean((0, -3)),
    "maximum over layers": lambda s: s.amax(0),
    "variance over layers": lambda s: s.var(0),
    "mean of all": lambda s: s.mean(),
    "maximum of all": lambda s: s.max(),
    "maxima": lambda s: s.max(-1),
    "entropy": lambda s: -(s * (s + 1e-9).log()).sum(-1),
    "topk": lambda s: s.topk(3).values,
    "scaled by layer": lambda s: s * ramp(3).reshape(3, *[1] * (s.dim() - 1)),
    "einops reduce": lambda s: einops.reduce(s, "l ... h q k -> l h", "mean"),
    "einops over layers": lambda s: einops.reduce(s, "l ... h q k -> ... h q k", "sum"),
    "einops rearrange": lambda s: einops.rearrange(s, "l ... h q k -> ... (l h) q k").sum(-1),
    "einsum": lambda s: torch.einsum("l...hqk,kd->l...hqd", s, ramp(T, 2)),
    "permuted": lambda s: s.transpose(0, 1),
    "comparison": lambda s: (s > 0.3).any(-1),
    "equal": lambda s: torch.tensor(torch.equal(s, s.clone())),
    "iteration": lambda s: [layer.sum(-1) for layer in s],
    "float": lambda s: s.float().sum(-1),
    "written to": lambda s: _written(s, lambda q: q[1].mul_(0.5)),
    "layers written to": lambda s: _written(s, lambda q: q[1:, ..., 2, :, :].mul_(0.5)),
    "rows written to": lambda s: _written(s, lambda q: q[..., 40, :].mul_(0.5)),
}


def traced(remove_batch_dim: bool = False, length: int = T, **options: Any) -> tuple[SparseActivationCache, Any]:
    """A sparse cache, and that of the equally masked dense model."""
    model, text = build("gqa"), tokens(length, batch=1 if remove_batch_dim else 2)
    config = StreamConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}, **options})
    with torch.no_grad():
        _, cache = model.run_with_sparse_cache(text, config=config, remove_batch_dim=remove_batch_dim)
        with model.hooks(fwd_hooks=mask_hooks(cache)):
            _, expected = model.run_with_cache(text, remove_batch_dim=remove_batch_dim)
    return cache, expected


@pytest.fixture(scope="module", params=[False, True], ids=["batch", "no batch"])
def caches(request: Any) -> Any:
    return traced(request.param)


def assert_same(found: Any, expected: Any) -> None:
    """Equal numbers, in the same kind of containers; sparse where a dense result would be of query_pos x key_pos."""
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
        return
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        return
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert isinstance(found, SparseTensor) or sum(size >= T for size in expected.shape) < 2
    assert gap(found, expected) < (1e-9 if expected.dtype == torch.float64 else 2e-2 if expected.dtype.itemsize < 4 else 1e-5)


@pytest.mark.parametrize("name", PATTERN)
@pytest.mark.parametrize("layer", [1, 2], ids=["sparse layer", "dense layer"])
def test_idiom_on_a_cached_pattern(caches: Any, name: str, layer: int) -> None:
    cache, expected = caches
    assert_same(PATTERN[name](cache["pattern", layer].clone()), PATTERN[name](expected["pattern", layer].clone()))
    assert not cache.fallbacks


@pytest.mark.parametrize("name", STACK)
def test_idiom_on_stacked_patterns(caches: Any, name: str) -> None:
    cache, expected = caches
    assert_same(STACK[name](cache.stack_activation("pattern")), STACK[name](expected.stack_activation("pattern")))
    assert not cache.fallbacks


DENSE_BY_NATURE: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda p: p.numpy(),
    "detach, float, cpu, numpy": lambda p: p.detach().float().cpu().numpy(),
    "np.asarray": lambda p: np.asarray(p),
    "tolist": lambda p: p.tolist(),
    "cumulative sum": lambda p: p.cumsum(-1),
    "sort": lambda p: p.sort(-1),
    "softmax of a pattern": lambda p: p.softmax(-1),
    "difference to a dense tensor": lambda p: p - ramp(n_keys(p), n_keys(p)),
    "composition of heads": lambda p: p @ p,
    "p plus its transpose": lambda p: p + p.mT,
    "split keys": lambda p: p.unflatten(-1, (1, -1)).cumsum(-1),
    "quantile over queries": lambda p: p.quantile(0.5, dim=-2),
    "top of each column": lambda p: p.topk(3, dim=-2),
    "cumulative product": lambda p: p.cumprod(-1),
    "median of a stack": lambda p: torch.stack([p, p]).median(0).values,
    "flip": lambda p: p.flip(-1),
    "pad": lambda p: torch.nn.functional.pad(p, (1, 0)),
}


@pytest.mark.parametrize("name", DENSE_BY_NATURE)
def test_what_is_dense_by_nature_works_while_small_and_raises_its_size_else(name: str) -> None:
    cache, expected = traced(max_dense=2**20)
    found, wanted = (DENSE_BY_NATURE[name](each["pattern", 1]) for each in (cache, expected))
    if isinstance(found, list):
        found, wanted = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    if isinstance(wanted, np.ndarray):
        assert_same(found, wanted)
    else:
        assert gap(*(x[0] if isinstance(x, tuple) else x for x in (found, wanted))) < 1e-9
    assert cache.fallbacks
    strict, _ = traced()
    with pytest.raises(NotImplementedError, match=r"\w+\(\) is not known .* would take \(.*61.*61.*\) = [\d,]+ entries"):
        DENSE_BY_NATURE[name](strict["pattern", 1])


LARGE = [name for name in PATTERN if name not in ("mean distance",)]  # it brings a dense T x T tensor itself


@pytest.fixture(scope="module")
def large() -> Any:
    model = build("gqa", torch.float32, n_ctx=2048, n_layers=2)
    config = StreamConfig(block_q=16, block_k=16, k=2, max_dense=0)
    with torch.no_grad():
        return model.run_with_sparse_cache(torch.randint(0, 40, (1, 2000)), config=config)[1]


@pytest.mark.parametrize("name", LARGE)
def test_no_idiom_makes_a_square_tensor(large: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**15)
    pattern = large["pattern", 1].double()
    with LargestTensor() as watch:
        PATTERN[name](pattern)
    assert watch.numel < 2000 * 2000 / 4
    assert not large.fallbacks


def test_no_idiom_on_a_stack_makes_a_square_tensor(large: Any) -> None:
    stack = large.stack_activation("pattern").double()
    with LargestTensor() as watch:
        stack.mean(0).sum(-1)
        stack.diagonal(-1, -2, -1).mean(-1)
        einops.reduce(stack, "l b h q k -> l h", "mean")
        stack[..., 2, :, :].topk(3)
    assert watch.numel < 2000 * 2000 / 4
    assert not large.fallbacks


# What hooks do: the returned pattern (None: edited in place) goes on through the model.
IN_HOOKS: dict[str, Callable[[Any], Any]] = {
    "rearranged and back": lambda p: einops.rearrange(einops.rearrange(p, "b h q k -> h b q k"), "h b q k -> b h q k"),
    "heads in one dimension and back": lambda p: (p.flatten(0, 1) * 0.5).unflatten(0, p.shape[:2]),
    "heads unbound and stacked": lambda p: torch.stack([head * 0.5 for head in p.unbind(1)], dim=1),
    "heads concatenated": lambda p: torch.cat([p[:, :2] * 0.5, p[:, 2:]], dim=1),
    "einsum with heads": lambda p: torch.einsum("bhqk,h->bhqk", p, HEADS),
    "mean of the heads": lambda p: p.mean(1, keepdim=True)[:, [0, 0, 0, 0]],
    "small entries dropped": lambda p: torch.where(p > 0.1, p, 0.0),
    "small entries masked": lambda p: p.masked_fill(p < 0.1, 0.0),
    "renormalised without the first token": lambda p: _without_first(p),
    "top entry only": lambda p: p * (p >= p.amax(-1, keepdim=True)),
    "previous token dropped": lambda p: p - torch.triu(p, -1) + torch.triu(p),
    "window": lambda p: p.triu(-5),
    "frozen": lambda p: p.detach(),
    "a copy": lambda p: copy.copy(p),
    "a clone, edited": lambda p: p.clone().mul_(0.5),
    "sharpened": lambda p: p**2 / (p**2).sum(-1, keepdim=True),
    "head by head": lambda p: _assign_heads(p),
    "head copied": lambda p: p.clone().index_select(1, torch.tensor([1, 1, 2, 3])),
    "transpose edited": lambda p: _edited(p, lambda q: q.transpose(2, 3)[:, 1, 4].zero_()),
    "boolean write": lambda p: _edited(p, lambda q: q.__setitem__(q < 0.05, 0)),
    "columns copied": lambda p: _edited(p, lambda q: q[:, 0].copy_(q[:, 1])),
    "round trip through float32": lambda p: p.float().double(),
}  # fmt: skip


def _without_first(p: Any) -> Any:
    p[..., 0] = 0
    return p / p.sum(-1, keepdim=True).clamp(min=1e-9)


def _assign_heads(p: Any) -> Any:
    for head in range(p.shape[1]):
        p[:, head] = p[:, head] * (0.25 * head)
    return p


def is_scores(name: str) -> bool:
    return name.endswith("hook_attn_scores")


def _edited(p: Any, write: Callable[[Any], Any]) -> Any:
    write(p)
    return p


@pytest.mark.parametrize("name", IN_HOOKS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_idiom_in_a_hook(name: str, grad: bool) -> None:
    model, text = build("gqa"), tokens()
    point = "blocks.1.attn.hook_pattern"

    def edit(pattern: Any, hook: Any) -> Any:
        return IN_HOOKS[name](pattern if isinstance(pattern, SparseTensor) else pattern.clone())

    with torch.set_grad_enabled(grad):
        with tl_stream.sparse(model, CONFIG) as trace:
            kept: dict[str, Any] = {}
            keep = (is_scores, lambda s, hook: kept.__setitem__(hook.name, s.block_layout.to_dense()))
            logits = model.run_with_hooks(text, fwd_hooks=[keep, (point, edit)])
        mask = (is_scores, lambda s, hook: s.masked_fill(~kept[hook.name], -torch.inf))
        expected = model.run_with_hooks(text, fwd_hooks=[mask, (point, edit)])
    assert gap(logits, expected) < (1e-5 if "float32" in name else 1e-9)
    assert not trace.fallbacks
    if grad:
        found, wanted = (torch.autograd.grad(x.square().sum(), model.W_E)[0] for x in (logits, expected))
        assert gap(found, wanted) < (1e-3 if "float32" in name else 1e-7) * wanted.abs().max().clamp(min=1)


CACHE: dict[str, Callable[[Any], Any]] = {
    "items": lambda c: [value.sum(-1) for _, value in c.items()],
    "values": lambda c: [value.sum(-1) for value in c.values()],
    "keys": lambda c: torch.tensor([len(name) for name in c.keys()]),  # noqa: SIM118
    "iteration": lambda c: torch.tensor([len(name) for name in c]),
    "names": lambda c: [c["attn", 1], c["pattern", -1], c["attn_scores", 0][..., 0, 7, :8], c["pattern", 1, "attn"]],
    "to": lambda c: c.to("cpu")["pattern", 1],
    "stack_activation": lambda c: c.stack_activation("pattern"),
    "stack_activation of two layers": lambda c: c.stack_activation("pattern", 2).mean(0),
    "stack_activation of z": lambda c: c.stack_activation("z"),
    "accumulated_resid": lambda c: c.accumulated_resid(-1, incl_mid=True, apply_ln=True, pos_slice=-1),
    "decompose_resid": lambda c: c.decompose_resid(-1, mlp_input=False, apply_ln=True),
    "stack_head_results": lambda c: c.stack_head_results(-1, apply_ln=True),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(2, expand_neurons=False),
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c.decompose_resid(2), 2),
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(-1), tokens=3),
    "stack_neuron_results": lambda c: c.stack_neuron_results(2, pos_slice=-1),
}


@pytest.mark.parametrize("name", CACHE)
def test_methods_of_activation_cache(name: str) -> None:
    assert_same(*(CACHE[name](copy.copy(each)) for each in traced()))
    assert_same(*(CACHE[name](copy.copy(each)) for each in traced(remove_batch_dim=True)))


@pytest.mark.parametrize("batch_slice", [0, slice(1, 2), [1, 0], None], ids=str)
def test_slicing_the_batch_of_a_cache(batch_slice: Any) -> None:
    cache, expected = (each.apply_slice_to_batch_dim(batch_slice) for each in traced())
    assert isinstance(cache, SparseActivationCache)
    assert cache.config == CONFIG
    assert (cache.has_batch_dim, cache.pruned > 0) == (expected.has_batch_dim, True)
    assert set(cache) == set(expected)
    for name in cache:
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            assert_same(cache[name], expected[name])
        else:
            torch.testing.assert_close(cache[name], expected[name])
    if batch_slice == slice(1, 2):
        assert_same(cache.remove_batch_dim()["pattern", 1], expected.remove_batch_dim()["pattern", 1])
        assert cache.patterns[1].shape == (4, T, T)


def test_toggle_autodiff() -> None:
    cache, _ = traced()
    try:
        cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
        cache.compute_head_results()
        assert cache["result", 1].shape == (2, T, 4, 32)
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
@torch.no_grad()
def test_head_detector(kind: Any, measure: Any) -> None:
    model = build("gqa")
    model.tokenizer = None
    text = tokens(batch=1)
    model.to_tokens = lambda *args, **kwargs: text
    cache, expected = traced(remove_batch_dim=True, max_dense=0 if measure == "mul" else 2**20)
    settings: list[dict[str, Any]] = [{}, {"exclude_bos": True}, {"exclude_bos": True, "exclude_current_token": True}]
    for options in settings:
        found, wanted = (
            detect_head(model, "text", kind, cache=each, error_measure=measure, **options) for each in (cache, expected)
        )
        assert gap(found, wanted) < 1e-6
        assert found.std() > 1e-4
    assert_same(cache["pattern", 1], expected["pattern", 1])  # as it was
    assert set(cache.fallbacks) <= {"sub"}


@pytest.mark.parametrize("view", ["attention_heads", "attention_pattern", "attention_patterns"])
def test_circuitsvis(view: str) -> None:
    words = [f"w{i}" for i in range(T)]
    cache, expected = traced(remove_batch_dim=True, max_dense=2**20)
    pages = []
    for each in (cache, expected):
        pattern = each["pattern", 1][1] if view == "attention_pattern" else each["pattern", 1]
        pattern = (pattern * 1000).round() / 1000
        pages.append(getattr(circuitsvis, view)(tokens=words, attention=pattern).local_src)
    strip = [re.sub(r"circuits-vis-[\w-]+", "", page) for page in pages]
    assert strip[0] == strip[1]
    assert set(cache.fallbacks) == {"tolist"}


SAVED: dict[str, Callable[[Any], Any]] = {
    "pattern": lambda c: c["pattern", 1],
    "scores": lambda c: c["attn_scores", 1],
    "head": lambda c: c["pattern", 1][..., 2, :, :],
    "some heads": lambda c: c["pattern", 1][..., [0, 2], :, :],
    "written to": lambda c: _written(c["pattern", 1], lambda q: q[..., 1, :, :].mul_(0.5)),
    "comparison": lambda c: c["pattern", 1] > 0.1,
    "permuted": lambda c: c["pattern", 1].mT,
    "stacked": lambda c: c.stack_activation("pattern"),
    "dictionary": lambda c: dict(c.items()),
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("variant", ["gqa", "alibi", "sinks"])
@torch.no_grad()
def test_saving_with_torch_and_pickle(name: str, variant: str) -> None:
    model = build(variant, n_ctx=1024)
    _, cache = model.run_with_sparse_cache(tokens(700), config=CONFIG)
    saved, file = SAVED[name](cache), io.BytesIO()
    torch.save(saved, file)
    for load in (lambda: torch.load(file, weights_only=True), lambda: pickle.loads(pickle.dumps(saved))):
        file.seek(0)
        found = load()
        pairs = [(found[key], saved[key]) for key in saved] if isinstance(saved, dict) else [(found, saved)]
        for a, b in pairs:
            assert type(a) is type(b)
            assert gap(a, b) < 1e-12
    if name == "pattern":
        assert file.getbuffer().nbytes < 1.3 * cache.memory()["blocks.1.attn.hook_pattern"] + 3 * cache["q", 1].nbytes
        assert gap(found.retained_mass(), saved.retained_mass()) == 0
    dense_bytes = sum(x.numel() * 8 for x in (saved.values() if isinstance(saved, dict) else [saved]))
    assert file.getbuffer().nbytes < dense_bytes / 4


def test_what_a_hook_arranged_is_cached_counted_and_saved(tmp_path: Path) -> None:
    model, text = build("gqa"), tokens()
    stacked = ("blocks.1.attn.hook_pattern", lambda p, hook: torch.stack([head * 0.5 for head in p.unbind(1)], dim=1))
    with torch.no_grad(), model.hooks(fwd_hooks=[stacked]):
        _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    assert cache.nbytes > 0
    cache.save(tmp_path / "run")
    loaded = SparseActivationCache.load(tmp_path / "run")
    assert gap(loaded["pattern", 1], cache["pattern", 1]) == 0
    assert list(cache.patterns) == list(loaded.patterns) == [0, 2]


def test_gradients_are_taken_on_the_pattern_itself() -> None:
    model = build("gqa")
    logits, cache = model.run_with_sparse_cache(tokens(), config=StreamConfig(block_q=8, block_k=8, k=3))
    for shown in (cache["pattern", 1].mT, cache.stack_activation("pattern")):
        for call in (
            lambda x: torch.autograd.grad(logits.sum(), x),
            lambda x: x.register_hook(print),
            lambda x: x.retain_grad(),
        ):
            with pytest.raises(NotImplementedError, match="call it on the pattern or the scores themselves"):
                call(shown)


def test_copies() -> None:
    pattern = traced()[0]["pattern", 1]
    for change in (lambda p: p, lambda p: p.mT, lambda p: torch.stack([p, p])):
        shown = change(pattern.clone())
        before = shown.to_dense()
        shallow, deep = copy.copy(shown), copy.deepcopy(shown)
        shown.mul_(2)
        assert gap(shallow, before * 2) < 1e-12
        assert gap(deep, before) < 1e-12


def test_printing() -> None:
    cache, _ = traced()
    for shown in (cache["pattern", 1], cache["pattern", 1].mT, cache.stack_activation("pattern")[:, 0]):
        text = repr(shown)
        assert f"shape={tuple(shown.shape)}" in text
        assert "block_q=8" in text
        assert "pruned=0." in text
        assert text == str(shown) == f"{shown}"
        assert len(text) < 1000

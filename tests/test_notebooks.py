"""What notebooks compute of patterns that linear memory can serve: the same numbers as of the dense tensor, and none made."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import einops
import numpy as np
import pytest
import torch
from allocations import LargestTensor
from circuitsvis import attention as circuitsvis
from torch import Tensor
from torch.nn import functional as F
from zoo import build, gap, left_padded, mask_hooks, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.tensors.wrapper import SparseTensor

CONFIG = StreamConfig(block_q=8, block_k=4, k=3, beam=1, max_dense=0)
EXACT = replace(CONFIG, forward="exact")
T = 60
ONE = torch.float64


def run(text: Tensor, config: StreamConfig = CONFIG, **options: Any) -> SparseActivationCache:
    with torch.no_grad():
        return build("gqa").run_with_sparse_cache(text, config=config, **options)[1]


def padded() -> SparseActivationCache:
    text, mask = left_padded(tokens(T - 11), 11)
    return run(text, attention_mask=mask)


def written_to() -> Any:
    pattern = run(tokens(T))["pattern", 1].clone()
    pattern[:, 2] *= 0.25
    pattern[..., 7] = 0
    return pattern


KINDS: dict[str, Callable[[], Any]] = {
    "pattern": lambda: run(tokens(T))["pattern", 1],
    "odd length": lambda: run(tokens(61), replace(CONFIG, block_q=4, block_k=8))["pattern", 1],
    "one text, no batch": lambda: run(tokens(T, batch=1), remove_batch_dim=True)["pattern", 1],
    "padded": lambda: padded()["pattern", 1],
    "dense queries": lambda: run(tokens(T), replace(CONFIG, dense_queries=13))["pattern", 1],
    "dense layer": lambda: run(tokens(T), replace(CONFIG, dense_layers=(1,)))["pattern", 1],
    "some rows": lambda: run(tokens(T))["pattern", 1][:, :, 5:53],
    "some rows, of dense queries": lambda: run(tokens(T), replace(CONFIG, dense_queries=13))["pattern", 1][:, :, 5:53],
    "some heads": lambda: run(tokens(T))["pattern", 1][:, 1:3],
    "one text": lambda: run(tokens(T))["pattern", 1][1],
    "written to": written_to,
    "scaled": lambda: run(tokens(T))["pattern", 1] * 2 + 0.5,
    "comparison": lambda: (run(tokens(T))["pattern", 1] > 0.1).double(),
    "float32": lambda: run(tokens(T))["pattern", 1].float(),
    "scores": lambda: run(tokens(T))["attn_scores", 1],
    "scores of dense queries": lambda: run(tokens(T), replace(CONFIG, dense_queries=13))["attn_scores", 1],
    "layers": lambda: run(tokens(T)).stack_activation("pattern"),
    "layers of dense queries": lambda: run(tokens(T), replace(CONFIG, dense_queries=13)).stack_activation("pattern"),
    "record": lambda: run(tokens(T), EXACT)["pattern", 1],
}


def keys(p: Any) -> int:
    return p.shape[-1]


def rows(p: Any) -> int:
    return p.shape[-2]


def divisor(n: int) -> int:
    return 12 if n % 12 == 0 else n


def sentence(n: int) -> Tensor:
    """The sentence of each position, of unequal lengths."""
    return torch.arange(n).sqrt().floor().long()


def zeros(p: Any, *size: int) -> Tensor:
    return torch.zeros(*p.shape[:-2], *size, dtype=p.dtype)


def one_hot(p: Any, n: int) -> Tensor:
    return F.one_hot(sentence(n)).to(p.dtype)


def count(n: int) -> int:
    return int(sentence(n).max()) + 1


def ramp(p: Any, *size: int) -> Tensor:
    return torch.linspace(-1, 1, int(np.prod(size)), dtype=p.dtype).reshape(size)


def pooled(how: str) -> Callable[[Any], Any]:
    return lambda p: einops.reduce(p, "... (q s) (k t) -> ... q k", how, s=divisor(rows(p)), t=divisor(keys(p)))


POOLED: dict[str, Callable[[Any], Any]] = {
    "einops mean": pooled("mean"),
    "einops sum": pooled("sum"),
    "einops max": pooled("max"),
    "einops min": pooled("min"),
    "einops, over heads": lambda p: einops.reduce(
        p, "... h (q s) (k t) -> ... k q", "mean", s=divisor(rows(p)), t=divisor(keys(p))
    ),
    "einops, keys only": lambda p: einops.reduce(p, "... q (k t) -> ... q k", "sum", t=divisor(keys(p))),
    "einops, rows of the transpose": lambda p: einops.reduce(p.mT, "... (k t) q -> ... q k", "max", t=divisor(keys(p))),
    "einops, groups of heads": lambda p: einops.reduce(
        p, "... (g h) (q s) (k t) -> ... g q k", "mean", h=2, s=divisor(rows(p)), t=divisor(keys(p))
    ),
    "reshaped, summed": lambda p: p.reshape(*p.shape[:-1], -1, divisor(keys(p))).sum(-1),
    "reshaped, both ends": lambda p: p.reshape(
        *p.shape[:-2], -1, divisor(rows(p)), keys(p) // divisor(keys(p)), divisor(keys(p))
    ).amax((-3, -1), keepdim=True),
    "a head's view": lambda p: p[..., 0, :, :].unflatten(-2, (-1, divisor(rows(p)))).mean((-2, -1)),
    "split and merged": lambda p: p.unflatten(-1, (-1, divisor(keys(p)))).flatten(-2).sum(-1),
    "above a threshold": lambda p: (p.unflatten(-1, (-1, divisor(keys(p)))) > 0.2).float().mean(-1),
    "any": lambda p: (p.unflatten(-1, (-1, divisor(keys(p)))) > 0.2).any(-1),
    "count": lambda p: p.unflatten(-1, (-1, divisor(keys(p)))).count_nonzero(-1),
    "norm": lambda p: p.unflatten(-2, (-1, divisor(rows(p)))).norm(dim=-2),
    "avg_pool2d": lambda p: F.avg_pool2d(p.flatten(0, -4) if p.dim() > 3 else p, 6),
    "avg_pool2d, uneven": lambda p: F.avg_pool2d(p[..., :2, :, :].flatten(0, -3), (7, 9), ceil_mode=True),
    "avg_pool2d, overlapping": lambda p: F.avg_pool2d(
        p.flatten(0, -3), 9, stride=(5, 4), padding=2, count_include_pad=False, ceil_mode=True
    ),
    "avg_pool2d, with a divisor": lambda p: F.avg_pool2d(p.flatten(0, -3), 9, 5, 3, divisor_override=7),
    "avg_pool2d, padded": lambda p: F.avg_pool2d(p.flatten(0, -3), (8, 5), stride=3, padding=(4, 1)),
    "avg_pool1d": lambda p: F.avg_pool1d(p.flatten(0, -3), 7, padding=3),
    "max_pool2d": lambda p: F.max_pool2d(p.flatten(0, -3), 7, stride=5, padding=1),
    "max_pool1d": lambda p: F.max_pool1d(p.flatten(0, -3), 7),
    "adaptive average": lambda p: F.adaptive_avg_pool2d(p.flatten(0, -3), (7, 8)),
    "adaptive maximum": lambda p: F.adaptive_max_pool2d(p.flatten(0, -3), (5, 64)),
    "adaptive, one axis": lambda p: F.adaptive_avg_pool1d(p.flatten(0, -3), 7),
}
BY_SENTENCE: dict[str, Callable[[Any], Any]] = {
    "index_add of keys": lambda p: zeros(p, rows(p), count(keys(p))).index_add(-1, sentence(keys(p)), p),
    "index_add_ of rows": lambda p: zeros(p, count(rows(p)), keys(p)).index_add_(p.dim() - 2, sentence(rows(p)), p, alpha=2),
    "index_add of a head": lambda p: torch.ones(count(rows(p)), keys(p), dtype=p.dtype).index_add(
        0, sentence(rows(p)), p.flatten(0, -3)[1]
    ),
    "index_add in two steps": lambda p: zeros(p, count(rows(p)), count(keys(p))).index_add(
        -2, sentence(rows(p)), zeros(p, rows(p), count(keys(p))).index_add(-1, sentence(keys(p)), p)
    ),
    "scatter_add": lambda p: zeros(p, rows(p), count(keys(p))).scatter_add(-1, sentence(keys(p)).expand(p.shape), p),
    "scatter_add_ of rows": lambda p: zeros(p, count(rows(p)), keys(p)).scatter_add_(
        -2, sentence(rows(p))[:, None].expand_as(p), p
    ),
    "means": lambda p: zeros(p, rows(p), 90).scatter_reduce(
        -1, sentence(keys(p)).expand(p.shape), p, "mean", include_self=False
    ),
    "means beside what was there": lambda p: (zeros(p, rows(p), 90) + 1).index_reduce(-1, sentence(keys(p)), p, "mean"),
    "maxima": lambda p: zeros(p, 90, keys(p)).scatter_reduce(-2, sentence(rows(p))[:, None].expand(p.shape), p, "amax"),
    "minima": lambda p: zeros(p, 90, keys(p)).index_reduce(p.dim() - 2, sentence(rows(p)), p, "amin", include_self=False),
    "index_put": lambda p: torch.zeros(count(rows(p)), count(keys(p)), dtype=p.dtype).index_put(
        (sentence(rows(p))[:, None], sentence(keys(p))), p.flatten(0, -3)[2], accumulate=True
    ),
}
LINEAR: dict[str, Callable[[Any], Any]] = {
    "membership": lambda p: one_hot(p, rows(p)).T @ p @ one_hot(p, keys(p)),
    "membership by einsum": lambda p: torch.einsum("qs,...qk,kt->...st", one_hot(p, rows(p)), p, one_hot(p, keys(p))),
    "heads' similarity": lambda p: torch.einsum("hqk,gqk->hg", p.flatten(0, -3), p.flatten(0, -3)),
    "heads' similarity, by rows": lambda p: torch.einsum("...hqk,...gqk->...hgq", p, p * 2),
    "heads' similarity, flattened": lambda p: p.flatten(0, -3).flatten(1) @ p.flatten(0, -3).flatten(1).T,
    "a head with each": lambda p: torch.einsum("...hqk,...qk->...h", p, p[..., 0, :, :]),
    "two weighted": lambda p: torch.einsum("...qk,...qk,k->...", p, p, ramp(p, keys(p))),
    "all in one number": lambda p: torch.einsum("hqk,gqk->", p.flatten(0, -3), p.flatten(0, -3)[:2]),
    "vecdot": lambda p: torch.linalg.vecdot(p, p),
    "vecdot of heads": lambda p: torch.linalg.vecdot(p[..., 0, :, :], p[..., 1, :, :], dim=-2),
    "inner": lambda p: torch.inner(p, ramp(p, keys(p))),
    "linear": lambda p: F.linear(p, ramp(p, 3, keys(p)), ramp(p, 3)),
    "baddbmm": lambda p: torch.baddbmm(
        ramp(p, rows(p), 3), p.flatten(0, -3), ramp(p, len(p.flatten(0, -3)), keys(p), 3), beta=2, alpha=0.5
    ),
    "addmm": lambda p: torch.addmm(ramp(p, rows(p), 3), p.flatten(0, -3)[0], ramp(p, keys(p), 3), alpha=3),
    "addcmul": lambda p: torch.addcmul(p, p, p, value=0.5).sum(-1),
}
NORMS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda p: p.norm(),
    "torch.norm": lambda p: torch.norm(p, dim=-1),
    "Frobenius": lambda p: p.norm("fro", dim=(-2, -1)),
    "3-norm": lambda p: p.norm(3, dim=-1),
    "0-norm": lambda p: torch.linalg.vector_norm(p, 0, dim=-2),
    "least": lambda p: torch.linalg.vector_norm(p, -torch.inf, dim=(-2, -1)),
    "linalg.norm": lambda p: torch.linalg.norm(p),
    "linalg.norm of matrices": lambda p: torch.linalg.norm(p, dim=(-2, -1)),
    "linalg.norm of a head": lambda p: torch.linalg.norm(p.flatten(0, -3)[1], 1),
    "linalg.norm of rows": lambda p: torch.linalg.norm(p, 1, dim=-1, keepdim=True),
    "vector_norm": lambda p: torch.linalg.vector_norm(p, dim=(-2, -1)),
    "matrix_norm": lambda p: torch.linalg.matrix_norm(p),
    "matrix_norm, columns": lambda p: torch.linalg.matrix_norm(p, 1),
    "matrix_norm, least row": lambda p: torch.linalg.matrix_norm(p, -torch.inf, keepdim=True),
    "dist": lambda p: torch.dist(p[..., 0, :, :], p[..., 1, :, :]),
    "pairwise_distance": lambda p: F.pairwise_distance(p[..., 0, :, :], p[..., 1, :, :]),
    "cosine of heads": lambda p: F.cosine_similarity(p[..., 0, :, :].flatten(), p[..., 1, :, :].flatten(), dim=0),
    "trace": lambda p: torch.trace(p.flatten(0, -3)[1]),
    "trace of a part": lambda p: p.flatten(0, -3)[1][3:20].trace(),
    "kl_div": lambda p: F.kl_div((p[..., 0, :, :].abs() + 1e-3).log(), p[..., 1, :, :].abs(), reduction="sum"),
    "nanmean": lambda p: p.nanmean(-1),
    "var_mean": lambda p: tuple(torch.var_mean(p, -1)),
    "std_mean": lambda p: tuple(torch.std_mean(p, (-2, -1), keepdim=True)),
    "pieces": lambda p: [part.sum((-2, -1)) for part in p.tensor_split(3, -2)],
}
EXTREMES: dict[str, Callable[[Any], Any]] = {
    "max of columns": lambda p: tuple(p.max(-2)),
    "max of columns, kept": lambda p: tuple(p.max(dim=-2, keepdim=True)),
    "min of columns": lambda p: tuple(p.min(-2)),
    "argmax of columns": lambda p: p.argmax(-2),
    "argmin of columns": lambda p: p.argmin(dim=-2, keepdim=True),
    "of a head": lambda p: tuple(p.flatten(0, -3)[1].max(0)),
    "of the transpose": lambda p: tuple(p.mT.max(-1)),
    "of the negated": lambda p: tuple((-p).max(-2)),
    "of later rows": lambda p: tuple(p[..., 11:, :].max(-2)),
    "of few rows": lambda p: tuple(p[..., 19:22, :].min(-2)),
    "aminmax": lambda p: tuple(p.aminmax()),
    "aminmax of rows": lambda p: tuple(p.aminmax(dim=-1, keepdim=True)),
}
REPEATED: dict[str, Callable[[Any], Any]] = {
    "a head expanded": lambda p: p[..., :1, :, :].expand(*p.shape[:-3], 5, -1, -1),
    "a mean expanded": lambda p: p - p.mean(-3, keepdim=True).expand_as(p),
    "a mean broadcast": lambda p: p - p.mean(-3, keepdim=True),
    "a matrix expanded": lambda p: p.flatten(0, -3)[1].expand(3, -1, -1),
    "new dimension": lambda p: p.unsqueeze(0).expand(3, *p.shape).sum(-1),
    "broadcast_to": lambda p: torch.broadcast_to(p.flatten(0, -3)[1][None], (4, *p.shape[-2:])),
    "repeated": lambda p: p.repeat(*[1] * (p.dim() - 3), 2, 1, 1),
    "repeated in front": lambda p: p.flatten(0, -3)[0].repeat(2, 1, 1),
    "tiled": lambda p: torch.tile(p, (2, 1, 1)),
    "interleaved": lambda p: p.repeat_interleave(2, dim=-3),
    "einops repeat": lambda p: einops.repeat(p.flatten(0, -3), "h q k -> (h g) q k", g=2)[3],
    "einops repeat of a head": lambda p: einops.repeat(p.flatten(0, -3)[1], "q k -> h q k", h=3).sum(-1),
    "heads reversed": lambda p: p.flip(-3),
    "first dimensions reversed": lambda p: torch.flip(p, (0, -3)) if p.dim() > 3 else p.flip(0),
    "heads rolled": lambda p: p.roll(1, -3),
    "concatenated": lambda p: torch.concat([p.flatten(0, -3), p.flatten(0, -3)[:1]]).sum(-1),
    "hstack": lambda p: torch.hstack([p[:, :1], p[:, 1:]]).sum(-1) if p.dim() == 4 else p,
}
IDIOMS = {**POOLED, **BY_SENTENCE, **LINEAR, **NORMS, **EXTREMES, **REPEATED}
TWO_HEADS = (
    "heads' similarity", "heads' similarity, by rows", "heads' similarity, flattened", "a head with each", "all in one number",
    "vecdot of heads", "dist", "pairwise_distance", "cosine of heads", "kl_div", "a mean expanded", "a mean broadcast",
)  # fmt: skip
LEFT_OUT = {
    "scaled": [*LINEAR],  # a product with what isn't 0 where nothing was kept needs everything
    "scores": [*LINEAR, *NORMS, "a mean expanded", "a mean broadcast"],  # -inf - -inf
    "record": TWO_HEADS,  # one head is known where another was recorded, which `to_dense` of the one doesn't show
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param, KINDS[request.param]()


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
        return
    assert found.dtype == expected.dtype
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
    size = expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1.0) if expected.is_floating_point() else 1.0
    assert gap(found, expected) <= tolerance * size


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(kind: Any, name: str) -> None:
    what, pattern = kind
    if any(what.startswith(start) and name in names for start, names in LEFT_OUT.items()):
        pytest.skip("see LEFT_OUT")
    expected = IDIOMS[name](pattern.to_dense())
    found = IDIOMS[name](pattern)
    assert_same(found, expected)
    assert not pattern.origin.fallbacks
    if name not in REPEATED:
        assert not isinstance(found, SparseTensor)


def test_writes_go_through_or_are_refused() -> None:
    pattern = run(tokens(T))["pattern", 1].clone()
    expected = pattern.to_dense().clone()
    for p in (pattern, expected):
        p.reshape(2, 2, 2, T, T)[:, 1, 0].mul_(0.5)
        p.flatten(0, 1)[2:4].mul_(3)
        p.unsqueeze(0).expand(1, *p.shape)[0, 1, 3].zero_()
    assert gap(pattern, expected) == 0
    for expand in (
        lambda p: p[:, :1].expand(-1, 3, -1, -1),
        lambda p: p[0, 0].expand(3, -1, -1),
        lambda p: p.unsqueeze(0).expand(2, *p.shape),
        lambda p: p.mT[:, :1].expand(-1, 4, -1, -1),
    ):
        for write in (lambda q: q.mul_(2), lambda q: q[..., 1, :].zero_(), lambda q: q.__setitem__((..., 0, 0), 0.5)):
            with pytest.raises(RuntimeError, match=r"is an expanded sparse tensor, .* clone"):
                write(expand(pattern))
            write(expand(pattern).clone())
    assert gap(pattern, expected) == 0


def test_lists_of_layers_are_paired_as_torch_pairs_them() -> None:
    stack = run(tokens(T), replace(CONFIG, max_dense=2**20)).stack_activation("pattern")
    dense, listed = stack.to_dense(), torch.tensor([0, 2, 1])
    for index in (
        lambda x: x[listed, 0, 1, [3, 4, 5], [1, 2, 3]],
        lambda x: x[[0, 1], :, [1, 2]],
        lambda x: x[[0, 1], 0, [1, 2]],
    ):
        assert gap(index(stack), index(dense)) == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 61])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_at_any_length(name: str, length: int) -> None:
    if length < 22 and ("rows" in name or name == "of a head"):
        pytest.skip("there are no such rows")
    pattern = run(tokens(length))["pattern", 1]
    assert_same(EXTREMES[name](pattern), EXTREMES[name](pattern.to_dense()))


GRADIENTS = [
    "einops mean", "einops max", "avg_pool2d, overlapping", "index_add in two steps", "scatter_add", "means", "interleaved",
    "heads' similarity", "a head with each", "membership by einsum", "Frobenius", "trace", "max of columns, kept",
    "a mean broadcast",
]  # fmt: skip


@pytest.mark.parametrize("dense_queries", [0, 13])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, dense_queries: int) -> None:
    model, text, config = build("gqa"), tokens(T), replace(CONFIG, dense_queries=dense_queries)
    losses: list[Tensor] = []

    def note(pattern: Any, hook: Any) -> None:
        found = IDIOMS[name](pattern)
        losses.append(((found[0] if isinstance(found, tuple) else found) ** 2).sum())

    with tl_stream.sparse(model, config) as trace:
        model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", note)])
    with model.hooks(fwd_hooks=mask_hooks(run(text, config))):
        model.run_with_hooks(text, fwd_hooks=[("blocks.1.attn.hook_pattern", note)])
    found, expected = (torch.autograd.grad(loss, model.W_E)[0] for loss in losses)
    assert gap(found, expected) < 1e-9 * expected.abs().max()
    assert not trace.fallbacks


@pytest.fixture(scope="module")
def large() -> Any:
    config = replace(CONFIG, block_q=16, block_k=16, k=2)
    with torch.no_grad():
        return build("gqa", torch.float32, n_ctx=2048).run_with_sparse_cache(tokens(1920, batch=1), config=config)[1]


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", [name for name in IDIOMS if name not in ("adaptive maximum", "means")])
def test_no_idiom_makes_a_square_tensor(large: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**15)
    monkeypatch.setattr("tl_stream.tensors.grouping._ENTRIES_AT_ONCE", 2**15)
    pattern = large["pattern", 1]
    with LargestTensor() as watch:
        IDIOMS[name](pattern)
    assert watch.numel < 4 * 1920 * 1920 / 4
    assert not large.fallbacks


def test_what_is_still_large_when_pooled_is_refused_with_its_size() -> None:
    model = build("gqa", torch.float32, n_ctx=20_000)
    with torch.no_grad():
        _, cache = model.run_with_sparse_cache(
            tokens(20_000, batch=1),
            config=replace(CONFIG, block_q=64, block_k=64, estimator="window", k=2),
            names_filter=["blocks.0.attn.hook_pattern"],
            logits_to_keep=1,
        )
    pattern = cache["pattern", 0]
    size = r"would make 400,000,000 numbers; at most 16,777,216 come back dense"
    for pool in (
        lambda p: einops.reduce(p, "b h (q s) (k t) -> b h q k", "mean", s=2, t=2),
        lambda p: F.avg_pool2d(p, 2),
    ):
        with LargestTensor() as watch, pytest.raises(ValueError, match=size):
            pool(pattern)
        assert watch.numel < 2**22
    pooled = einops.reduce(pattern, "b h (q s) (k t) -> b h q k", "sum", s=100, t=100)
    assert gap(pooled.sum((-2, -1)), torch.full((1, 4), 20_000.0)) < 1
    for look in (lambda p: p.tolist(), lambda p: p.detach().cpu().numpy(), lambda p: np.asarray(p), lambda p: p.to_dense()):
        with pytest.raises(
            (NotImplementedError, ValueError), match=r"tl_stream.viz.heads_view\(cache, \[\(layer, head\)\], tokens\)"
        ):
            look(pattern)
    for product in (lambda p: p @ p, lambda p: torch.einsum("hqj,hjk->hqk", p[0], p[0])):
        with pytest.raises(NotImplementedError, match=r"not sparse in blocks; .* p @ \(q @ v\)"):
            product(pattern)
    with pytest.raises(NotImplementedError, match=r"x.sum\(-2\).flip\(-1\)"):
        pattern.flip(-1)


def test_heads_of_several_layers_in_circuitsvis() -> None:
    names = [f"w{i}" for i in range(T)]
    cache = run(tokens(T), replace(CONFIG, max_dense=2**14))
    heads = [cache["pattern", 0][0, 0], cache["pattern", 1][1, 3]]
    stacks = torch.stack(heads), torch.stack([head.to_dense() for head in heads])
    pages = [circuitsvis.attention_heads(attention=stack, tokens=names).local_src for stack in stacks]
    assert len({re.sub(r"circuits-vis-[\w-]+", "", page) for page in pages}) == 1
    with pytest.raises(NotImplementedError, match=r"\(16, 60, 60\) = 57,600 entries .* tl_stream.viz.heads_view"):
        circuitsvis.attention_heads(attention=torch.stack(heads * 8), tokens=names)


def test_viz_is_there_and_imported_when_asked_for() -> None:
    assert tl_stream.viz.heads_view is not None
    code = "import sys, tl_stream; assert 'circuitsvis' not in sys.modules; tl_stream.viz.heads_view; tl_stream.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'tl_stream' has no attribute 'nothing'" in done.stderr


def test_a_cache_is_saved_by_its_own_method() -> None:
    cache = run(tokens(T))
    for save in (lambda: torch.save(cache, io.BytesIO()), lambda: pickle.dumps(cache), lambda: pickle.dumps({"run": cache})):
        with pytest.raises(TypeError, match=r"call cache.save\(path\), and SparseActivationCache.load"):
            save()
    copied, shallow = copy.deepcopy(cache), copy.copy(cache)
    before = cache["pattern", 1].to_dense()
    copied["pattern", 1][:, 1] = 0
    copied["z", 1].zero_()
    assert gap(cache["pattern", 1], before) == 0
    assert cache["z", 1].abs().max() > 0
    assert copied.model is cache.model
    assert shallow["z", 1] is cache["z", 1]
    assert (shallow.config, copied.pruned) == (cache.config, cache.pruned)

"""What code does to a cached pattern or to scores: the same as to the dense tensor, or an error that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import einops
import pytest
import torch
from torch import Tensor
from zoo import NEEDS_HOOKED, build, gap, tokens

from tl_stream import BlockSparsePattern, BlockSparseScores, SparseActivationCache, StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)


@pytest.fixture(scope="module")
def cache() -> SparseActivationCache:
    with torch.no_grad():
        return build("gqa").run_with_sparse_cache(tokens(), config=CONFIG)[1]


def fresh(cache: SparseActivationCache, kind: str) -> Any:
    return cache[kind, 1].clone()


READS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda p: p,
    "batch": lambda p: p[0],
    "batch and head": lambda p: p[1, 2],
    "head": lambda p: p[:, 2],
    "head slice": lambda p: p[:, 1:3],
    "every other head": lambda p: p[:, ::2],
    "last head": lambda p: p[:, -1],
    "rows": lambda p: p[:, :, 13:37],
    "rows of rows": lambda p: p[:, :, 13:37][:, 1, 5:],
    "ellipsis": lambda p: p[..., :],
    "row": lambda p: p[0, 1, 50],
    "last row of all": lambda p: p[:, :, -1, :],
    "column": lambda p: p[:, :, :, 0],
    "entry": lambda p: p[0, 1, 50, 48],
    "window": lambda p: p[:, :, -9:, -9:],
    "offset window": lambda p: p[:, 3:, :11],
    "stepped rows": lambda p: p[0, 0, ::7],
    "new axis": lambda p: p[0, 0, :5, None],
    "paired": lambda p: p[0, 1, torch.arange(1, 61), torch.arange(60)],
    "list of heads": lambda p: p[0, [0, 3], 5],
    "tensor index": lambda p: p[torch.tensor(0), torch.tensor(1)],
    "bool index": lambda p: p[0, 0, torch.arange(61) % 7 == 0],
    "diagonal": lambda p: p.diagonal(0, -2, -1),
    "previous token": lambda p: p.diagonal(-1, 2, 3),
    "induction": lambda p: p[0].diagonal(offset=1 - 30, dim1=-2, dim2=-1),
    "select": lambda p: p.select(1, 2),
    "unbind": lambda p: p[:, :, 3].unbind(1)[2],
    "iterate": lambda p: list(p[0])[1],
    "squeeze": lambda p: p[:1].squeeze(0),
    "sum over keys": lambda p: p.sum(-1),
    "mean over keys": lambda p: p[0].mean(-1, keepdim=True),
    "sum of a head": lambda p: p[0, 1].sum(),
    "mean of all": lambda p: p.mean(),
    "column sums": lambda p: p.sum(-2),
    "column means of rows": lambda p: p[:, :, 7:50].mean(dim=2),
    "sum over two": lambda p: p.sum((-1, -2)),
    "sum over heads and keys": lambda p: p.sum((1, 3), keepdim=True),
    "max over keys": lambda p: p.max(-1).values,
    "argmax": lambda p: p[:, :, 1:].argmax(-1),
    "max index": lambda p: p[0].max(dim=-1).indices,
    "amax": lambda p: p[:, :, 3:9].amax(-1, keepdim=True),
    "max of all": lambda p: p.max(),
    "min over keys": lambda p: p.min(-1).values,
    "topk": lambda p: p[:, :, 20:].topk(3, dim=-1).values,
    "topk indices": lambda p: p[:, :, 20:].topk(3).indices,
    "any": lambda p: (p > 0.5).any(-1),
    "scaled": lambda p: p * 2,
    "reflected": lambda p: 3.0 * p[0],
    "negated": lambda p: -p,
    "divided": lambda p: p / p.sum(-1, keepdim=True),
    "squared": lambda p: p**2,
    "entropy": lambda p: -(p * (p + 1e-9).log()).sum(-1),
    "clamped": lambda p: p.clamp(min=0.1),
    "square root": lambda p: p.abs().sqrt(),
    "plus one": lambda p: p + 1,
    "one minus": lambda p: 1 - p[:, 2],
    "difference of heads": lambda p: p[:, 1] - p[:, 2],
    "product with itself": lambda p: p * p,
    "times rows": lambda p: p[:, :, 5:30] * torch.arange(25)[:, None],
    "times keys": lambda p: p * torch.arange(61),
    "times heads": lambda p: p * torch.arange(4)[:, None, None],
    "comparison": lambda p: p >= 0.2,
    "masked fill": lambda p: p.masked_fill(torch.arange(61) < 9, 0.0),
    "where": lambda p: torch.where(p > 0.1, p, 0.0),
    "zeros like": lambda p: torch.zeros_like(p),
    "float": lambda p: p.float().sum(-1),
    "to dtype": lambda p: p.to(torch.float32),
    "detach": lambda p: p.detach()[0, 1],
    "detach, float, cpu": lambda p: p[0, 1].detach().float().cpu(),
    "times v": lambda p: p @ torch.linspace(0, 1, 61 * 5, dtype=torch.float64).view(61, 5),
    "matmul of a head": lambda p: torch.matmul(p[0, 2], torch.linspace(0, 1, 61 * 5, dtype=torch.float64).view(61, 5)),
    "shape": lambda p: torch.tensor([*p.shape, p.ndim, p.dim(), p.size(-1), p.numel(), len(p)]),
}


@pytest.mark.parametrize("name", READS)
def test_reading_a_pattern(cache: SparseActivationCache, name: str) -> None:
    pattern = fresh(cache, "pattern")
    assert gap(READS[name](pattern.to_dense()), READS[name](pattern)) < 1e-6
    assert not cache.fallbacks


@pytest.mark.parametrize("name", READS)
def test_reading_a_pattern_that_was_written_to(cache: SparseActivationCache, name: str) -> None:
    pattern = fresh(cache, "pattern")
    pattern[:, 2] *= 0.3
    pattern[0, :, :, 4] = 0
    assert gap(READS[name](pattern.to_dense()), READS[name](pattern)) < 1e-6


SCORE_READS = ("whole", "batch and head", "row", "column", "window", "paired", "max over keys", "argmax", "scaled", "rows")


@pytest.mark.parametrize("name", SCORE_READS)
def test_reading_scores(cache: SparseActivationCache, name: str) -> None:
    scores = fresh(cache, "attn_scores")
    assert gap(READS[name](scores.to_dense()), READS[name](scores)) < 1e-9


def zero_slice(p: Any) -> None:
    p[:, 1, 20:30] = 0


def scale_rows(p: Any) -> None:
    p[0, 1, 20:30] *= 2


def chained(p: Any) -> None:
    p[0, 1][20:30][:, 3] = 0


def column_zero(p: Any) -> None:
    p[:, 2, :, 5].zero_()


def row_of_view(p: Any) -> None:
    p[1][2][40].mul_(0.5)


def part_of_row(p: Any) -> None:
    p[0, 0, 40][2:9].fill_(0)


def in_place_method(p: Any) -> None:
    p.mul_(0.25)


def masked_fill_in_place(p: Any) -> None:
    p.masked_fill_(torch.arange(61) < 9, 0.0)


def diagonal_zero(p: Any) -> None:
    p[:, :, torch.arange(61), torch.arange(61)] = 0


def through_detach(p: Any) -> None:
    p.detach()[:, 1] *= 0.5


def copy_head(p: Any) -> None:
    p[:, 1] = p[:, 1].clone() * 0.5


def augmented_column(p: Any) -> None:
    p[:, 3, :, 2] += 0.0 * p[:, 3, :, 2]
    p[:, 3, :, 2] *= 3


def diagonal_method(p: Any) -> None:
    p.diagonal(dim1=-2, dim2=-1).zero_()


def new_axis(p: Any) -> None:
    p[0, 1, 40:50, None].mul_(0.5)


def unbound_rows(p: Any) -> None:
    for row in p[:, :, 40].unbind(1):
        row.mul_(0.5)


def select_head(p: Any) -> None:
    p.select(1, 2).mul_(0.5)


def through_data(p: Any) -> None:
    p.data[:, 1] *= 0.5


def out_argument(p: Any) -> None:
    row = p[0, 0, 40]
    torch.mul(row, 0.5, out=row)


WRITES = [
    diagonal_method, new_axis, unbound_rows, select_head, through_data, out_argument,
    zero_slice, scale_rows, chained, column_zero, row_of_view, part_of_row, in_place_method, masked_fill_in_place,
    diagonal_zero, through_detach, copy_head, augmented_column,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
def test_writes_are_never_lost(cache: SparseActivationCache, write: Callable[[Any], None], kind: str) -> None:
    sparse = fresh(cache, kind)
    if kind == "attn_scores" and write is not in_place_method:
        sparse = sparse.exp() if write is augmented_column else sparse.clamp(min=-1e9).masked_fill(sparse < -1e8, 0)
    expected = sparse.to_dense().clone()
    before = expected.clone()
    write(expected)
    write(sparse)
    assert gap(sparse, expected) < 1e-12
    assert gap(before, expected) > 0


DENSE_VIEWS: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda p: p.transpose(-1, -2),
    "permute": lambda p: p.permute(1, 0, 2, 3),
    "reshape": lambda p: p.reshape(8, 61, 61),
    "flatten": lambda p: p.flatten(0, 1),
    "narrow": lambda p: p.narrow(3, 0, 9),
    "chunk": lambda p: p.chunk(2, dim=1)[0],
    "unsqueeze": lambda p: p.unsqueeze(0),
    "einops": lambda p: einops.rearrange(p, "b h q k -> (b h) q k"),
    "T": lambda p: p[0, 0].T,
}


@pytest.mark.parametrize("name", DENSE_VIEWS)
def test_writes_to_views_of_small_patterns_are_not_lost(name: str) -> None:
    """What is made dense automatically still writes through where torch's view would."""
    with torch.no_grad():
        _, cache = build("gqa").run_with_sparse_cache(tokens(), config=StreamConfig(block_q=8, block_k=8, k=3, beam=1))
    pattern = cache["pattern", 1]
    expected = pattern.to_dense()
    for p in (pattern, expected):
        DENSE_VIEWS[name](p).mul_(0.5)
    assert gap(pattern, expected) < 1e-12


def test_what_can_not_write_through_is_refused(cache: SparseActivationCache) -> None:
    pattern = fresh(cache, "pattern")
    with pytest.raises(NotImplementedError, match="assign to x"):
        torch.mul(pattern, 0.5, out=pattern)
    with pytest.raises(NotImplementedError, match="assign to x"):
        pattern.data = pattern
    with pytest.raises(ValueError, match="read-only"):
        pattern[0, 0, 50].numpy().fill(0)
    for operation in (lambda p: p == p.to_dense(), lambda p: p + p.to_dense(), lambda p: p[:, :, 5:20] - p[:, :, 6:21]):
        with pytest.raises(NotImplementedError, match="is not known"):
            operation(pattern)


def test_other_ways_to_say_the_same(cache: SparseActivationCache) -> None:
    pattern = cache["pattern", 1]
    full = pattern.to_dense()
    assert gap(pattern.sum(axis=-1), full.sum(axis=-1)) < 1e-12
    assert gap(torch.mean(input=pattern, dim=-1), full.mean(-1)) < 1e-12
    assert gap(pattern[:1].squeeze(dim=0), full[0]) < 1e-12
    mask = (pattern > 0.1).float()
    mask[0, 0, 50, pattern[0, 0, 50].argmax()] = 0.5
    assert sorted(mask[0, 0, 50].unique().tolist())[-1] in (0.5, 1.0)
    assert mask[0, 0, 50].min() == 0
    assert 0.5 in mask[0, 0, 50].tolist()
    with pytest.raises(IndexError, match="dim was 5"):
        pattern[0].sum(5)
    assert gap(torch.zeros_like(pattern).max(-1).values, torch.zeros_like(full).max(-1).values) == 0


@NEEDS_HOOKED
def test_a_changed_q_is_noticed() -> None:
    model, text = build("gqa"), tokens()
    with torch.no_grad():
        _, cache = model.run_with_sparse_cache(text, config=CONFIG)
        cache["rot_k", 1].mul_(2)
        with pytest.raises(RuntimeError, match="q or k was changed in place"):
            cache["pattern", 1][0, 0, 5]


def test_a_clone_is_independent_and_an_alias_is_not(cache: SparseActivationCache) -> None:
    pattern = fresh(cache, "pattern")
    copy_, alias, deep = pattern.clone(), pattern.detach(), copy.deepcopy(pattern)
    pattern[:, 0] = 0
    assert float(alias[:, 0].sum()) == 0
    assert float(copy_[:, 0].sum()) > 1
    assert float(deep[:, 0].sum()) > 1


def test_writing_outside_the_kept_blocks_raises(cache: SparseActivationCache) -> None:
    pattern, scores = fresh(cache, "pattern"), fresh(cache, "attn_scores")
    lost = ~cache.block_layout(1).to_block_dense()[0, 0]
    q_block, kv_block = next((q, k) for q in range(8) for k in range(q) if lost[q, k])
    for write in (
        lambda: pattern.__setitem__((0, 0, q_block * 8, kv_block * 8), 0.5),
        lambda: pattern.__setitem__((slice(None), 0), torch.full((61, 61), 0.1)),
        lambda: scores.__setitem__((0, 0, slice(None), kv_block * 8), 1.0),
        lambda: pattern[0, 0, q_block * 8].add_(1.0),
        lambda: pattern[0].add_(1.0),
        lambda: pattern.__setitem__((0, 0, [q_block * 8], [kv_block * 8]), torch.tensor([0.5])),
    ):
        before = pattern.to_dense().clone()
        with pytest.raises(ValueError, match=r"lie outside the kept blocks of layer 1.*force the first one with keep_sink"):
            write()
        assert gap(before, pattern) == 0


def test_a_part_sees_later_writes_as_a_view_does(cache: SparseActivationCache) -> None:
    pattern = fresh(cache, "pattern")
    expected = pattern.to_dense()
    for p in (pattern, expected):
        column, row = p[:, 0, :, 0], p[0, 0, 40]
        p[:, 0] *= 0.5
        column.mul_(2)
        row[:5] *= 3
        assert gap(column, p[:, 0, :, 0]) == 0
    assert gap(pattern, expected) < 1e-12


def test_unknown_operations_raise_and_say_how_to_go_on(cache: SparseActivationCache) -> None:
    pattern = cache["pattern", 1]
    for operation in (torch.fft.fft, torch.linalg.svd, lambda p: p.cumsum(-1), lambda p: p[0, 0].sort(), lambda p: p.numpy()):
        with pytest.raises(NotImplementedError, match=r"is not known to BlockSparsePattern of layer 1.*\.to_dense\(\)"):
            operation(pattern)
    with pytest.raises(NotImplementedError, match="holds only kept blocks"):
        torch.vmap(lambda head: head.sum(-1))(pattern[0])
    assert not cache.fallbacks


def test_small_tensors_are_made_dense_and_counted() -> None:
    with torch.no_grad():
        _, cache = build("gqa").run_with_sparse_cache(tokens(), config=StreamConfig(block_q=8, block_k=8, k=3))
    pattern = cache["pattern", 1]
    assert gap(pattern.cumsum(-1), pattern.to_dense().cumsum(-1)) == 0
    assert pattern[0, 0].numpy().shape == (61, 61)
    assert cache.fallbacks == {"cumsum": 1, "numpy": 1}
    expected = pattern.to_dense().floor_divide(0.1)
    pattern.floor_divide_(0.1)
    assert gap(pattern, expected) == 0
    pattern.put_(torch.tensor([0]), torch.tensor([0.5], dtype=pattern.dtype))
    assert float(pattern[0, 0, 0, 0]) == 0.5
    assert cache.fallbacks["put_"] == 1


def test_a_large_dense_window_raises_with_its_size(cache: SparseActivationCache, monkeypatch: Any) -> None:
    monkeypatch.setattr("tl_stream.tensors.indexing.MAX_WINDOW", 100)
    monkeypatch.setattr("tl_stream.layout.MAX_DENSE_ENTRIES", 1000)
    pattern = cache["pattern", 1]
    wide = torch.zeros(60, dtype=torch.long)[:, None, None].expand(60, 40, 60)
    with pytest.raises(ValueError, match=r"dense window of \(60, 40, 60\) = 144,000 entries"):
        pattern[0, 0, wide, wide]
    with pytest.raises(ValueError, match=r"2 x 4 x 61 x 61 = 29,768 entries"):
        pattern.to_dense()


def test_what_a_pattern_tells_about_itself(cache: SparseActivationCache) -> None:
    pattern: Any = cache["pattern", 1]
    scores: Any = cache["attn_scores", 1]
    assert issubclass(BlockSparsePattern, Tensor)
    assert type(pattern) is BlockSparsePattern
    assert type(scores) is BlockSparseScores
    assert pattern.block_values.shape == (2, 4, 8, 4, 8, 8)
    head, heads = cast(Any, pattern[0, 1]), cast(Any, pattern[0, 1:3])
    assert head.block_values.shape == (1, 1, 8, 4, 8, 8)
    assert pattern.block_layout.shape == (2, 4, 61, 61)
    assert heads.block_layout.shape == (1, 2, 61, 61)
    text = repr(pattern)
    assert "layer=1" in text
    assert "lazy" in text
    assert "pruned=0." in text
    assert text == f"{pattern}"


@NEEDS_HOOKED
def test_retained_mass_and_exact_rows(cache: SparseActivationCache) -> None:
    q, k = cache["rot_q", 1].transpose(1, 2), cache["rot_k", 1].transpose(1, 2).repeat_interleave(2, 1)
    full = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(61, 61).tril().bool(), -torch.inf).softmax(-1)
    mass = (full * cache.block_layout(1).to_dense()).sum(-1)
    assert gap(cache["pattern", 1].retained_mass(), mass) < 1e-12
    assert gap(cache["pattern", 1][0, 2, 40:].retained_mass(), mass[0, 2, 40:]) < 1e-12
    assert gap(cache.exact_rows(1, [0, 17, 60]), full[:, :, [0, 17, 60]]) < 1e-12
    assert mass.min() < 0.9
    written = fresh(cache, "pattern")
    written[:, 0] = 0
    with pytest.raises(TypeError, match="this one was written to"):
        written.retained_mass()


@NEEDS_HOOKED
def test_lazy_patterns_share_the_memory_of_q_and_k(cache: SparseActivationCache) -> None:
    lazy = cache["pattern", 1]._data.products
    assert lazy.q.data_ptr() == cache["rot_q", 1].data_ptr()
    assert lazy.k.data_ptr() == cache["rot_k", 1].data_ptr()
    memory = cache.memory()
    assert memory["blocks.1.attn.hook_pattern"] < 61 * 4 * 2 * 8 + 2000  # the log-sum-exp and the indices
    assert cache.nbytes == sum(memory.values())

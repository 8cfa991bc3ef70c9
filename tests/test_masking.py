"""Masks and layouts against brute force on dense tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_stream import BlockLayout
from tl_stream.masking import AttentionMask


def brute_force(queries: int, keys: int, window: int | None, valid: Tensor | None) -> Tensor:
    """`[batch or 1, query_pos, key_pos]`."""
    i = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    allowed = j <= i
    if window is not None:
        allowed = allowed & (j > i - window)
    return allowed[None] if valid is None else allowed & valid[:, None]


cases = st.tuples(
    st.integers(1, 23), st.integers(0, 11), st.one_of(st.none(), st.integers(1, 30)), st.booleans(), st.integers(0, 999)
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_mask_equals_brute_force(case: tuple[int, int, int | None, bool, int]) -> None:
    queries, past, window, padded, seed = case
    keys = queries + past
    valid = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) > 0.3 if padded else None
    mask = AttentionMask.causal(queries, keys, window=window, key_valid=valid)
    expected = brute_force(queries, keys, window, valid).expand(2, -1, -1)
    batch, i, j = torch.arange(2)[:, None, None], torch.arange(queries)[:, None], torch.arange(keys)
    assert torch.equal(mask.allows(batch, i, j).expand(2, -1, -1), expected)
    assert mask.n_pairs(2) == int(expected.sum())
    first, last = keys // 3, keys - keys // 4
    counts = mask.counts(torch.arange(2)[:, None], torch.arange(queries), torch.tensor(first), torch.tensor(last))
    assert torch.equal(counts.expand(2, -1).long(), expected[:, :, first:last].sum(-1))


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_layout_equals_brute_force(case: tuple[int, int, int | None, bool, int], bq: int, bk: int, slots: int) -> None:
    queries, past, window, padded, seed = case
    keys = queries + past
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, keys, generator=generator) > 0.3 if padded else None
    mask = AttentionMask.causal(queries, keys, window=window, key_valid=valid)
    nq, nk = -(-queries // bq), -(-keys // bk)
    kept = torch.rand(2, 3, nq, nk, generator=generator) < slots / 4
    layout = from_blocks(kept, mask, bq, bk)
    assert torch.equal(layout.to_block_dense(), kept)
    expected = (
        brute_force(queries, keys, window, valid)[:, None]
        & (kept.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :queries, :keys])
    )
    assert torch.equal(layout.to_dense(), expected)
    assert layout.n_kept_pairs == int(expected.sum())
    allowed = int(brute_force(queries, keys, window, valid).expand(2, -1, -1).sum()) * 3
    assert layout.pruned == pytest.approx(1 - layout.n_kept_pairs / allowed if allowed else 0)
    other = torch.rand(2, 3, nq, nk, generator=generator) < 0.3
    assert torch.equal(layout.union(from_blocks(other, mask, bq, bk)).to_block_dense(), kept | other)
    extra = other.nonzero().unbind(-1)
    assert torch.equal(layout.with_blocks(*extra).to_block_dense(), kept | other)
    texts, heads = torch.tensor([1]), torch.tensor([2, 0])
    assert torch.equal(layout.select(texts, heads).to_dense(), layout.to_dense()[texts][:, heads])


def from_blocks(kept: Tensor, mask: AttentionMask, bq: int, bk: int) -> BlockLayout:
    number = kept.sum(-1)
    width = max(int(number.max()), 1)
    order = (~kept).int().argsort(dim=-1, stable=True)[..., :width]
    used = torch.arange(width) < number[..., None]
    return BlockLayout(order.masked_fill(~used, 0).int(), number.int(), mask, bq, bk, *kept.shape[:2])


def test_a_full_layout_stores_no_indices() -> None:
    layout = BlockLayout.full(AttentionMask.causal(1_000_000), 64, 64, 1, 8)
    assert layout.nbytes == 0
    assert layout.pruned == 0
    assert layout.n_pairs == 8 * 1_000_000 * 1_000_001 // 2


def test_hand_computed_layout() -> None:
    """Five tokens in blocks of two; the last query block keeps the first key block and its own."""
    layout = BlockLayout(
        torch.tensor([[[[0, 0], [0, 1], [0, 2]]]], dtype=torch.int32),
        torch.tensor([[[1, 2, 2]]], dtype=torch.int32),
        AttentionMask.causal(5), 2, 2, 1, 1,
    )  # fmt: skip
    assert layout.to_dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert layout.n_kept_pairs == 13
    assert layout.pruned == pytest.approx(2 / 15)


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="key_length was 3, below query_length 5"):
        AttentionMask.causal(5, 3)
    with pytest.raises(ValueError, match="window was 0; expected at least 1"):
        AttentionMask.causal(5, window=0)


def test_large_layouts_refuse_to_become_dense() -> None:
    with pytest.raises(ValueError, match=r"1,000,000,000,000 entries"):
        BlockLayout.full(AttentionMask.causal(1_000_000), 64, 64, 1, 1).to_dense()

"""Every backend against the others, by value and gradient, over masks, lengths and score mods."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_stream import BlockLayout, StreamConfig, estimate_layout
from tl_stream.attention import sparse_attention
from tl_stream.config import BACKENDS
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Alibi, Bias, Scale, Tanh

MODS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "soft-cap": (Scale(0.5), Tanh(), Scale(3.0)),
    "alibi": (Alibi(torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64), 9),),
    "bias": (Bias(torch.linspace(-1, 1, 42, dtype=torch.float64).view(1, 1, 1, 42)),),
}


def problem(length: int, past: int, padded: bool, window: int | None) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
    generator = torch.Generator().manual_seed(length)
    shapes = (2, 4, length, 8), (2, 2, length + past, 8), (2, 4, length + past, 6)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    valid = torch.ones(2, length + past, dtype=torch.bool)
    valid[0, :3] = False
    mask = AttentionMask.causal(length, length + past, window=window, key_valid=valid if padded else None)
    return q, k, v, mask


@pytest.mark.parametrize("mods", MODS)
@pytest.mark.parametrize("budget", [2, 100])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_backends_agree(length: int, sink: bool, budget: int, mods: str) -> None:
    for padded, window, past in itertools.product((False, True), (None, 5), (0, 9)):
        q, k, v, mask = problem(length, past, padded, window)
        column = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True) if sink else None
        config = StreamConfig(block_q=8, block_k=4, k=budget, beam=1)
        layout = estimate_layout(q, k, config, mask=mask, score_mods=MODS[mods])
        inputs = [q, k, v] + ([column] if column is not None else [])
        results = []
        for backend in BACKENDS:
            z, lse = sparse_attention(q, k, v, layout, score_mods=MODS[mods], sink=column, backend=backend)
            readable = lse.isfinite()
            loss = (z * torch.linspace(0, 1, z.numel(), dtype=z.dtype).view_as(z)).sum() + lse[readable].square().sum()
            results.append([z, lse.nan_to_num(neginf=-1.0), *torch.autograd.grad(loss, inputs)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-10), (padded, window, past)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend: str) -> None:
    """Two keys with scores 0 and log 3 share the weight 1 : 3; the second query block drops the first key."""
    q = torch.tensor([1.0, 1.0]).view(1, 1, 2, 1)
    k = torch.tensor([0.0, torch.tensor(3.0).log().item()]).view(1, 1, 2, 1)
    v = torch.tensor([[4.0], [8.0]]).view(1, 1, 2, 1)
    mask = AttentionMask.causal(2)
    z, lse = sparse_attention(q, k, v, BlockLayout.full(mask, 1, 1, 1, 1), scale=1.0, backend=backend)
    assert torch.allclose(z.flatten(), torch.tensor([4.0, 7.0]))
    assert torch.allclose(lse.flatten(), torch.tensor([1.0, 4.0]).log())
    own = BlockLayout(torch.tensor([[[[0], [1]]]]).int(), torch.ones(1, 1, 2).int(), mask, 1, 1, 1, 1)
    z, lse = sparse_attention(q, k, v, own, scale=1.0, backend=backend)
    assert torch.allclose(z.flatten(), torch.tensor([4.0, 8.0]))
    assert torch.allclose(lse.flatten(), torch.tensor([1.0, 3.0]).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys_gives_zero(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 4, 2) for _ in range(3))
    valid = torch.tensor([[False, False, True, True]])
    layout = BlockLayout.full(AttentionMask.causal(4, key_valid=valid), 2, 2, 1, 1)
    z, lse = sparse_attention(q, k, v, layout, backend=backend)
    assert z[0, 0, :2].abs().sum() == 0
    assert torch.isneginf(lse[0, 0, :2]).all()
    assert z[0, 0, 2:].abs().min() > 0


def test_gather_reads_nothing_past_the_kept_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN here, and so are the keys and values that are not kept."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    q, k, v = (torch.randn(1, 2, 24, 4) for _ in range(3))
    indices = torch.tensor([0, 1, 1]).view(1, 1, 3, 1).expand(1, 2, 3, 1).int()
    layout = BlockLayout(indices, torch.ones(1, 2, 3).int(), AttentionMask.causal(24), 8, 8, 1, 2)
    expected, _ = sparse_attention(q, k, v, layout, backend="reference")
    k[:, :, 16:], v[:, :, 16:] = torch.nan, torch.nan
    z, lse = sparse_attention(q, k, v, layout)
    assert torch.allclose(z, expected, atol=1e-6)
    assert lse.isfinite().all()


def test_bad_arguments() -> None:
    q = torch.randn(1, 2, 8, 4)
    layout = BlockLayout.full(AttentionMask.causal(9), 2, 2, 1, 2)
    with pytest.raises(ValueError, match=r"layout was for \(1, 2, 9, 9\); expected .* \(1, 2, 8, 8\)"):
        sparse_attention(q, q, q, layout)
    layout = BlockLayout.full(AttentionMask.causal(8), 2, 2, 1, 2)
    with pytest.raises(ValueError, match="backend was 'fast'; expected one of 'gather', 'reference'"):
        sparse_attention(q, q, q, layout, backend="fast")

"""How many blocks the budgets leave, and that a run with any of them equals the masked dense model."""

from __future__ import annotations

import json
import math
from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from test_estimator import block_masses, queries_and_keys
from torch import Tensor

import tl_stream
from tl_stream import BlockLayout, SparseActivationCache, StreamConfig, estimate_layout
from tl_stream.budget import Constant, Linear, PerHead, Sqrt, TopP
from tl_stream.estimator import Problem
from tl_stream.masking import AttentionMask

LENGTH = 320
N_BLOCKS = LENGTH // 8
POSITIONS = range(1, N_BLOCKS + 1)
OWN = torch.eye(N_BLOCKS, dtype=torch.bool)


def numbers(layout: BlockLayout) -> Tensor:
    assert layout.kv_num_blocks is not None
    return layout.kv_num_blocks


def layout_of(k: Any, **options: Any) -> BlockLayout:
    return estimate_layout(*queries_and_keys(LENGTH), StreamConfig(block_q=8, block_k=8, k=k, **options))


@pytest.mark.parametrize("estimator", ["exact", "dual", "stream", "hip", "box"])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Constant(5), [min(5, n) for n in POSITIONS]),
        (Sqrt(1.5), [min(math.ceil(1.5 * math.sqrt(n)), n) for n in POSITIONS]),
        (Linear(0.25, at_least=3), [min(max(math.ceil(n / 4), 3), n) for n in POSITIONS]),
    ],
    ids=["constant", "sqrt", "linear"],
)
def test_budgets_go_by_position(budget: Any, expected: list[int], estimator: str) -> None:
    layout = layout_of(budget, estimator=estimator)
    assert (layout.to_block_dense() | ~OWN).all()
    beside = numbers(layout) - torch.tensor(expected)  # the own block, where it is not among the chosen ones
    assert 0 <= beside.min() <= beside.max() <= 1
    assert torch.equal(layout.to_block_dense().sum(-1), numbers(layout).long())


def test_growing_budgets_choose_the_same_in_a_longer_text() -> None:
    q, k = queries_and_keys(4 * LENGTH)
    for rule in (Sqrt(0.7), Linear(0.05), PerHead({1: 2, (0, 2): Sqrt(1.0)}, 3)):
        for estimator in ("dual", "stream", "auto"):
            config = StreamConfig(block_q=8, block_k=8, k=rule, estimator=estimator, beam=2, exact_below=100)
            short, long = (estimate_layout(q[:, :, :n], k[:, :, :n], config).to_block_dense() for n in (LENGTH, 4 * LENGTH))
            assert torch.equal(short, long[:, :, :N_BLOCKS, :N_BLOCKS])


def test_a_longer_text_keeps_as_much_for_the_same_positions() -> None:
    q, k = queries_and_keys(LENGTH)
    config = StreamConfig(block_q=8, block_k=8, k=Sqrt(1.0), estimator="exact")
    short = estimate_layout(q[:, :, :160], k[:, :, :160], config)
    assert torch.equal(short.to_block_dense(), estimate_layout(q, k, config).to_block_dense()[:, :, :20, :20])


def test_a_window_counts_what_it_leaves() -> None:
    q, k = queries_and_keys(LENGTH)
    mask = AttentionMask.causal(LENGTH, window=80)
    layout = estimate_layout(q, k, StreamConfig(block_q=8, block_k=8, k=Linear(0.5)), mask=mask)
    chosen = numbers(layout)[:, :, 20:].unique().tolist()
    assert chosen == [
        6,
        7,
    ]  # 6 of 12 (80 keys before each of 8 queries, and their own), and the own one where it isn't among them


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_top_p_keeps_the_fewest_blocks_that_hold_p(p: float) -> None:
    q, k = queries_and_keys(LENGTH)
    layout = layout_of(TopP(p, at_most=40), estimator="exact")
    masses = block_masses(q, k, layout.mask, 8, 8)
    order = masses.sort(descending=True)
    enough = (order.values.cumsum(-1) < p - 1e-6).sum(-1) + 1
    chosen = order.indices.argsort(-1) < enough[..., None]
    assert torch.equal(layout.to_block_dense(), chosen | OWN)
    assert ((masses * layout.to_block_dense()).sum(-1) >= p - 1e-6).all()
    assert layout.n_slots == int(numbers(layout).max()) < N_BLOCKS


def test_top_p_stops_at_its_limit() -> None:
    layout = layout_of(TopP(0.99, at_most=6))
    own = layout.to_block_dense().diagonal(dim1=-2, dim2=-1)
    assert own.all()
    assert int(numbers(layout).max()) in (6, 7)


def test_budgets_of_heads() -> None:
    budget = PerHead({1: 6, (1, 2): Linear(0.5), (0, 3): 1}, otherwise=4)
    q, k = queries_and_keys(LENGTH)
    config = StreamConfig(block_q=8, block_k=8, k=budget)
    last = {layer: numbers(estimate_layout(q, k, config, layer=layer))[0, :, -1].tolist() for layer in (0, 1, 2)}
    assert last == {0: [5, 5, 5, 2], 1: [7, 7, 21, 7], 2: [5, 5, 5, 5]}  # and the own block, which nobody reads much


@pytest.mark.parametrize(
    "budget", [40, Constant(99), Sqrt(7.0), Linear(1.0), Linear(0.1, at_least=40), TopP(1.0, 40), PerHead({}, 40)]
)
def test_a_budget_that_covers_everything_is_full_attention(budget: Any) -> None:
    assert layout_of(budget).is_full


def test_auto_is_exact_where_few_keys_can_be_read() -> None:
    """By the position, so that the choice of a prefix is the same in a longer text."""
    limit = LENGTH // 2 // 8 * 8
    auto, exact, dual = (layout_of(4, estimator=name, exact_below=limit).to_block_dense() for name in ("auto", "exact", "dual"))
    assert not torch.equal(exact, dual)
    assert torch.equal(auto[:, :, : limit // 8], exact[:, :, : limit // 8])
    assert torch.equal(auto[:, :, limit // 8 :], dual[:, :, limit // 8 :])


def every_third(problem: Problem, query_pos: Tensor) -> tuple[Tensor, Tensor]:
    blocks, readable = problem.readable_blocks()
    return blocks, ((blocks % 3 == 0) & readable).float() * 2 - 1


def test_an_own_estimator() -> None:
    layout = layout_of(5, estimator=every_third)
    kept = layout.to_block_dense()
    assert torch.equal(kept & OWN, OWN.expand_as(kept))
    assert (kept & ~OWN)[..., 1::3].sum() == (kept & ~OWN)[..., 2::3].sum() == 0
    wanted = torch.tensor([min(5, i // 3 + 1) for i in range(N_BLOCKS)])
    assert ((kept[..., ::3].sum(-1) == wanted) | (kept & OWN)[..., ::3].any(-1)).all()
    assert (numbers(layout) - wanted).unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"The estimator gave blocks .* expected both to be"):
        layout_of(5, estimator=lambda problem, query_pos: (query_pos, query_pos))


RULES = [Sqrt(1.2), Linear(0.3), TopP(0.7, at_most=5), PerHead({1: 2, (2, 0): TopP(0.5)}, otherwise=3)]


@pytest.mark.parametrize("budget", RULES, ids=lambda budget: type(budget).__name__)
@torch.no_grad()
def test_a_run_equals_the_masked_model(budget: Any, tmp_path: Any) -> None:
    model, text = families.build("Llama", torch.float64), families.tokens(61)
    logits, cache = model.run_with_sparse_cache(text, config=StreamConfig(block_q=8, block_k=8, k=budget, max_dense=0))
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    with EditedAttention(keep, 61, masked(keep)):
        expected = model(text)
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()
    assert 0.05 < cache.pruned < 0.95
    assert not cache.fallbacks
    cache.save(tmp_path / "cache")
    assert SparseActivationCache.load(tmp_path / "cache").config == cache.config


def test_a_config_survives_json() -> None:
    config = StreamConfig(k=PerHead({1: 2, (2, 0): TopP(0.5)}, otherwise=Sqrt(2.0)), dense_layers=(0, 2), estimator=every_third)
    back = StreamConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert (back.k, back.dense_layers, back.estimator) == (config.k, (0, 2), "auto")
    assert tl_stream.StreamConfig.from_json(json.loads(json.dumps(StreamConfig(k=3).to_json()))) == StreamConfig(k=3)

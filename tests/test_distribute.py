"""A total budget over the heads: the one that keeps the most, and what a run with it equals."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.budget import PerHead

pytestmark = NEEDS_HOOKED
CONFIG = StreamConfig(block_q=8, block_k=8)


@pytest.fixture(scope="module")
def model() -> Any:
    """Two heads of every layer read everything alike."""
    model = copy.deepcopy(build("gqa"))
    for block in model.blocks:
        block.attn.W_Q.data[:2] = 0
        block.attn.b_Q.data[:2] = 0
    return model


def held(model: Any, text: torch.Tensor) -> torch.Tensor:
    """From the dense model's own patterns: mean attention that n blocks of each head hold, own blocks beside; `[head, n]`."""
    _, cache = model.run_with_cache(text)
    found = []
    for layer in range(3):
        pattern = torch.nn.functional.pad(cache["pattern", layer], (0, 3, 0, 3))
        by_block = pattern.unflatten(3, (-1, 8)).sum(4).unflatten(2, (-1, 8))
        mass = by_block.sum(3) / torch.tensor([8] * 7 + [5])[:, None]
        own = torch.eye(8, dtype=torch.bool).expand(mass.shape)
        first = torch.zeros(8).index_fill(0, torch.tensor(0), float(CONFIG.keep_sink))
        order = (mass + first).sort(dim=-1, descending=True, stable=True).indices
        added = mass.masked_fill(own, 0.0).gather(-1, order)
        found.append(added.mean((0, 2)).cumsum(-1))
    return torch.cat(found)


def test_no_other_distribution_keeps_more(model: Any) -> None:
    """Of all that have as many blocks: a search over all of them, from left to right."""
    text, at_most = tokens(), 6
    kept = held(model, text)
    best = {0: 0.0}  # by the number of blocks used so far
    for head in kept:
        totals = ((used + n, value + float(head[n - 1])) for used, value in best.items() for n in range(1, at_most + 1))
        best = {}
        for used, value in totals:
            best[used] = max(best.get(used, 0.0), value)
    gaps, shapes = [], set()
    for blocks in (2, 2.5, 3, 4):
        budget = tl_stream.distribute(model, text, blocks, config=CONFIG, at_most=at_most)
        numbers = [budget.of_head(layer, head).blocks(99) for layer, head in product(range(3), range(4))]
        assert sum(numbers) == blocks * 12
        assert min(numbers) >= 1
        assert max(numbers) <= at_most
        shapes.add(len(set(numbers)))
        value = sum(float(head[n - 1]) for head, n in zip(kept, numbers, strict=True))
        gaps.append(best[sum(numbers)] - value)
    assert max(gaps) < 1e-6
    assert max(shapes) > 1


def test_a_run_with_it_keeps_more_than_with_the_same_number_everywhere(model: Any) -> None:
    text = tokens()
    budget = tl_stream.distribute(model, text, 3, config=CONFIG)
    assert isinstance(budget, PerHead)

    def kept(k: Any) -> float:
        """Of the dense model's attention, over all heads: in a sparse run later layers would have other queries and keys."""
        config = StreamConfig(block_q=8, block_k=8, k=k, forward="exact")
        _, cache = model.run_with_sparse_cache(text, config=config)
        return sum(float(pattern.sum(-1).mean((0, 2)).sum()) for pattern in cache.patterns.values())

    assert kept(budget) > kept(3)


@pytest.mark.parametrize("blocks", [0.5, 65])
def test_totals_that_no_head_can_have(blocks: float) -> None:
    with pytest.raises(ValueError, match=r"blocks was .*expected 1 <= blocks <= at_most"):
        tl_stream.distribute(build("gqa"), tokens(), blocks, config=CONFIG)


def test_dense_layers_get_nothing_of_a_total(model: Any) -> None:
    config = StreamConfig(block_q=8, block_k=8, dense_layers=(1,))
    budget = tl_stream.distribute(model, tokens(), 3, config=config, at_most=6)
    numbers = [budget.of_head(layer, head).blocks(99) for layer, head in product((0, 2), range(4))]
    assert len(budget.budgets) == len(numbers)
    assert sum(numbers) == 3 * 8
    assert min(numbers) >= 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StreamConfig(estimator="random", seed=0), "estimator='random', which reckons no shares"),
        (StreamConfig(dense_layers=(0, 1, 2)), r"dense_layers=\(0, 1, 2\), all 3 layers"),
    ],
    ids=str,
)
def test_configs_that_leave_nothing_to_distribute(config: StreamConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tl_stream.distribute(build("gqa"), tokens(), 1, config=config)

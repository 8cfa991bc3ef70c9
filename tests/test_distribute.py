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


def curves(model: Any, text: torch.Tensor) -> torch.Tensor:
    """From the dense model's own patterns: mean attention of the r-th best key block of each head, `[head, rank]`."""
    _, cache = model.run_with_cache(text)
    found = []
    for layer in range(3):
        pattern = torch.nn.functional.pad(cache["pattern", layer], (0, 3, 0, 3))
        by_block = pattern.unflatten(3, (-1, 8)).sum(4).unflatten(2, (-1, 8))
        rows = torch.tensor([8] * 7 + [5])[:, None]
        found.append((by_block.sum(3) / rows).sort(-1, descending=True).values.mean((0, 2)))
    return torch.cat(found)


def test_no_other_distribution_keeps_more(model: Any) -> None:
    text = tokens()
    budget = tl_stream.distribute(model, text, 3, config=CONFIG, at_most=6)
    numbers = [budget.of_head(layer, head).blocks(99) for layer, head in product(range(3), range(4))]
    assert sum(numbers) == 3 * 12
    assert min(numbers) >= 1
    assert max(numbers) <= 6
    assert len(set(numbers)) > 1
    steps = curves(model, text)
    last = min(steps[i, n - 1] for i, n in enumerate(numbers) if n > 1)
    following = max(steps[i, n] for i, n in enumerate(numbers) if n < 6)
    assert last >= following - 1e-6


def test_a_run_with_it_keeps_more_than_with_the_same_number_everywhere(model: Any) -> None:
    text = tokens()
    budget = tl_stream.distribute(model, text, 3, config=CONFIG)
    assert isinstance(budget, PerHead)

    def kept(k: object) -> float:
        report = tl_stream.fidelity(model, text, StreamConfig(block_q=8, block_k=8, k=k), new_tokens=0)  # type: ignore[arg-type]
        return sum(head.retained_mean for head in report.heads)

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

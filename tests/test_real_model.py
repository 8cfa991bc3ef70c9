"""A real model, where there is one: `pytest tests/test_real_model.py --real-model FOLDER`.

SmolLM2-135M-Instruct, as benchmarks/real/models.py makes it. What is checked elsewhere on random weights holds for weights that
know something, and the blocks that are chosen hold what the model reads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_reference import EditedAttention, masked
from real import fidelity
from real.common import load
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import needle_grid
from tl_stream.budget import Sqrt
from tl_stream.tasks import in_chat, niah_single_2

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    folder = request.config.getoption("--real-model")
    if folder is None:
        pytest.skip("no real model: name its folder with --real-model")
    return load(str(folder))


@pytest.fixture(scope="module")
def prose(model: Any) -> Tensor:
    return fidelity.prose(model, 512)


def off(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def test_nothing_pruned_equals_hugging_face(model: Any, prose: Tensor) -> None:
    logits, cache = model.run_with_sparse_cache(prose, config=StreamConfig(k=1000, max_dense=0))
    assert cache.pruned == 0.0
    assert off(logits, model.original_model(prose).logits) < TOLERANCE


@torch.no_grad()
def test_pruned_equals_the_masked_model(model: Any, prose: Tensor) -> None:
    logits, cache = model.run_with_sparse_cache(prose, config=StreamConfig(block_q=16, block_k=16, k=4, max_dense=0))
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    with EditedAttention(keep, prose.shape[1], masked(keep), batch=1):
        expected = model(prose)
    assert off(logits, expected) < TOLERANCE
    assert off(model(prose), expected) > 100 * TOLERANCE


def test_the_choice_of_blocks_is_nearly_the_best_one(model: Any) -> None:
    """In every layer, though the beam holds 24 blocks of the 32 that a late row could read."""
    best, found = fidelity.study(model, [("real", 1024, estimator, 4) for estimator in ("exact", "dual")])
    shares = fidelity.relative(found, [best])
    assert len(shares) == model.cfg.n_layers
    assert min(shares) >= fidelity.ENOUGH
    assert found["beam"] < found["key blocks"]["full"]
    assert found["kl"] < 1.1 * best["kl"]


def test_needles_are_found_where_the_dense_model_finds_them(model: Any) -> None:
    budgets = {"sqrt": StreamConfig(block_q=16, block_k=16, k=Sqrt(1.0))}
    grid = needle_grid(model, [800], [0.2, 0.8], budgets, task=in_chat(niah_single_2), seed=7, progress=False)
    cells = grid.to_dataframe()
    assert (cells["accuracy_dense"] == 1).all()
    assert (cells["accuracy_sparse"] == 1).all()
    assert (cells["pruned"] > 0.7).all()


@torch.no_grad()
def test_generation_with_nothing_pruned_is_the_dense_models(model: Any) -> None:
    text = torch.tensor([model.tokenizer(in_chat(niah_single_2)(model.tokenizer, 400, depth=0.5, seed=1).prompt)["input_ids"]])
    expected = text
    for _ in range(4):
        expected = torch.cat([expected, model.original_model(expected).logits[:, -1:].argmax(-1)], 1)
    with tl_stream.sparse(model, StreamConfig(k=1000)):
        generated = model.generate(text, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert torch.equal(generated, expected)

"""No tensor of T x T elements, anywhere; memory grows with T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import LargestTensor
from zoo import build, gap

import tl_stream
from tl_stream import StreamConfig, estimate_layout

CONFIG = StreamConfig(block_q=16, block_k=16, k=4, beam=2)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in small chunks, so that T x T stands out at lengths that are quick to test."""
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**15)
    monkeypatch.setattr("tl_stream.estimator.problem.CHUNK_ENTRIES", 2**15)


def largest(length: int, variant: str, config: StreamConfig, grad: bool = False, **options: Any) -> int:
    model = build(variant, torch.float32, n_ctx=8192, d_vocab=40)
    text = torch.randint(0, 40, (1, length))
    with LargestTensor() as watch, torch.set_grad_enabled(grad):
        output, cache = model.run_with_sparse_cache(text, config=config, **options)
        if grad:
            output.sum().backward()
    assert cache.pruned > 0.5 or config.dense_layers
    return watch.numel


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("variant", ["gqa", "alibi", "local", "sinks", "soft-capped"])
def test_no_tensor_is_of_t_by_t_elements(variant: str, grad: bool) -> None:
    length = 2048
    one, two = (largest(n, variant, CONFIG, grad) for n in (length // 2, length))
    assert two < length * length / 8
    assert two <= 2.05 * one


def test_dense_layers_keep_no_tensor_of_t_by_t_elements() -> None:
    length = 2048
    assert largest(length, "gqa", StreamConfig(block_q=16, block_k=16, k=4, dense_layers=2)) < length * length / 8


@pytest.mark.parametrize("estimator", ["dual", "exact", "window", "random"])
def test_estimators_are_streamed(estimator: str) -> None:
    q, k = torch.randn(1, 2, 4096, 8), torch.randn(1, 1, 4096, 8)
    config = StreamConfig(block_q=16, block_k=16, k=4, estimator=estimator, seed=0)
    with LargestTensor() as watch:
        estimate_layout(q, k, config)
    assert watch.numel <= 2 * 4096 * 64


@pytest.mark.parametrize("variant", ["gqa", "local"])
@torch.no_grad()
def test_audit_and_fidelity_are_streamed(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_stream.audit.rows.CHUNK_ENTRIES", 2**15)
    monkeypatch.setattr("tl_stream.audit.estimate._CHUNK_ENTRIES", 2**15)
    # TransformerLens 3.9 counts learned positions twice in the cached steps of a model without a tokenizer.
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8}
    model, length = build(variant, torch.float32, n_ctx=8192, d_vocab=40, **rotary), 2048
    text = torch.randint(0, 40, (1, length))
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    with LargestTensor() as watch:
        cache.audit(sample=16)
        tl_stream.fidelity(model, text, CONFIG, rows=64, new_tokens=2)
    assert watch.numel < length * length / 8


@pytest.mark.parametrize("backward", [False, True])
def test_work_grows_linearly(backward: bool) -> None:
    """All memory that is ever asked for, added up: a copy of all keys in every chunk would make it quadratic."""

    def total(length: int) -> int:
        model = build("gqa", torch.float32, n_ctx=16384, n_layers=1, d_vocab=40)
        text = torch.randint(0, 40, (1, length))
        with LargestTensor() as watch, torch.set_grad_enabled(backward):
            output, _ = model.run_with_sparse_cache(text, config=CONFIG)
            if backward:
                output.sum().backward()
        return watch.total

    assert total(8192) <= 2.2 * total(4096)


@torch.no_grad()
def test_reading_a_cached_pattern_takes_linear_memory() -> None:
    length = 4096
    model = build("gqa", torch.float32, n_ctx=8192)
    _, cache = model.run_with_sparse_cache(torch.randint(0, 40, (1, length)), config=CONFIG)
    pattern = cache["pattern", 1]
    with LargestTensor() as watch:
        pattern[0, 1, -1].topk(5)
        pattern[:, :, :, 0].mean()
        pattern.diagonal(-1, 2, 3).mean(-1)
        pattern[0, 1].sum(-1)
        pattern[0, 1].argmax(-1)
        pattern[0, 1, 1000:1100].retained_mass()
        (pattern[0, 2] * 2).sum(-2)
        repr(pattern)
    assert watch.numel < length * length / 8


@torch.no_grad()
def test_patching_between_layouts_makes_no_index_of_single_entries() -> None:
    model = build("gqa", torch.float32, n_ctx=8192)
    clean, corrupted = (
        model.run_with_sparse_cache(torch.randint(0, 40, (1, 4096)), config=CONFIG)[1]["pattern", 1] for _ in range(2)
    )
    values = corrupted.block_values.numel()
    corrupted[:, 0] *= 1  # its values are made
    with LargestTensor() as watch:
        corrupted[:, 1] = clean[:, 1]
    kept = corrupted.block_values.numel()
    assert kept > values
    assert gap(corrupted[:, 1, 1000:1200], clean[:, 1, 1000:1200]) < 1e-6
    assert watch.total < 8 * kept


@torch.no_grad()
def test_the_cache_grows_linearly_and_is_small() -> None:
    model = build("gqa", torch.float32, n_ctx=8192)

    def nbytes(length: int) -> int:
        only_patterns = {"names_filter": lambda name: name.endswith("pattern")}
        text = torch.randint(0, 40, (1, length))
        return model.run_with_sparse_cache(text, config=CONFIG, **only_patterns)[1].nbytes

    assert nbytes(4096) <= 2.01 * nbytes(2048)
    assert nbytes(4096) < 3 * 4 * 4096 * 4096 * 4 / 50


def test_generation_takes_linear_memory_a_step() -> None:
    model = tl_stream.models.load()
    text = "the grass is green . the sky is blue . " * 200
    with LargestTensor() as watch, torch.no_grad(), tl_stream.sparse(model, CONFIG):
        tokens = model.to_tokens(text)
        model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False)
    assert watch.numel < tokens.shape[1] ** 2 / 2


def test_the_backward_pass_keeps_no_scores() -> None:
    """What the graph holds of attention is q, k, v and the layout: no tensor of kept scores."""
    saved: list[int] = []
    model = build("gqa", torch.float32, n_ctx=8192, attn_only=True)
    text = torch.randint(0, 40, (1, 2048))

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), tl_stream.sparse(model, CONFIG):
        model(text)
    assert max(saved) <= 2048 * 40

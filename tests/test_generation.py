"""Generation under the context manager: a sparse prefill, then steps that read a KV cache, exactly or sparsely."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from torch import Tensor
from transformers import DynamicCache

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import find_flips
from tl_stream.analysis.needle_run import run_task

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
FAMILIES = ("GPT-2", "Llama", "Mistral", "Gemma 3", "GPT-OSS", "DeepSeek V3", "OPT")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return families.build(request.param)


def by_steps(model: Any, text: Tensor, prefill: int) -> Tensor:
    """Logits of all positions: a prefill, then token by token."""
    past = DynamicCache(config=model.original_model.config)
    logits = [model(text[:, :prefill], past_key_values=past, use_cache=True)]
    for i in range(prefill, text.shape[1]):
        logits.append(model(text[:, i : i + 1], past_key_values=past, use_cache=True))
    return torch.cat(logits, 1)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@torch.no_grad()
def test_prefill_and_steps_equal_the_longer_text_at_full_budget(model: Any) -> None:
    text = families.tokens(48)
    with tl_stream.sparse(model, FULL):
        stepwise = by_steps(model, text, 32)
    assert close(stepwise, model.run_with_sparse_cache(text, config=FULL)[0])
    assert close(stepwise, model(text))


@torch.no_grad()
def test_pruned_prefill_and_exact_steps_equal_the_text_with_early_rows_masked(model: Any) -> None:
    text, prefill = families.tokens(48), 32
    keep = {}

    def note(pattern: Any, hook: Any) -> None:
        if pattern.shape[2] == prefill:
            rest = torch.ones(2, pattern.shape[1], 48, 48, dtype=torch.bool).tril()
            rest[:, :, :prefill, :prefill] = pattern.block_layout.to_dense()
            keep[pattern._data.origin.layer] = rest

    with tl_stream.sparse(model, replace(PRUNED, decode="exact")), model.hooks(fwd_hooks=[(_patterns, note)]):
        stepwise = by_steps(model, text, prefill)
    with EditedAttention(keep, 48, masked(keep)):
        expected = model(text)
    assert close(stepwise, expected)
    assert not close(stepwise, model(text))


@torch.no_grad()
def test_pruned_prefill_and_sparse_steps_equal_the_longer_text(model: Any) -> None:
    """With one query a block and the true best blocks, a row keeps the same blocks whatever comes after it."""
    if hasattr(model.original_model.config, "sliding_window"):
        pytest.skip("its KV cache drops keys outside the window, which moves the borders of the key blocks")
    text, config = families.tokens(48), replace(PRUNED, block_q=1, estimator="exact")
    with tl_stream.sparse(model, config):
        stepwise = by_steps(model, text, 32)
    logits, cache = model.run_with_sparse_cache(text, config=config)
    assert cache.pruned > 0.3
    assert close(stepwise, logits)


@torch.no_grad()
def test_exact_steps_read_everything(model: Any) -> None:
    text = families.tokens(33)
    layouts: dict[int, Any] = {}

    def note(pattern: Any, hook: Any) -> None:
        layouts[pattern._data.origin.layer] = pattern.block_layout

    for decode, is_full in (("exact", True), ("sparse", False)):
        with tl_stream.sparse(model, replace(PRUNED, decode=decode)), model.hooks(fwd_hooks=[(_patterns, note)]):
            past = DynamicCache(config=model.original_model.config)
            model(text[:, :32], past_key_values=past, use_cache=True)
            assert not layouts[0].is_full
            model(text[:, 32:], past_key_values=past, use_cache=True)
        assert layouts[0].is_full == is_full


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@torch.no_grad()
def test_generate(model: Any, use_past_kv_cache: bool) -> None:
    text = families.tokens(40)
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with tl_stream.sparse(model, FULL):
        generated = model.generate(text, use_past_kv_cache=use_past_kv_cache, **options)
    assert torch.equal(generated, model.generate(text, use_past_kv_cache=False, **options))


@torch.no_grad()
def test_hugging_faces_own_generate(model: Any) -> None:
    text = families.tokens(40)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(text), "pad_token_id": 0}
    expected = model.original_model.generate(text, use_cache=False, **options)
    with tl_stream.sparse(model, FULL):
        assert torch.equal(model.original_model.generate(text, **options), expected)


def _patterns(name: str) -> bool:
    return name.endswith("hook_pattern")


def test_studies_that_generate_unembed_one_row_a_step() -> None:
    """All rows of a long prompt times Gemma's vocabulary would be more than a GPU holds."""
    model: Any = tl_stream.models.load()
    task = tl_stream.tasks.niah_single_1(model.tokenizer, 200, seed=1)
    rows: list[int] = []
    studies = {
        "needle": lambda: run_task(model, task, PRUNED),
        "budget": lambda: tl_stream.find_budget(model, task.prompt, low=2, high=2, config=PRUNED, progress=False),
        "flips": lambda: find_flips(model, [task.prompt], PRUNED, match=2, trials=1, progress=False),
    }
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: rows.append(x.shape[1]))]):
        for name, study in studies.items():
            rows.clear()
            study()
            assert rows, name
            assert max(rows) <= 7, name


@torch.no_grad()
def test_with_single_queries_steps_are_the_model_that_reads_all_again() -> None:
    """A step chooses as its row does in a run on the generated text."""
    model: Any = tl_stream.models.load()
    text = model.to_tokens(tl_stream.tasks.niah_single_1(model.tokenizer, 260, depth=0.4, seed=1).prompt)
    with tl_stream.sparse(model, StreamConfig(block_q=1, block_k=8, k=1)):
        generated = model.generate(text, max_new_tokens=12, do_sample=False, verbose=False)
        again = model(generated)
    assert torch.equal(again[0, text.shape[1] - 1 : -1].argmax(-1), generated[0, text.shape[1] :])

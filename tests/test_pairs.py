"""What is kept is counted of the pairs that windows leave, and of all causal ones: against masks written out pair by pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import needle_grid
from tl_stream.budget import Sqrt
from tl_stream.cache import is_pattern
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.pairs import Pairs, percent_pruned

CONFIG = StreamConfig(block_q=4, block_k=4, k=2, beam=1)
WINDOW = 9  # of the layers 0 and 2 of the local model


def shares(keep: dict[int, Tensor], windows: dict[int, int], real: Tensor | None = None) -> tuple[float, float]:
    """`pruned` and `pruned_causal` from the dense masks of what is kept `[batch, head_index, query_pos, key_pos]`."""
    kept = allowed = causal = 0
    for layer, mask in keep.items():
        batch, heads, n_rows, n_keys = mask.shape
        query, key = torch.arange(n_keys)[n_keys - n_rows :, None], torch.arange(n_keys)
        seen = (key <= query).expand(batch, -1, -1) if real is None else (key <= query) & real[:, None, :]
        near = query - key < windows.get(layer, n_keys)
        kept, allowed, causal = (
            total + int(x.sum()) * number
            for total, x, number in ((kept, mask, 1), (allowed, seen & near, heads), (causal, seen, heads))
        )
    return 1 - kept / allowed, 1 - kept / causal


def of_cache(cache: Any) -> dict[int, Tensor]:
    return {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}


@NEEDS_HOOKED
@pytest.mark.parametrize("grouped", [False, True], ids=["MHA", "GQA"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, dense_layers=(0,)), replace(CONFIG, dense_queries=7), replace(CONFIG, k=Sqrt(1.0), block_q=1)],
    ids=["constant", "a dense layer", "dense queries", "sqrt"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_a_cache_counts_pairs_of_windows_and_all_causal_ones(padded: bool, config: StreamConfig, grouped: bool) -> None:
    model = build("local", n_key_value_heads=2) if grouped else build("local")
    text = tokens()
    real = torch.ones_like(text, dtype=torch.bool)
    real[1, :11] = not padded
    options = {"attention_mask": real.long()} if padded else {}
    _, cache = model.run_with_sparse_cache(text, config=config, **options)
    expected = shares(of_cache(cache), {0: WINDOW, 2: WINDOW}, real if padded else None)
    assert (cache.pruned, cache.pruned_causal) == pytest.approx(expected)
    assert 0 < cache.pruned < cache.pruned_causal < 1


@torch.no_grad()
def test_without_windows_both_are_the_same() -> None:
    _, cache = build("gqa").run_with_sparse_cache(tokens(), config=CONFIG)
    assert cache.pruned_causal == cache.pruned > 0
    assert f"pruned={cache.pruned:.4f}, forward" in repr(cache)


@NEEDS_HOOKED
@torch.no_grad()
def test_repr_says_what_was_pruned_by_kind_of_layer() -> None:
    _, cache = build("local").run_with_sparse_cache(tokens(), config=CONFIG)
    keep, windows = of_cache(cache), {0: WINDOW, 2: WINDOW}
    both = shares(keep, windows)
    full, local = shares({1: keep[1]}, windows)[0], shares({0: keep[0], 2: keep[2]}, windows)[0]
    assert (
        f"pruned={both[0]:.4f} of the pairs within windows, {both[1]:.4f} of all causal ones "
        f"(2 layers with a window of {WINDOW}: {local:.4f}, 1 full layer: {full:.4f})"
    ) in repr(cache)
    _, short = build("local").run_with_sparse_cache(tokens()[:, :WINDOW], config=CONFIG)
    assert "window" not in repr(short)


@torch.no_grad()
def test_a_context_counts_the_prompt_and_every_step_of_generation() -> None:
    """One query reads all keys before it: as many causal pairs as there are tokens so far."""
    model, steps = build("gqa"), 5
    text = tokens(batch=1)
    layouts: list[Tensor] = []

    def note(pattern: Any, hook: Any) -> None:
        layouts.append(pattern.block_layout.to_dense())

    with tl_stream.sparse(model, CONFIG) as trace, model.hooks(fwd_hooks=[(is_pattern, note)]):
        model.generate(text, max_new_tokens=steps, do_sample=False, stop_at_eos=False, verbose=False)
    n, n_heads, n_layers = text.shape[1], model.cfg.n_heads, model.cfg.n_layers
    rows = sum(layout.shape[2] for layout in layouts)
    assert rows == n_layers * (n + steps - 1)
    kept = sum(int(layout.sum()) for layout in layouts)
    causal = n_heads * n_layers * (n + steps - 1) * (n + steps) // 2
    assert (trace.pairs.kept, trace.pairs.allowed, trace.pairs.causal) == (kept, causal, causal)
    assert trace.pairs.pruned == pytest.approx(1 - kept / causal)


@torch.no_grad()
def test_what_generate_returns_counts_the_generated_tokens(bridge: Any) -> None:
    text = tokens(batch=1)
    with tl_stream.sparse(bridge, CONFIG):
        _, cache = bridge.generate(text, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False, return_cache=True)
    keep = of_cache(cache)
    assert keep[0].shape[-1] > text.shape[1]
    windows = dict.fromkeys(keep, bridge.original_model.config.sliding_window)
    assert (cache.pruned, cache.pruned_causal) == pytest.approx(shares(keep, windows))
    assert cache.pruned < cache.pruned_causal


@torch.no_grad()
def test_a_run_that_reads_a_kv_cache_counts_its_own_rows(bridge: Any) -> None:
    text, past = tokens(), DynamicCache()  # which drops nothing
    bridge.run_with_sparse_cache(text[:, :-3], config=CONFIG, past_key_values=past)
    _, cache = bridge.run_with_sparse_cache(text[:, -3:], config=CONFIG, past_key_values=past)
    keep = of_cache(cache)
    assert keep[0].shape[2:] == (3, text.shape[1])
    windows = dict.fromkeys(keep, bridge.original_model.config.sliding_window)
    assert (cache.pruned, cache.pruned_causal) == pytest.approx(shares(keep, windows))


@torch.no_grad()
def test_reports_give_both(bridge: Any) -> None:
    text = tokens(batch=2)
    _, cache = bridge.run_with_sparse_cache(text, config=CONFIG)
    found = tl_stream.fidelity(bridge, text, CONFIG, new_tokens=0)
    assert (found.pruned, found.pruned_causal) == (cache.pruned, cache.pruned_causal)
    assert found.to_dict()["pruned_causal"] == cache.pruned_causal
    assert percent_pruned(found.pruned, found.pruned_causal) in str(found._heads_table().title)
    search = tl_stream.find_budget(bridge, text, metric="kl", threshold=1e9, config=CONFIG)
    tried = search.best
    assert tried is not None
    _, cache = bridge.run_with_sparse_cache(text, config=search.config)
    assert (tried.pruned, tried.pruned_causal) == pytest.approx((cache.pruned, cache.pruned_causal))
    assert percent_pruned(tried.pruned, tried.pruned_causal) in list(search.table().columns[1].cells)


def test_needle_cells_give_both() -> None:
    model = tl_stream.models.load()
    grid = needle_grid(model, [128], [0.5], [2], progress=False)
    assert grid.cells[0].pruned == grid.cells[0].pruned_causal > 0  # it has no windows
    assert grid.pruned_causal("k = 2") == grid.cells[0].pruned_causal
    assert "pruned_causal" in grid.to_dataframe()


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_counts_of_a_full_layout(window: int | None) -> None:
    mask = AttentionMask.causal(13, 20, window=window)
    pairs = Pairs.of([BlockLayout.full(mask, 4, 4, 2, 3)])
    query, key = torch.arange(7, 20)[:, None], torch.arange(20)
    causal = key <= query
    allowed = causal & (query - key < (window or 20))
    assert (pairs.kept, pairs.allowed, pairs.causal) == tuple(6 * int(x.sum()) for x in (allowed, allowed, causal))


def test_in_words() -> None:
    assert percent_pruned(0.5681, 0.5681) == "56.8%"
    assert percent_pruned(0.5681, 0.8842) == "56.8% (88.4% of all causal pairs)"
    assert Pairs().pruned == Pairs().pruned_causal == 0


@pytest.fixture(scope="module")
def bridge() -> Any:
    """A model whose layers all have a sliding window."""
    return families.build("Mistral", torch.float64)

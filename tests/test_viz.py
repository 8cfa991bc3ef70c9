"""Block-level views: what they show is what the pattern holds, and a page needs no network."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import LargestTensor
from circuitsvis.utils.render import RenderedHTML
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from zoo import NEEDS_HOOKED, build, tokens

from tl_stream import SparseActivationCache, StreamConfig, run_with_sparse_cache
from tl_stream.viz import Bins, Section, heads_view, row_strip, write_page
from tl_stream.viz.bins import OverQueries
from tl_stream.viz.heads import head_pattern
from tl_stream.viz.page import check_writable, page

T = 61
WORDS = [f" w{i}" for i in range(T)]
HEADS = [(0, 1), (2, 3)]
FETCHED = re.compile(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|(?:import|from)\s*["']https?:|@import|url\(\s*["']?http""")


def traced(*args: Any, **kwargs: Any) -> SparseActivationCache:
    _, cache = run_with_sparse_cache(*args, **kwargs)
    assert isinstance(cache, SparseActivationCache)
    return cache


@pytest.fixture(scope="module")
def cache() -> SparseActivationCache:
    config = StreamConfig(block_q=4, block_k=4, k=3, max_dense=0)
    return traced(build(), tokens(T), config=config)


def test_a_bin_is_a_block_until_there_are_too_many(cache: SparseActivationCache) -> None:
    layout = cache.block_layout(0)
    assert Bins.of(layout) == Bins(T, 4)
    assert Bins.of(layout, max_bins=16) == Bins(T, 4)
    assert Bins.of(layout, max_bins=15) == Bins(T, 8)
    assert Bins.of(layout, max_bins=1) == Bins(T, 64)
    assert [len(Bins(T, size)) for size in (1, 4, 61, 64)] == [61, 16, 1, 1]
    assert Bins(T, 8).tokens(7) == range(56, 61)
    assert [Bins(T, 8).touched(part) for part in (slice(8, 16), slice(7, 17))] == [range(1, 2), range(3)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [1, 4, 7, 61, 64])
def test_mean_and_max_are_those_of_the_dense_pattern(cache: SparseActivationCache, head: tuple[int, int], size: int) -> None:
    bins, pattern = Bins(T, size), head_pattern(cache, head, text=1)
    dense = cache["pattern", head[0]].to_dense()[1, head[1]]
    reductions: list[tuple[OverQueries, Callable[..., Tensor]]] = [("mean", torch.mean), ("max", torch.amax)]
    for over_queries, reduce in reductions:
        square = bins.square(pattern, over_queries)
        for i in range(len(bins)):
            rows, mass = bins.tokens(i), dense.new_empty(len(bins.tokens(i)), len(bins))
            for j in range(len(bins)):
                keys = bins.tokens(j)
                mass[:, j] = dense[rows.start : rows.stop, keys.start : keys.stop].sum(-1)
            torch.testing.assert_close(square[i], reduce(mass, 0))
    assert not cache.fallbacks


def test_mean_conserves_mass(cache: SparseActivationCache) -> None:
    for layer in cache.patterns:
        pattern = cache["pattern", layer][0]
        square = Bins(T, 8).square(pattern, "mean")
        row_sums = pattern.sum(-1)
        expected = torch.stack([part.mean(-1) for part in row_sums.split(8, -1)], -1)
        torch.testing.assert_close(square.sum(-1), expected)


def test_no_square_of_tokens_is_made() -> None:
    length = 2048
    model = build(n_ctx=length, n_layers=1, dtype=torch.float32)
    config = StreamConfig(block_q=32, block_k=32, k=2, max_dense=0)
    cache = traced(model, tokens(length, batch=1), config=config)
    with LargestTensor() as largest:
        heads_view(cache, [(0, 0)], ["w"] * length)
    assert length * 64 <= largest.numel <= length**2 // 4


def test_labels_say_where_what_and_how_it_begins() -> None:
    words = [" .", " The", " sky", " is", " blue", " <s>", " and", " </script>", " so", " on"]
    labels = Bins(10, 4).labels(words, {"needle": slice(3, 5)})
    assert labels == ["0-3·NEEDLE:·is", "4-7·NEEDLE:·blue·[s>·and·[/s", "8-9:·so·on"]


def test_view_holds_the_named_heads_and_the_rounded_values(cache: SparseActivationCache) -> None:
    view = heads_view(cache, HEADS, WORDS, marks={"needle": slice(9, 11)}, text=1)
    assert isinstance(view, RenderedHTML)
    square = Bins(T, 4).square(head_pattern(cache, (2, 3), text=1), "mean")
    label, value = "8-11\\u00b7NEEDLE:\\u00b7w9\\u00b7w10\\u00b7w11", str(round(square[15, 15].item(), 4))
    for expected in ('"L0H1", "L2H3"', label, value):
        assert expected in view.local_src


def test_view_of_a_cache_without_batch_dimension(cache: SparseActivationCache) -> None:
    single = traced(build(), tokens(T)[:1], config=cache.config, remove_batch_dim=True)
    bins = Bins(T, 4)
    torch.testing.assert_close(
        bins.square(head_pattern(single, (1, 2)), "max"), bins.square(head_pattern(cache, (1, 2)), "max")
    )


def test_views_refuse_what_they_cannot_show(cache: SparseActivationCache) -> None:
    with pytest.raises(ValueError, match="heads was empty"):
        heads_view(cache, [], WORDS)
    with pytest.raises(ValueError, match="tokens were 60; expected 61"):
        heads_view(cache, HEADS, WORDS[1:])
    with pytest.raises(KeyError, match="layer was 7"):
        heads_view(cache, [(7, 0)], WORDS)
    with pytest.raises(IndexError):
        heads_view(cache, [(0, 4)], WORDS)
    with pytest.raises(ValueError, match="max_bins was 0"):
        heads_view(cache, HEADS, WORDS, max_bins=0)
    with pytest.raises(ValueError, match="size was 0"):
        Bins(8, 0)
    with pytest.raises(ValueError, match=r"mass was of shape \(2, 4\); expected \(1, 4\)"):
        row_strip(torch.zeros(2, 4), ["L0H0"], Bins(16, 4), {})


@NEEDS_HOOKED
def test_a_pattern_of_one_step_has_no_square_view() -> None:
    model, text = build(), tokens(20)
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(text))
    for part in (text[:, :19], text[:, 19:]):
        step = traced(model, part, past_kv_cache=past, attention_mask=torch.ones_like(part))
    with pytest.raises(ValueError, match="1 queries and 20 keys"):
        heads_view(step, [(0, 0)], WORDS[:20])


def test_strip_draws_mass_and_frames_marks() -> None:
    mass = torch.tensor([[0.0, 0.75, 0.25], [1.0, 0.0, 0.0]])
    svg = row_strip(mass, ["L0H0", "a<b"], Bins(10, 4), {"needle": slice(5, 7)})
    assert svg.count("<title>") == 3
    assert "<title>L0H0, tokens 4-7: 0.750</title>" in svg
    assert "a&lt;b, tokens 0-3: 1.000" in svg
    assert "needle (5-6)" in svg


def test_page_is_self_contained_and_escaped(cache: SparseActivationCache, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    table = [("Figure", "Value"), ("a < b", "1 & 2")]
    sections = [Section("Ta<ble", "text", table), Section("View", "text", heads_view(cache, HEADS, WORDS))]
    write_page(path, "A <title>", sections)
    html = path.read_text(encoding="utf-8")
    assert not FETCHED.search(html)
    row = "<td>a &lt; b</td><td>1 &amp; 2</td>"
    for expected in ("A &lt;title&gt;", "Ta&lt;ble", row, "CircuitsVis.AttentionHeads"):
        assert expected in html
    assert html.count("</script>") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_check_for_fetched_sources_finds_them(cache: SparseActivationCache) -> None:
    assert FETCHED.search(heads_view(cache, HEADS, WORDS).cdn_src)
    assert FETCHED.search('<script src="https://x.org/a.js">')
    assert FETCHED.search("<link href=//x.org/a.css>")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_stream.viz.page.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_page(path, "new", [])
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists and is no file"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match="can't be written \\(No such file or directory\\)"):
        check_writable(tmp_path / "missing" / "page.html")
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "real.html")
    write_page(link, "through a link", [])
    assert link.is_symlink()
    assert (tmp_path / "real.html").read_text() == page("through a link", [])

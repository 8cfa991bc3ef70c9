"""The audit of a sparse run: its exact rows, its intervals' coverage, its estimate, and its verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from zoo import NEEDS_HOOKED, build, left_padded, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.audit.estimate import estimated_mass
from tl_stream.audit.interval import mean_interval
from tl_stream.audit.result import RowsAudit
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.audit.verdict import ALONE, BY_MASS, DOUBT, HEAD_THRESHOLD, flip_chances

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
LENGTH = 61


def true_mass(cache: Any, layer: int) -> Tensor:
    """Retained mass of every row, from the dense softmax of the run's own q and k."""
    full = cache.exact_rows(layer, range(LENGTH))
    kept = cache.block_layout(layer).to_dense()
    return 1 - (full * ~kept).sum(-1)


@pytest.mark.parametrize("variant", ["gqa", "soft-capped", "alibi", "local", "sinks"])
@torch.no_grad()
def test_rows_equal_the_full_softmax(variant: str) -> None:
    _, cache = build(variant).run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    result = cache.audit(rows=range(LENGTH), sample=0)
    for head in result.heads:
        expected = true_mass(cache, head.layer)[head.text, head.head]
        assert (torch.tensor(head.retained) - expected).abs().max() < 1e-6
        assert head.mean_low == pytest.approx(float(expected.mean()), abs=1e-6) == head.mean_high
    assert min(min(head.retained) for head in result.heads) < 0.9


@pytest.mark.parametrize("variant", ["standard", "gqa", "rotary"])
@torch.no_grad()
def test_the_first_layer_is_the_dense_models(variant: str) -> None:
    model, text = build(variant), tokens(LENGTH)
    _, dense = model.run_with_cache(text)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    kept = (dense["pattern", 0] * cache.block_layout(0).to_dense()).sum(-1)
    for head in cache.audit(rows=[0, 7, 30, -1], sample=0).heads:
        if head.layer == 0:
            assert torch.tensor(head.retained).sub(kept[head.text, head.head, [0, 7, 30, 60]]).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "Falcon", "Llama", "Mistral"])
@torch.no_grad()
def test_under_the_exact_forward_all_layers_are_the_dense_models(family: str) -> None:
    """(Of families whose own code rounds to less than 1e-6 in later layers.)"""
    model, text = families.build(family, torch.float64), families.tokens(LENGTH)
    config = replace(CONFIG, forward="exact")
    _, cache = model.run_with_sparse_cache(text, config=config)
    _, dense = model.run_with_cache(text)
    _, sparse = model.run_with_sparse_cache(text, config=replace(CONFIG, layout_from=cache))
    of_sparse = {(head.text, head.layer, head.head): head for head in sparse.audit().heads}
    for head in cache.audit(rows=range(LENGTH), sample=0).heads:
        kept = cache.block_layout(head.layer).to_dense()[head.text, head.head]
        expected = (dense["pattern", head.layer][head.text, head.head] * kept).sum(-1)
        assert torch.tensor(head.retained).sub(expected).abs().max() < 1e-6
        if head.layer == 0:  # where both forwards have the same q and k
            assert head.mean_estimated == pytest.approx(of_sparse[head.text, 0, head.head].mean_estimated, abs=1e-6)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-OSS", "Gemma 3"])
@torch.no_grad()
def test_families_on_the_bridge(family: str) -> None:
    _, cache = families.build(family).run_with_sparse_cache(families.tokens(LENGTH), config=CONFIG)
    for layer, pattern in cache.patterns.items():
        rows = SoftmaxRows.of(pattern)
        assert (rows.retained(torch.arange(LENGTH)) - true_mass(cache, layer)).abs().max() < 1e-5
        assert (rows.retained(torch.arange(LENGTH)) - pattern.retained_mass()).abs().max() < 1e-4


@torch.no_grad()
def test_nothing_pruned_is_trusted() -> None:
    _, cache = build().run_with_sparse_cache(tokens(LENGTH), config=StreamConfig(k=100, max_dense=0))
    result = cache.audit(rows=3)
    assert not result.doubtful
    assert all(answer.trusted and answer.flip_chance == 0 for answer in result.answers)
    assert all(head.mean_low == head.mean_high == head.mean_estimated == 1.0 for head in result.heads)
    assert all(answer.rows == (58, 59, 60) for answer in result.answers)


@torch.no_grad()
def test_a_run_of_chunks_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache = build("local").run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    whole = [SoftmaxRows.of(p).retained(torch.arange(LENGTH)) for p in cache.patterns.values()]
    estimates = [estimated_mass(SoftmaxRows.of(p), p._data.row_lse()) for p in cache.patterns.values()]
    monkeypatch.setattr("tl_stream.audit.rows.CHUNK_ENTRIES", 1)
    monkeypatch.setattr("tl_stream.audit.estimate._CHUNK_ENTRIES", 1)
    for pattern, rows, estimate in zip(cache.patterns.values(), whole, estimates, strict=True):
        assert torch.allclose(SoftmaxRows.of(pattern).retained(torch.arange(LENGTH)), rows)
        assert torch.allclose(estimated_mass(SoftmaxRows.of(pattern), pattern._data.row_lse()), estimate)


@NEEDS_HOOKED
@torch.no_grad()
def test_padding_is_left_out() -> None:
    """The rows of a text padded on the left are those of the text alone."""
    model = build("rotary", default_prepend_bos=False)
    text = tokens(40, batch=1)
    padded, mask = left_padded(text, 8)
    config = StreamConfig(block_q=8, block_k=8, k=2, estimator="exact", max_dense=0)
    _, alone = model.run_with_sparse_cache(text, config=config)
    _, cache = model.run_with_sparse_cache(padded, config=config, attention_mask=mask)
    a, b = alone.audit(rows=4, sample=1000), cache.audit(rows=4, sample=1000)
    for x, y in zip(a.heads, b.heads, strict=True):
        assert torch.allclose(torch.tensor(x.retained), torch.tensor(y.retained), atol=1e-6)
        assert x.mean_low == pytest.approx(y.mean_low, abs=1e-6)
        assert x.mean_estimated == pytest.approx(y.mean_estimated, abs=0.2)


POPULATIONS = {
    "few bad rows": lambda u: torch.where(u < 0.02, 0.05, 0.999),
    "rare zeros": lambda u: (u > 0.01).double(),
    "long tail": lambda u: 1 - u**8,
    "coin": lambda u: (u > 0.5).double(),
    "uniform": lambda u: u,
    "nearly constant": lambda u: 0.9 + 0.02 * u,
    "all kept": lambda u: torch.ones_like(u),
}


@pytest.mark.parametrize("draws", [8, 64, 200])
@pytest.mark.parametrize("name", POPULATIONS)
def test_intervals_cover(name: str, draws: int) -> None:
    """200 trials, on distributions for which normal theory covers as little as 18 %."""
    generator = torch.Generator().manual_seed(draws)
    population = POPULATIONS[name](torch.rand(1000, generator=generator, dtype=torch.float64))
    order = torch.stack([torch.randperm(1000, generator=generator)[:draws] for _ in range(200)])
    low, high = mean_interval(population[order], 1000)
    mean = population.mean()
    assert ((low <= mean) & (mean <= high)).double().mean() >= 0.95
    hoeffding = 2 * (torch.tensor(2 / 0.05).log() / (2 * draws)).sqrt()
    assert (high - low).mean() < hoeffding


def test_intervals_of_everything_and_of_nothing() -> None:
    x = torch.rand(3, 20, dtype=torch.float64)
    low, high = mean_interval(x, 20)
    assert torch.allclose(low, x.mean(-1))
    assert torch.allclose(high, x.mean(-1))
    low, high = mean_interval(x[:, :0], 20)
    assert low.tolist() == [0, 0, 0]
    assert high.tolist() == [1, 1, 1]


def test_intervals_shrink_and_grow() -> None:
    x = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    widths = [float(high - low) for low, high in (mean_interval(x[:n], 1000) for n in (10, 50, 400))]
    assert widths == sorted(widths, reverse=True)
    (low, high), (wider_low, wider_high) = mean_interval(x, 1000), mean_interval(x, 1000, 0.999)
    assert wider_low <= low < high <= wider_high


@pytest.mark.parametrize(
    ("draws", "population", "confidence", "message"),
    [
        (torch.rand(5), 4, 0.95, "population was 4, with 5 draws"),
        (torch.tensor([0.5, 1.5]), 9, 0.95, r"draws were in \[0.5, 1.5\]"),
        (torch.rand(5), 9, 95.0, "confidence was 95.0; expected a probability"),
    ],
)
def test_intervals_refuse(draws: Tensor, population: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(draws, population, confidence)


@torch.no_grad()
def test_audits_intervals_cover() -> None:
    """The mean over all rows lies within the audit's interval in at least 95 % of 200 audits' heads."""
    _, cache = build("standard").run_with_sparse_cache(tokens(LENGTH, batch=1), config=CONFIG)
    truth = {layer: true_mass(cache, layer)[0].mean(-1) for layer in cache.patterns}
    inside = [
        head.mean_low - 1e-6 <= float(truth[head.layer][head.head]) <= head.mean_high + 1e-6
        for seed in range(200)
        for head in cache.audit(sample=12, seed=seed).heads
    ]
    assert sum(inside) / len(inside) >= 0.95


@NEEDS_HOOKED
@pytest.mark.parametrize("variant", ["standard", "gqa", "local", "alibi", "soft-capped", "sinks"])
@torch.no_grad()
def test_the_estimate_is_exact_where_all_keys_are_drawn(variant: str) -> None:
    _, cache = build(variant).run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    for layer, pattern in cache.patterns.items():
        estimate = estimated_mass(SoftmaxRows.of(pattern), pattern._data.row_lse())
        assert (estimate - true_mass(cache, layer)).abs().max() < 1e-5


@NEEDS_HOOKED
@pytest.mark.parametrize("variant", ["gqa", "local"])
@torch.no_grad()
def test_the_estimate_of_the_dropped_sum_is_unbiased(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of many draws of 16 keys: dropped / kept sums as they are, within what the draws leave open."""
    monkeypatch.setattr("tl_stream.audit.estimate.SAMPLES", 16)
    config = replace(CONFIG, block_q=4, block_k=4, estimator="random", seed=0)
    _, cache = build(variant).run_with_sparse_cache(tokens(LENGTH), config=config)
    rows, lse = SoftmaxRows.of(cache.patterns[0]), cache.patterns[0]._data.row_lse()
    draws = torch.stack([1 / estimated_mass(rows, lse, seed) - 1 for seed in range(100)])
    expected = 1 / true_mass(cache, 0) - 1
    error = (draws.mean(0) - expected) / (draws.std(0) / 100**0.5).clamp(min=1e-9)
    few = expected < 100  # where nearly all was dropped, 1 / mass is nothing but rounding
    assert error[few].abs().quantile(0.95) < 2.5
    assert draws.std(0)[few].max() > 0 or variant == "local"


@torch.no_grad()
def test_rows_of_a_slice_count_as_shown() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    _, part = model.run_with_sparse_cache(text, config=CONFIG, pos_slice=slice(20, 50))
    a, b = cache.audit(rows=[25, 49], sample=0), part.audit(rows=[5, -1], sample=0)
    assert [head.retained for head in a.heads] == [head.retained for head in b.heads]
    assert b.answers[0].rows == (5, 29)


@torch.no_grad()
def test_verdicts_give_reasons() -> None:
    logits, cache = build().run_with_sparse_cache(
        tokens(LENGTH), config=StreamConfig(block_q=8, block_k=8, k=1, beam=1, max_dense=0)
    )
    result = cache.audit(rows=2, sample=1000)
    for head in result.heads:
        low = min(head.retained) < HEAD_THRESHOLD
        assert head.trusted == (not low and head.mean_high >= HEAD_THRESHOLD)
        assert any("of what it reads" in reason for reason in head.reasons) == low
    assert result.doubtful
    best = logits.topk(2, -1).values[:, -2:]
    intercept, (ahead_slope, lost_slope) = ALONE.intercept, ALONE.slopes
    for answer, lead in zip(result.answers, best[..., 0] - best[..., 1], strict=True):
        assert answer.lead == pytest.approx(lead.tolist(), abs=1e-5)
        for chance, mass, ahead in zip(answer.chances, answer.retained, answer.lead or (), strict=True):
            odds = intercept + ahead_slope * ahead + lost_slope * math.log(1 - mass)
            assert chance == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-5)
        assert answer.trusted == (answer.flip_chance <= DOUBT)
        assert f"{answer.flip_chance:.0%} chance that dense attention says otherwise in rows 59 to 60" in repr(result)


@torch.no_grad()
def test_without_logits_the_verdict_goes_by_mass_alone() -> None:
    model = build()
    _, whole = model.run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    _, stopped = model.run_with_sparse_cache(tokens(LENGTH), config=CONFIG, stop_at_layer=3)
    _, short = model.run_with_sparse_cache(tokens(LENGTH), config=CONFIG, logits_to_keep=2)
    intercept, (slope,) = BY_MASS.intercept, BY_MASS.slopes
    for cache, rows in ((stopped, 1), (short, 3)):
        for answer in cache.audit(rows, sample=0).answers:
            assert answer.lead is None
            odds = [intercept + slope * math.log(1 - mass) for mass in answer.retained]
            assert answer.chances == pytest.approx([1 / (1 + math.exp(-each)) for each in odds], abs=1e-5)
    assert short.audit(2, sample=0).answers == whole.audit(2, sample=0).answers


@torch.no_grad()
def test_rows_that_read_everything_have_lost_what_earlier_rows_lost() -> None:
    _, cache = build().run_with_sparse_cache(tokens(LENGTH), config=replace(CONFIG, dense_queries=3))
    result = cache.audit(2, sample=0)
    for answer in result.answers:
        assert answer.retained == (1.0, 1.0)
        lost = 1 - torch.tensor([head.mean_estimated for head in result.heads if head.text == answer.text]).mean()
        assert answer.lead is not None
        assert answer.chances == pytest.approx(flip_chances(lost.expand(2), torch.tensor(answer.lead), None).tolist(), abs=1e-5)
        assert answer.flip_chance > 0


def test_chances_by_what_is_known() -> None:
    """Nothing lost: none, whatever else; more lost or less ahead: more; not a number: no trust."""
    lost, lead = torch.tensor([0.0, 0.1, 0.3]), torch.tensor([0.0, 2.0, 2.0])
    for chances in (flip_chances(lost, None, None), flip_chances(lost, lead, None), flip_chances(lost, lead, lead - 1)):
        assert chances[0] == 0
        assert ((chances[1:] > 0) & (chances[1:] < 1)).all()
    assert flip_chances(lost, lead, None).diff().min() > 0
    ahead = flip_chances(torch.full((3,), 0.1), lead, torch.tensor([-1.0, 0.2, 3.0]))
    assert ahead.diff().max() < 0
    assert ahead[0] > 0.9
    answer = RowsAudit(0, (3, 4), (0.5, 0.5), (1.0, math.nan), None, (0.01, math.nan))
    assert not answer.trusted
    assert RowsAudit(0, (), (), None, None, ()).said == "no chosen row counts: all of them are padding"


@torch.no_grad()
def test_leads_stay_with_their_texts(tmp_path: Path) -> None:
    _, cache = build().run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    second = cache.audit(sample=0).answers[1]
    assert cache.apply_slice_to_batch_dim(1).audit(sample=0).answers[0].lead == second.lead
    assert cache.apply_slice_to_batch_dim((1, 2)).audit(sample=0).answers[0].lead == second.lead
    cache.save(tmp_path / "cache")
    assert tl_stream.SparseActivationCache.load(tmp_path / "cache").audit(sample=0).answers[1] == second


@torch.no_grad()
def test_shown_as_table_frame_and_json() -> None:
    _, cache = build().run_with_sparse_cache(tokens(LENGTH), config=CONFIG)
    result = cache.audit(sample=8)
    assert result.table().row_count == len(result.heads) == len(result.to_dataframe()) == 2 * 3 * 4
    plain = json.loads(result.to_json())
    assert plain["heads"][5]["retained"] == list(result.heads[5].retained)
    assert plain["answers"][1]["rows"] == [60]
    assert "heads doubtful" in repr(result)
    assert "estimate" in str([column.header for column in result.table().columns])


@torch.no_grad()
def test_bad_arguments() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    with pytest.raises(IndexError, match=r"rows were \[61\]; expected query positions from 0 to 60"):
        cache.audit(rows=[61])
    with pytest.raises(ValueError, match="rows was 0; expected how many"):
        cache.audit(rows=0)
    with pytest.raises(ValueError, match="sample was -1; expected how many further rows"):
        cache.audit(sample=-1)
    _, nothing = model.run_with_sparse_cache(text, config=CONFIG, names_filter="blocks.1.attn.hook_q")
    with pytest.raises(ValueError, match="The cache holds no pattern"):
        nothing.audit()
    cache["pattern", 1][:, 0] = 0
    with pytest.raises(TypeError, match="this one was written to"):
        cache.audit()


@torch.inference_mode()
def test_flagged_on_the_bundled_model() -> None:
    """A needle that a window can't see: the audit doubts the answer; with Stream's choice it doesn't."""
    model: Any = tl_stream.models.load()
    text = tl_stream.tasks.niah_single_1(model.tokenizer, 1024, depth=0.3, seed=5).prompt
    verdicts = {}
    for estimator in ("dual", "window"):
        _, cache = model.run_with_sparse_cache(text, config=StreamConfig(k=8, estimator=estimator), logits_to_keep=1)
        verdicts[estimator] = cache.audit(sample=0).answers[0].trusted
    assert verdicts == {"dual": True, "window": False}

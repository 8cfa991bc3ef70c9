"""A recheck is the dense model on twice the budget's blocks, whose last rows read everything; the verdict goes by it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from torch import Tensor
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.audit.verdict import DOUBT, RECHECKED
from tl_stream.budget import Budget, Linear, PerHead, Sqrt, TopP
from tl_stream.tasks import niah

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
LENGTH = 61


def leads(logits: Tensor, cache: SparseActivationCache) -> Tensor:
    """By how much the logits of a run's next tokens exceed all others."""
    assert cache.next_tokens is not None
    said = cache.next_tokens.token[:, -logits.shape[1] :, None]
    return logits.gather(-1, said)[..., 0] - logits.scatter(-1, said, -torch.inf).amax(-1)


def reread(model: Any, text: Tensor, cache: SparseActivationCache, n: int, k: Any = 4) -> Tensor:
    """Leads of the run's next tokens in the dense model, masked with the blocks of twice the budget but for the last n rows."""
    _, more = model.run_with_sparse_cache(text, config=replace(CONFIG, k=k, dense_queries=n))
    keep = {layer: more.block_layout(layer).to_dense().clone() for layer in cache.patterns}
    for kept in keep.values():
        assert kept[:, :, -n:].equal(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[-n:].expand(*kept.shape[:2], -1, -1))
    with EditedAttention(sorted(keep), LENGTH, on_scores=masked(keep)):
        return leads(model(text)[:, -n:], cache)


@NEEDS_HOOKED
@pytest.mark.parametrize("variant", ["standard", "gqa", "rotary", "soft-capped", "alibi"])
@pytest.mark.parametrize("n", [1, 3, 20])
@torch.no_grad()
def test_equals_the_masked_dense_model(variant: str, n: int) -> None:
    model, text = build(variant), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    expected = reread(model, text, cache, n)
    alone, result = cache.audit(n), tl_stream.recheck(model, text, cache, rows=n, dense_queries=n)
    assert result.heads == alone.heads
    for answer, other, lead in zip(result.answers, alone.answers, expected, strict=True):
        assert answer.reread == pytest.approx(lead.tolist(), abs=1e-5)
        assert (answer.retained, answer.lead, other.reread) == (other.retained, other.lead, None)
    assert expected.min() < 0 or n == 1


@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
@torch.no_grad()
def test_on_the_bridge(family: str) -> None:
    model, text = families.build(family), families.tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, logits_to_keep=4)
    result = tl_stream.recheck(model, text, cache, rows=4, sample=0, dense_queries=9)
    again, _ = model.run_with_sparse_cache(text, config=replace(CONFIG, k=4, dense_queries=9))
    expected = leads(again[:, -4:].float(), cache)
    assert [answer.reread for answer in result.answers] == [pytest.approx(lead.tolist(), abs=1e-4) for lead in expected]


@torch.no_grad()
def test_the_chance_goes_by_the_lead_in_the_recheck() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    intercept, (slope,) = RECHECKED.intercept, RECHECKED.slopes
    for answer in tl_stream.recheck(model, text, cache, rows=20, sample=0).answers:
        assert answer.reread is not None
        assert answer.lead is not None
        moved = zip(answer.lead, answer.reread, strict=True)
        odds = [intercept + slope * reread / math.sqrt(0.05 + abs(reread - lead)) for lead, reread in moved]
        chances = [1 / (1 + math.exp(-each)) for each in odds]
        assert answer.chances == pytest.approx(chances)
        assert answer.flip_chance == pytest.approx(1 - math.prod(1 - chance for chance in chances))
        assert answer.trusted == (answer.flip_chance <= DOUBT)
        assert answer.said.endswith("that dense attention says otherwise in rows 41 to 60 (rechecked)")


@pytest.mark.parametrize(
    "k", [Sqrt(0.7), Linear(0.2), TopP(0.6, at_most=3), PerHead({0: 1, (1, 2): TopP(0.5)}, otherwise=3)], ids=str
)
@torch.no_grad()
def test_every_budget_is_doubled(k: Budget) -> None:
    model, text = build("gqa"), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=replace(CONFIG, k=k))
    expected = reread(model, text, cache, 2, k.doubled())
    for answer, lead in zip(tl_stream.recheck(model, text, cache, 2, 0, dense_queries=2).answers, expected, strict=True):
        assert answer.reread == pytest.approx(lead.tolist(), abs=1e-5)
    for n in (1, 5, 40, 1000):
        for head in ((0, 0), (1, 2), (2, 1)):
            one, two = k.of_head(*head), k.of_head(*head).doubled()
            assert one.blocks(n) <= two.blocks(n) <= 2 * one.blocks(n)
            assert two.blocks(n) in (n, 2 * one.blocks(n), 2 * one.blocks(n) - 1)


@torch.no_grad()
def test_blocks_of_another_run_are_doubled_as_that_run_chose_them() -> None:
    model, text = build(), tokens(LENGTH)
    _, first = model.run_with_sparse_cache(text, config=CONFIG)
    _, cache = model.run_with_sparse_cache(text, config=StreamConfig(block_q=8, block_k=8, layout_from=first, max_dense=0))
    expected = reread(model, text, cache, 5)
    for answer, lead in zip(
        tl_stream.recheck(model, text, cache, 3, 0, dense_queries=5).answers, expected[:, -3:], strict=True
    ):
        assert answer.reread == pytest.approx(lead.tolist(), abs=1e-5)


@torch.no_grad()
def test_nothing_pruned_says_the_same() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=replace(CONFIG, k=100))
    for answer in tl_stream.recheck(model, text, cache, rows=3).answers:
        assert answer.reread == pytest.approx(answer.lead, abs=1e-5)
        assert (answer.chances, answer.flip_chance) == ((0, 0, 0), 0)
        assert answer.trusted


@torch.no_grad()
def test_padding_on_the_left() -> None:
    """The rows of a padded text are rechecked as those of the text alone."""
    model = build("standard", default_prepend_bos=False)
    text = tokens(40, batch=1)
    padded, mask = torch.cat([text[:, :8], text], 1), (torch.arange(48) >= 8).long()[None]
    config = replace(CONFIG, estimator="exact")
    _, alone = model.run_with_sparse_cache(text, config=config)
    _, cache = model.run_with_sparse_cache(padded, config=config, attention_mask=mask)
    (a,) = tl_stream.recheck(model, text, alone, rows=3, sample=0, dense_queries=3).answers
    (b,) = tl_stream.recheck(model, padded, cache, rows=3, sample=0, dense_queries=3, attention_mask=mask).answers
    assert a.reread == pytest.approx(b.reread, abs=1e-5)


@torch.inference_mode()
def test_a_wrong_answer_that_is_sure_of_itself() -> None:
    """The paper's choice of blocks drops what the answer's rows need; the run is surer than the recheck."""
    model: Any = tl_stream.models.load()
    prompt = niah(model.tokenizer, 1024, depth=0.0, keys=4, seed=30_002)
    text = model.to_tokens(f"{prompt.prompt} {prompt.answer}")[:, :-1]
    n = len(prompt.value)
    config = StreamConfig(block_q=8, block_k=8, k=32, estimator="stream")
    _, cache = model.run_with_sparse_cache(text, config=config, logits_to_keep=n)
    (alone,), (again,) = (a.answers for a in (cache.audit(n, 0), tl_stream.recheck(model, text, cache, n, 0)))
    assert alone.flip_chance < 0.5
    assert again.flip_chance > 0.9


@torch.no_grad()
def test_bad_input() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, logits_to_keep=2)
    for rows in (0, 3):
        with pytest.raises(ValueError, match=f"rows was {rows}, but the cache knows the next tokens of the last 2 rows"):
            tl_stream.recheck(model, text, cache, rows=rows)
    for other, shape in ((text[:, 1:], "2, 60"), (text[:1], "1, 61")):
        with pytest.raises(ValueError, match=rf"text was of shape \({shape}\), but the cache is of a run on \(2, 61\)"):
            tl_stream.recheck(model, other, cache)
    with pytest.raises(ValueError, match="dense_queries was -1; expected an int >= 0"):
        tl_stream.recheck(model, text, cache, dense_queries=-1)
    _, exact = model.run_with_sparse_cache(text, config=replace(CONFIG, forward="exact"))
    with pytest.raises(ValueError, match="nothing to recheck"):
        tl_stream.recheck(model, text, exact)
    wrong: Any
    for wrong in ([60], True, 2.0):
        with pytest.raises(TypeError, match=r"rows was .*; expected an int: how many of the last rows"):
            tl_stream.recheck(model, text, cache, rows=wrong)
    with pytest.raises(ValueError, match="return_type was 'loss'; a recheck needs logits"):
        tl_stream.recheck(model, text, cache, return_type="loss")


@torch.no_grad()
def test_padding_on_the_right() -> None:
    """The rows of a padded text are rechecked as those of the text alone."""
    model = build("standard", default_prepend_bos=False)
    text, mask = tokens(48, batch=1), (torch.arange(48) < 40).long()[None]
    config = replace(CONFIG, estimator="exact")
    _, alone = model.run_with_sparse_cache(text[:, :40], config=config)
    _, cache = model.run_with_sparse_cache(text, config=config, attention_mask=mask)
    (a,) = tl_stream.recheck(model, text[:, :40], alone, rows=3, sample=0, dense_queries=3).answers
    (b,) = tl_stream.recheck(model, text, cache, rows=3, sample=0, dense_queries=3, attention_mask=mask).answers
    assert a.rows == b.rows == (37, 38, 39)
    assert a.reread == pytest.approx(b.reread, abs=1e-5)
    _, short = model.run_with_sparse_cache(text, config=config, attention_mask=mask, logits_to_keep=8)
    with pytest.raises(ValueError, match=r"reread was of the last 8 positions, but the chosen rows of text 0 are"):
        tl_stream.recheck(model, text, short, rows=3, sample=0, attention_mask=mask)


@torch.no_grad()
def test_leads_of_other_rows_or_texts_are_refused() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    with pytest.raises(ValueError, match="reread was of the last 2 positions, but the chosen rows of text 0 are"):
        cache.audit(3, 0, reread=torch.zeros(len(text), 2))
    with pytest.raises(ValueError, match=r"reread was of shape \(3, 3\); expected \[2, row\]"):
        cache.audit(3, 0, reread=torch.zeros(3, 3))
    result = cache.audit(1, 0, reread=torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert [answer.reread for answer in result.answers] == [pytest.approx((0.2,)), pytest.approx((0.4,))]

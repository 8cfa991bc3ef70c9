"""A recheck is the dense model on the run's own blocks, whose last rows read everything; its verdict goes by what these say."""

from __future__ import annotations

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
from tl_stream.audit.verdict import DOUBT_THRESHOLD
from tl_stream.tasks import niah

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
LENGTH = 61


def reread(model: Any, text: Tensor, cache: SparseActivationCache, n: int) -> Tensor:
    """Leads of the run's next tokens in the dense model, masked with the run's blocks but for the last n rows."""
    keep = {layer: cache.block_layout(layer).to_dense().clone() for layer in cache.patterns}
    for kept in keep.values():
        kept[:, :, -n:] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[-n:]
    with EditedAttention(sorted(keep), LENGTH, on_scores=masked(keep)):
        probability = model(text)[:, -n:].softmax(-1)
    assert cache.next_tokens is not None
    said = cache.next_tokens.token[:, -n:, None]
    return probability.gather(-1, said)[..., 0] - probability.scatter(-1, said, 0).amax(-1)


@NEEDS_HOOKED
@pytest.mark.parametrize("variant", ["standard", "gqa", "rotary", "soft-capped", "alibi"])
@pytest.mark.parametrize("n", [1, 3, 20])
@torch.no_grad()
def test_equals_the_masked_dense_model(variant: str, n: int) -> None:
    model, text = build(variant), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    expected = reread(model, text, cache, n)
    alone, result = cache.audit(n), tl_stream.recheck(model, text, cache, rows=n)
    assert result.heads == alone.heads
    for answer, other, leads in zip(result.answers, alone.answers, expected, strict=True):
        assert answer.reread == pytest.approx(leads.tolist(), abs=1e-6)
        assert (answer.retained, answer.lead, other.reread) == (other.retained, other.lead, None)
    assert expected.min() < 0 or n == 1


@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
@torch.no_grad()
def test_on_the_bridge(family: str) -> None:
    model, text = families.build(family), families.tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, logits_to_keep=4)
    result = tl_stream.recheck(model, text, cache, rows=4, sample=0)
    again, _ = model.run_with_sparse_cache(text, config=replace(CONFIG, layout_from=cache, dense_queries=4))
    probability = again[:, -4:].float().softmax(-1)
    said = cache.next_tokens.token[..., None]
    expected = probability.gather(-1, said)[..., 0] - probability.scatter(-1, said, 0).amax(-1)
    assert [answer.reread for answer in result.answers] == [pytest.approx(leads.tolist(), abs=1e-5) for leads in expected]


@torch.no_grad()
def test_the_lesser_lead_counts() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    for answer in tl_stream.recheck(model, text, cache, rows=20, sample=0).answers:
        assert answer.lead is not None
        assert answer.reread is not None
        rows = zip(answer.retained, answer.lead, answer.reread, strict=True)
        doubt = [(1 - mass) / max(min(leads), 0) if min(leads) > 0 else torch.inf for mass, *leads in rows]
        assert answer.doubt == pytest.approx(doubt)
        assert answer.trusted == (max(doubt) <= DOUBT_THRESHOLD)
        assert ("another one when it reads everything" in str(answer.reasons)) == (torch.inf in doubt)


@torch.no_grad()
def test_nothing_pruned_says_the_same() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=replace(CONFIG, k=100))
    for answer in tl_stream.recheck(model, text, cache, rows=3).answers:
        assert answer.reread == pytest.approx(answer.lead, abs=1e-6)
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
    (a,) = tl_stream.recheck(model, text, alone, rows=3, sample=0).answers
    (b,) = tl_stream.recheck(model, padded, cache, rows=3, sample=0, attention_mask=mask).answers
    assert a.reread == pytest.approx(b.reread, abs=1e-6)


@torch.inference_mode()
def test_a_wrong_answer_that_is_sure_of_itself() -> None:
    """The paper's choice of blocks drops what the answer's rows need; the run is sure, and the recheck is not."""
    model: Any = tl_stream.models.load()
    prompt = niah(model.tokenizer, 1024, depth=0.0, keys=4, seed=30_002)
    text = model.to_tokens(f"{prompt.prompt} {prompt.answer}")[:, :-1]
    n = len(prompt.value)
    config = StreamConfig(block_q=8, block_k=8, k=32, estimator="stream")
    _, cache = model.run_with_sparse_cache(text, config=config, logits_to_keep=n)
    (alone,), (again,) = (a.answers for a in (cache.audit(n, 0), tl_stream.recheck(model, text, cache, n, 0)))
    assert alone.trusted
    assert not again.trusted


@torch.no_grad()
def test_bad_input() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, logits_to_keep=2)
    for rows in (0, 3):
        with pytest.raises(ValueError, match=f"rows was {rows}, but the cache knows the next tokens of the last 2 rows"):
            tl_stream.recheck(model, text, cache, rows=rows)
    with pytest.raises(ValueError, match="layout_from held a layout of"):
        tl_stream.recheck(model, text[:, 1:], cache)
    _, exact = model.run_with_sparse_cache(text, config=replace(CONFIG, forward="exact"))
    with pytest.raises(ValueError, match="nothing to recheck"):
        tl_stream.recheck(model, text, exact)
    _, part = model.run_with_sparse_cache(text, config=CONFIG, names_filter="blocks.1.attn.hook_pattern")
    with pytest.raises(KeyError, match="layer was 0"):
        tl_stream.recheck(model, text, part)
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
    (a,) = tl_stream.recheck(model, text[:, :40], alone, rows=3, sample=0).answers
    (b,) = tl_stream.recheck(model, text, cache, rows=3, sample=0, attention_mask=mask).answers
    assert a.rows == b.rows == (37, 38, 39)
    assert a.reread == pytest.approx(b.reread, abs=1e-6)
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

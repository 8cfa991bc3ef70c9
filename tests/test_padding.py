"""Padding weighs in nothing: not in the choice of blocks, not in averages, not in an audit, whichever side it is on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_estimator import queries_and_keys
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig, estimate_layout
from tl_stream.analysis import head_scores
from tl_stream.budget import Linear, PerHead, Sqrt, TopP
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Alibi, Bias

ESTIMATORS = ["auto", "dual", "exact", "stream", "hip", "box", "window", "random"]
BUDGETS: list[Any] = [1, 3, Sqrt(0.8), Linear(0.2), TopP(0.6, at_most=6), PerHead({(0, 1): 1, (0, 2): Sqrt(0.5)}, 4)]


@st.composite
def runs(draw: Any) -> tuple[StreamConfig, int, int | None]:
    """A config, a length and a window."""
    budget, estimator = draw(st.sampled_from(BUDGETS)), draw(st.sampled_from(ESTIMATORS))
    if estimator in ("window", "random") and getattr(budget, "needs_shares", False):
        budget = 2
    sizes = draw(st.sampled_from([(8, 8), (16, 4), (4, 16), (16, 1), (1, 8), (12, 8), (1, 1)]))
    config = StreamConfig(
        block_q=sizes[0], block_k=sizes[1], k=budget, estimator=estimator, seed=0, beam=draw(st.sampled_from([1, 6])),
        leaf_queries=draw(st.sampled_from([None, 2])), exact_below=draw(st.sampled_from([40, 4096])),
        keep_sink=draw(st.booleans()),
    )  # fmt: skip
    return config, draw(st.integers(1, 150)), draw(st.sampled_from([None, 9, 40]))


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_row_keeps_its_own_block(run: tuple[StreamConfig, int, int | None]) -> None:
    config, length, window = run
    q, k = queries_and_keys(length, batch=1)
    layout = estimate_layout(q, k, config, mask=AttentionMask.causal(length, window=window))
    assert layout.to_dense().diagonal(dim1=-2, dim2=-1).all()


@settings(max_examples=150, deadline=None)
@given(runs(), st.integers(0, 3), st.integers(0, 60), st.booleans())
def test_a_padded_text_chooses_as_it_does_alone(
    run: tuple[StreamConfig, int, int | None], before: int, behind: int, known: bool
) -> None:
    """In a batch, behind whole blocks of padding, before any number of it, and where only the tokenizer tells of it."""
    config, length, window = run
    q, k = queries_and_keys(length, batch=2)
    left = 0 if known else before * math.lcm(config.block_q, config.block_k)
    total = left + length + behind
    padded_q, padded_k = (
        9 * torch.randn(x.shape[0], x.shape[1], total, x.shape[3], generator=torch.Generator().manual_seed(0)) for x in (q, k)
    )
    padded_q[0, :, left : left + length], padded_k[0, :, left : left + length] = q[0], k[0]
    real = torch.ones(2, total, dtype=torch.bool)
    real[0, :left], real[0, left + length :] = False, False
    mods = (Alibi(torch.tensor([0.1, 0.2, 0.0, 0.3]), 0), Bias(torch.randn(2, 1, 1, total)))
    alone_mods = (mods[0], Bias(mods[1].bias[:1, :, :, left : left + length]))
    mask = AttentionMask.causal(total, window=window)
    mask = replace(mask, real=real) if known else mask.with_padding(real)
    found = estimate_layout(padded_q, padded_k, config, mask=mask, score_mods=mods).to_dense()
    plain = AttentionMask.causal(length, window=window)
    alone = estimate_layout(q[:1], k[:1], config, mask=plain, score_mods=alone_mods).to_dense()
    part = slice(left, left + length)
    assert torch.equal(found[:1, :, part, part], alone)


@pytest.mark.parametrize("estimator", ["exact", "dual", "stream"])
def test_padding_within_a_block_is_no_query(estimator: str) -> None:
    """On the left, by less than a block: the padded queries want one block each, which nobody else does."""
    q, k = queries_and_keys(160, batch=1)
    valid = (torch.arange(160) >= 3)[None]
    mask, config = AttentionMask.causal(160, key_valid=valid), StreamConfig(block_q=8, block_k=8, k=3, estimator=estimator)
    wild = q.clone()
    wild[:, :, :3] *= 50
    layouts = [estimate_layout(x, k, config, mask=mask).to_dense()[:, :, 3:] for x in (q, wild)]
    assert torch.equal(*layouts)


def needle(model: Any, length: int, seed: int) -> Any:
    return tl_stream.tasks.niah_single_1(model.tokenizer, length, depth=0.4, seed=seed)


@torch.no_grad()
def test_needles_are_found_as_often_as_alone() -> None:
    model: Any = tl_stream.models.load()
    found = {"alone": 0, "left": 0, "right": 0}
    for seed in range(6):
        task = needle(model, 260, seed)
        text = model.to_tokens(task.prompt)
        pad = torch.full((1, 120), model.tokenizer.pad_token_id)
        padded = {"alone": [text], "left": [pad, text], "right": [text, pad]}
        for side, parts in padded.items():
            mask = torch.cat([torch.full_like(part, int(part is text)) for part in parts], 1)
            row = text.shape[1] - 1 + (120 if side == "left" else 0)
            options = {"config": StreamConfig(k=2), "attention_mask": mask}
            logits, _ = model.run_with_sparse_cache(torch.cat(parts, 1), **options)
            found[side] += model.to_string(logits[0, row].argmax()) == task.answer[0]
    assert found == {"alone": 6, "left": 6, "right": 6}


@torch.no_grad()
@pytest.mark.parametrize("host", ["bridge", "hooked"])
def test_a_list_of_texts(host: str) -> None:
    """TransformerLens pads it on the right and tells no mask of it."""
    if host == "hooked" and "hooked_transformer" not in tl_stream.hosts.model_classes().values():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    model: Any = tl_stream.models.load(host=host)
    texts = [needle(model, 100, 1).prompt, needle(model, 170, 2).prompt]
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    config = StreamConfig(k=3)
    logits, cache = model.run_with_sparse_cache(texts, config=config)
    audits = cache.audit(), tl_stream.recheck(model, texts, cache)
    tokens = model.to_tokens(texts)
    for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone_logits, alone = model.run_with_sparse_cache(text, config=config)
        assert torch.allclose(logits[i, :length], alone_logits[0], atol=1e-4)
        for layer in range(model.cfg.n_layers):
            kept = cache["pattern", layer].block_layout.to_dense()[i, :, :length, :length]
            assert torch.equal(kept, alone["pattern", layer].block_layout.to_dense()[0])
        expected = alone.audit(), tl_stream.recheck(model, text, alone)
        for audit, other in zip(audits, expected, strict=True):
            assert audit.answers[i].rows == (length - 1,)
            assert audit.answers[i].retained == pytest.approx(other.answers[0].retained, abs=1e-5)
            assert audit.answers[i].lead == pytest.approx(other.answers[0].lead, abs=1e-5)
        assert audits[1].answers[i].reread == pytest.approx(expected[1].answers[0].reread, abs=1e-5)
        here = head_scores(cache.apply_slice_to_batch_dim(slice(i, i + 1)), tokens[i : i + 1])
        for a, b in zip(here.heads, head_scores(alone, model.to_tokens(text)).heads, strict=True):
            assert a.previous_token == pytest.approx(b.previous_token, abs=1e-5)


@torch.no_grad()
def test_what_looks_like_padding() -> None:
    """Pad tokens behind tokens are padding; with a mask that says otherwise they are text."""
    model: Any = tl_stream.models.load()
    text = model.to_tokens(needle(model, 100, 1).prompt)
    padded = torch.nn.functional.pad(text, (0, 40), value=model.tokenizer.pad_token_id)

    def last_row(tokens: Tensor, **options: Any) -> tuple[int, ...]:
        return model.run_with_sparse_cache(tokens, config=StreamConfig(k=3), **options)[1].audit(sample=0).answers[0].rows

    assert last_row(padded) == (text.shape[1] - 1,)
    assert last_row(padded, attention_mask=torch.ones_like(padded)) == (padded.shape[1] - 1,)
    full, _ = model.run_with_sparse_cache(padded, config=StreamConfig(k=10**6))
    assert torch.allclose(full, model(padded), atol=1e-4)

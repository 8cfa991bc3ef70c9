"""Thought anchors: sentences, vertical scores and suppression against the dense computation by hand, and clear errors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import families
import numpy
import pytest
import torch
from allocations import LargestTensor
from torch import Tensor
from zoo import build, gap, mask_hooks, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import (
    PAPER,
    TAGS,
    AnchorSettings,
    Segments,
    Sentence,
    VerticalScores,
    line_split,
    paper_split,
    receiver_heads,
    resampling_importance,
    rule_tag,
    sentence_matrix,
    sentences,
    suppression,
    vertical_scores,
)
from tl_stream.hosts import unembedding
from tl_stream.tasks import Span

SPARSE = StreamConfig(block_q=4, block_k=4, k=3, max_dense=0)
EVERYTHING = StreamConfig(block_q=4, block_k=4, k=1000, max_dense=0)
SPANS = [(1, 7), (7, 8), (10, 20), (20, 33), (33, 40), (40, 47), (50, 61)]  # gaps, and a sentence of one token
KL = AnchorSettings(temperature=1.0, log=False)


@pytest.fixture(scope="module")
def mini() -> Any:
    return tl_stream.models.load()


def patterns(name: str) -> bool:
    return name.endswith("hook_pattern")


def matrix_by_hand(pattern: Tensor) -> Tensor:
    rows = [torch.stack([pattern[:, a:b, c:d].mean((1, 2)) for c, d in SPANS], -1) for a, b in SPANS]
    return torch.stack(rows, 1)


# Segmentation


def test_the_papers_rule() -> None:
    text = "Before.<think>First we add 3.5 and 2. Wait! Then we stop?\nIt is fine\n\nNew paragraph now. Ok.</think>After this."
    found = [text[a:b] for a, b in paper_split(text)]
    assert found == [
        "First we add 3.5 and 2.",
        "Wait! Then we stop?",
        "It is fine",
        "New paragraph now. Ok.",
    ]
    assert paper_split("Short. Tiny.") == [(0, 12)]
    assert paper_split(" \n ") == []


def test_sentences_have_the_tokens_of_their_text(mini: Any) -> None:
    task = tl_stream.tasks.reasoning_trace(mini.tokenizer, 30, seed=1)
    found = sentences(task.text, mini)
    assert [each.span for each in found] == [each.span for each in task.sentences]
    assert [each.text for each in found] == [each.text for each in task.sentences]
    assert found == sentences(mini.to_tokens(task.text), mini) == sentences(task.text, mini.tokenizer)
    assert {each.tag for each in found} <= set(TAGS)


def test_other_ways_to_cut(mini: Any) -> None:
    text = "the grass is green .\n\n the sky is blue ."
    lines = sentences(text, mini, split=line_split, tagger=lambda sentence: sentence[:3])
    assert [each.text for each in lines] == ["the grass is green .", "the sky is blue ."]
    assert [each.tag for each in lines] == ["the", "the"]
    given = sentences(text, mini, split=[(0, 9), (10, 20)])
    assert [each.text for each in given] == ["the grass", "is green ."]
    assert given[0].span.stop == given[1].span.start


@pytest.mark.parametrize(
    ("sentence", "tag"),
    [
        ("How many marbles does Ann have?", "problem_setup"),
        ("Next we look at Ann.", "plan_generation"),
        ("Ann has 3 marbles.", "fact_retrieval"),
        ("Ann gets 3 more than Bob, so Ann has 5.", "active_computation"),
        ("Overall we have three of them.", "result_consolidation"),
        ("Hmm, I am not sure.", "uncertainty_management"),
        ("The final answer is 7.", "final_answer_emission"),
        ("Wait, let me check Ann again.", "self_checking"),
    ],
)
def test_tags_of_clear_wordings(sentence: str, tag: str) -> None:
    assert rule_tag(sentence) == tag


def test_bad_texts(mini: Any) -> None:
    with pytest.raises(ValueError, match="held no sentence"):
        sentences("  \n ", mini)
    with pytest.raises(ValueError, match="split gave the characters 5:5"):
        sentences("the grass is green .", mini, split=[(0, 5), (5, 5)])
    with pytest.raises(TypeError, match="text was int"):
        sentences(3, mini)  # type: ignore[arg-type]


# Sentence patterns


@pytest.mark.parametrize("variant", ["standard", "gqa", "sinks", "local"])
@pytest.mark.parametrize(
    "config", [EVERYTHING, StreamConfig(dense_layers=3, max_dense=0), SPARSE], ids=["all", "full", "sparse"]
)
@torch.no_grad()
def test_matrix_and_vertical_scores_are_the_dense_ones(variant: str, config: StreamConfig) -> None:
    """Nothing pruned: the dense model's; pruned: those of the dense model masked with the layouts."""
    model = build(variant)
    text = tokens(61)
    _, cache = model.run_with_sparse_cache(text, config=config)
    with model.hooks(fwd_hooks=mask_hooks(cache)):
        _, dense = model.run_with_cache(text, names_filter=patterns)
    found = vertical_scores(cache, SPANS, text=1, settings=AnchorSettings(proximity=2))
    for layer in range(3):
        expected = matrix_by_hand(dense["pattern", layer][1])
        assert gap(sentence_matrix(cache, layer, SPANS, text=1), expected) < 1e-12
        vertical = torch.stack([expected[:, j + 2 :, j].mean(-1) for j in range(len(SPANS) - 2)], -1)
        assert gap(found.values[layer, :, :-2], vertical) < 1e-12
    assert found.values[..., -2:].isnan().all()
    assert found.exact_for == ("the sparse model" if cache.pruned else "the dense model")


@torch.no_grad()
def test_exact_forward_gives_the_recorded_entries_of_the_dense_model() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    config = StreamConfig(block_q=4, block_k=4, k=3, forward="exact", max_dense=0)
    _, cache = model.run_with_sparse_cache(text, config=config, remove_batch_dim=True)
    _, dense = model.run_with_cache(text, names_filter=patterns)
    for layer in range(3):
        kept = cache.block_layout(layer).to_dense()[0]
        expected = matrix_by_hand(dense["pattern", layer][0] * kept)
        assert gap(sentence_matrix(cache, layer, SPANS), expected) < 1e-12
    assert vertical_scores(cache, SPANS).exact_for == "the recorded entries of the dense model"


@torch.no_grad()
def test_coarsened_patterns(mini: Any) -> None:
    """Sentences as everywhere else; scores, heads and comparisons as patterns; exact against `to_dense()`."""
    text = tl_stream.tasks.reasoning_trace(mini.tokenizer, 8, seed=1).text
    _, cache = mini.run_with_sparse_cache(text, config=SPARSE)
    parts = sentences(text, mini)
    pattern = cache["pattern", 1]
    matrix = sentence_matrix(cache, 1, parts)
    assert gap(pattern.coarsen(parts)[0].double(), matrix) < 1e-6
    assert gap(pattern.coarsen(Segments.of(parts, pattern.shape[-1])), pattern.coarsen([x.span.slice for x in parts])) == 0
    others: list[Any] = [pattern * 2 + 0.1, pattern.mT, pattern[0, 2], torch.stack([pattern, pattern]), pattern > 0.1]
    for shown in others:
        found, dense = shown.coarsen(parts), shown.to_dense()
        rows = [[dense[..., a, b].double().mean((-2, -1)) for b in cuts(parts)] for a in cuts(parts)]
        assert gap(found.double(), torch.stack([torch.stack(row, -1) for row in rows], -2)) < 1e-6
    with pytest.raises(ValueError, match=r"segments\[1\] was 3:9, behind one that ends at 4"):
        pattern.coarsen([(0, 4), (3, 9)])
    with pytest.raises(ValueError, match="segments were none"):
        pattern.coarsen([])
    with pytest.raises(TypeError, match="segments held 3; expected sentences with a span"):
        pattern.coarsen([3])
    with pytest.raises(ValueError, match=r"coarsen\(\) got 20 rows and \d+ keys; expected those of a whole text"):
        pattern[..., :20, :].coarsen(parts)


def cuts(parts: Any) -> list[slice]:
    return [each.span.slice for each in parts]


@torch.no_grad()
def test_edited_patterns_count_as_edited() -> None:
    model = build("gqa")
    _, cache = model.run_with_sparse_cache(tokens(61), config=SPARSE)
    cache["pattern", 1][:, 2] = 0
    assert sentence_matrix(cache, 1, SPANS)[2].abs().max() == 0
    assert vertical_scores(cache, SPANS).values[1, 2, :-4].abs().max() == 0


def test_receiver_heads_are_those_of_the_greatest_kurtosis() -> None:
    model = build("gqa")
    traces = []
    for seed in range(4):
        _, cache = model.run_with_sparse_cache(tokens(61, batch=1, seed=seed), config=SPARSE)
        traces.append(vertical_scores(cache, SPANS, settings=AnchorSettings(proximity=1)))
    found = receiver_heads(traces, settings=AnchorSettings(n_heads=3))
    x = traces[0].values[1, 2, :-1].numpy()
    by_hand = numpy.mean((x - x.mean()) ** 4) / numpy.var(x) ** 2 - 3
    assert found.by_trace[0, 1, 2].item() == pytest.approx(by_hand)
    mean = found.by_trace.mean(0)
    assert [mean[head].item() for head in found.heads] == sorted(mean.flatten().tolist(), reverse=True)[:3]
    scores = found.sentence_scores(traces[0])
    expected = sum(traces[0].values[head][0].item() for head in found.heads) / 3
    assert scores[0].item() == pytest.approx(expected)
    halves = found.by_trace[::2].mean(0).flatten().numpy(), found.by_trace[1::2].mean(0).flatten().numpy()
    assert found.reliability == pytest.approx(numpy.corrcoef(*halves)[0, 1])
    assert len(receiver_heads(traces[0]).heads) == 12
    with pytest.raises(ValueError, match="at least 2 traces"):
        _ = receiver_heads(traces[:1]).reliability
    with pytest.raises(ValueError, match="traces were of 0 kinds"):
        receiver_heads([])


def scored(values: Tensor) -> VerticalScores:
    n = values.shape[-1]
    segments = Segments.of([(i, i + 1) for i in range(n)], n)
    return VerticalScores(values.double(), (0,), segments, 0.0, "the dense model")


def test_kurtosis_is_that_of_scipy() -> None:
    """scipy.stats.kurtosis of the same numbers; the last ones without scores."""
    values = torch.tensor([[[1.0, 2, 2, 4, 10, 3, torch.nan], [0, 0, 0, 0, 1, 0, torch.nan]]])
    assert scored(values).kurtosis[0].tolist() == pytest.approx([0.5334375, 6 - 5 + 1 / 5])


def test_heads_with_constant_scores_are_no_receivers() -> None:
    """Rounding is no peak: the mean of seven 0.1 isn't 0.1."""
    constant, peaked = torch.full((7,), 0.1), torch.eye(7)[2]
    found = scored(torch.stack([constant.double(), 0.0 * peaked, peaked])[None])
    assert found.kurtosis[0, :2].isnan().all()
    assert receiver_heads(found).heads == ((0, 2),)
    with pytest.raises(ValueError, match="every head the same score for all sentences"):
        receiver_heads(scored(torch.ones(1, 2, 7)))


def test_the_kurtosis_of_three_numbers_chooses_no_head() -> None:
    few = scored(torch.tensor([[[3.0, 1, 2], [0, 0, 9]]]))
    assert few.kurtosis[0].tolist() == pytest.approx([-1.5, -1.5])
    with pytest.raises(ValueError, match=r"traces had one with scores of 3 sentences \(3 in all\); expected at least 4"):
        receiver_heads([scored(torch.rand(1, 2, 7)), few])


@torch.no_grad()
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_stream.analysis.sentence_patterns._ENTRIES_AT_ONCE", 2**17)
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr("tl_stream.audit.rows.CHUNK_ENTRIES", 2**17)
    model, length = build("gqa", torch.float32, n_ctx=8192), 2048
    spans = [(i, i + 64) for i in range(0, length, 64)]
    for dense_layers in (0, 3):
        config = StreamConfig(block_q=16, block_k=16, k=4, dense_layers=dense_layers, max_dense=0)
        _, cache = model.run_with_sparse_cache(torch.randint(0, 40, (1, length)), config=config, names_filter=patterns)
        with LargestTensor() as watch:
            vertical_scores(cache, spans)
            sentence_matrix(cache, 1, spans)
        assert watch.numel < length * length / 8


# Suppression


def suppressed_by_hand(model: Any, text: Tensor, hooks: list[Any], settings: AnchorSettings) -> Tensor:
    """One dense run a sentence, the columns set to -inf by an ordinary hook in all rows after the sentence.

    Rows left without keys give 0: HookedTransformer sees to that itself, a bridge gives NaN.
    """
    attend_to_nothing = (patterns, lambda pattern, hook: pattern.nan_to_num(0.0))

    def log_probs(extra: list[Any]) -> Tensor:
        logits = model.run_with_hooks(text, fwd_hooks=[*hooks, *extra, attend_to_nothing])[0].double()
        return (logits / settings.temperature).log_softmax(-1)

    base = log_probs([])
    found = torch.full((len(SPANS), len(SPANS)), torch.nan, dtype=torch.float64)
    for j, (start, stop) in enumerate(SPANS):

        def suppress(scores: Tensor, hook: Any, start: int = start, stop: int = stop) -> Tensor:
            scores[:, :, stop:, start:stop] = -torch.inf
            return scores

        q = log_probs([(lambda name: name.endswith("attn_scores"), suppress)])
        kl = (base.exp() * (base - q)).sum(-1)
        kl = (kl.clamp(min=0) + 1e-9).log() if settings.log else kl
        for i in range(j + 1, len(SPANS)):
            found[i, j] = kl[slice(*SPANS[i])].mean()
    return found


@pytest.mark.parametrize("settings", [KL, PAPER], ids=["kl", "paper"])
@pytest.mark.parametrize("variant", ["standard", "gqa", "sinks", "alibi"])
@pytest.mark.parametrize("config", [None, EVERYTHING, SPARSE], ids=["dense", "all", "sparse"])
@torch.no_grad()
def test_suppression_is_what_dense_runs_give(variant: str, config: StreamConfig | None, settings: AnchorSettings) -> None:
    model, text = build(variant), tokens(61, batch=1)
    found = suppression(model, text, SPANS, config=config, batch_size=4, settings=settings, progress=False)
    hooks: list[Any] = []
    if config is SPARSE:
        hooks = mask_hooks(model.run_with_sparse_cache(text, config=SPARSE)[1])
        assert found.pruned > 0.2
    expected = suppressed_by_hand(model, text, hooks, settings)
    assert torch.equal(found.effects.isnan(), expected.isnan() | (torch.arange(len(SPANS)) == len(SPANS) - 1))
    assert gap(found.effects.nan_to_num(0.0), expected.nan_to_num(0.0)) < (1e-5 if settings.log else 1e-9)
    assert ("dense" in found.exact_for) == (config is None)


@torch.no_grad()
def test_batches_and_choices_of_sentences_change_nothing() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    every = suppression(model, text, SPANS, config=SPARSE, settings=KL, progress=False)
    for batch_size in (1, 3):
        some = suppression(
            model, text, SPANS, config=SPARSE, settings=KL, batch_size=batch_size, sources=[4, 1], progress=False
        )
        assert gap(some.effects[:, [1, 4]].nan_to_num(0.0), every.effects[:, [1, 4]].nan_to_num(0.0)) < 1e-12
        assert some.effects[:, [0, 2, 3]].isnan().all()
    rows = suppression(model, text, SPANS, config=SPARSE, settings=KL, targets=[(i, i + 1) for i in range(61)], progress=False)
    averaged = rows.effects[33:40, :4].mean(0)
    assert gap(averaged, every.effects[4, :4]) < 1e-12
    assert rows.effects[7, 0].isfinite()
    assert rows.effects[6, 0].isnan()
    assert every.top_sources(6, 2) == every.effects[6, :6].argsort(descending=True)[:2].tolist()
    assert gap(every.scores[:6], every.effects[:, :6].nanmean(0)) == 0


@pytest.mark.parametrize("family", ["Gemma 2", "Cohere"])
@pytest.mark.parametrize("config", [None, SPARSE], ids=["dense", "sparse"])
@torch.no_grad()
def test_logits_are_made_some_rows_at_a_time(family: str, config: StreamConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model's own code makes them, with a soft cap or a factor; the same effects as from all logits at once."""
    model, text = families.build(family, torch.float64), families.tokens(61, batch=1)
    options: dict[str, Any] = {"config": config, "batch_size": 4, "settings": KL, "progress": False}
    at_once = suppression(model, text, SPANS, **options)
    hooks = [] if config is None else mask_hooks(model.run_with_sparse_cache(text, config=config)[1])
    expected = suppressed_by_hand(model, text, hooks, KL)
    monkeypatch.setattr(unembedding, "ENTRIES", 4 * 7 * model.cfg.d_vocab)
    made: list[tuple[int, ...]] = []
    with model.unembed.register_forward_hook(lambda module, args, output: made.append(tuple(output.shape[:2]))):
        found = suppression(model, text, SPANS, **options)
    assert max(texts * rows for texts, rows in made) == 4 * 7
    assert gap(found.effects.nan_to_num(0.0), at_once.effects.nan_to_num(0.0)) < 1e-9
    assert gap(found.effects[:, :-1].nan_to_num(0.0), expected[:, :-1].nan_to_num(0.0)) < 1e-6


@torch.no_grad()
def test_a_hook_on_the_logits_sees_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that tells rows apart gives each row what it would give it in a run of the whole text."""
    monkeypatch.setattr(unembedding, "ENTRIES", 1)
    model, text = families.build("Llama", torch.float64), families.tokens(61, batch=1)

    def steer(logits: Tensor, hook: Any) -> Tensor:
        logits[:, 40:47, 3] += 5
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", steer)]):
        found = suppression(model, text, SPANS, settings=KL, progress=False)
        expected = suppressed_by_hand(model, text, [], KL)
    assert gap(found.effects[:, :-1].nan_to_num(0.0), expected[:, :-1].nan_to_num(0.0)) < 1e-6


@torch.no_grad()
def test_suppression_takes_memory_by_the_text_whatever_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unembedding, "ENTRIES", 2**15)
    length, spans = 512, [(i, i + 64) for i in range(0, 512, 64)]
    for config in (None, StreamConfig(block_q=16, block_k=16, k=4)):
        largest = []
        for d_vocab in (4096, 8192):
            model = build("gqa", torch.float32, n_ctx=1024, n_layers=1, d_vocab=d_vocab)
            text = torch.randint(0, d_vocab, (1, length))
            with LargestTensor() as watch:
                suppression(model, text, spans, config=config, batch_size=4, progress=False)
            largest.append(watch.numel)
        assert largest[0] == largest[1] < length * 4096


@torch.no_grad()
def test_rows_left_without_keys_attend_to_nothing() -> None:
    """A row of the first sentence can read nothing else: 0, not NaN; later rows are none the wiser."""
    model, text = build("gqa"), tokens(61, batch=1)
    one_block = StreamConfig(block_q=4, block_k=4, k=1, max_dense=0)
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), lambda z, hook: seen.append(z.clone()))]):
        found = suppression(model, text, [(0, 8), *SPANS[2:]], config=one_block, sources=[0], settings=KL, progress=False)
    assert found.effects[1:, 0].isfinite().all()
    assert seen[-1][0, 0].abs().max() == 0
    assert all(z.isfinite().all() for z in seen)


@torch.no_grad()
def test_hooks_of_the_user_count_and_stay() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    plain = suppression(model, text, SPANS, config=SPARSE, settings=KL, progress=False)

    def knock_out(scores: Tensor, hook: Any) -> Tensor:
        scores[:, 1, :, 12:15] = -torch.inf
        return scores

    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    edit: tuple[str, Any] = ("blocks.1.attn.hook_attn_scores", knock_out)
    with model.hooks(fwd_hooks=[edit]):
        edited = suppression(model, text, SPANS, config=SPARSE, settings=KL, progress=False)
        _, cache = model.run_with_sparse_cache(text, config=SPARSE)
    expected = suppressed_by_hand(model, text, [*mask_hooks(cache), edit], KL)
    assert gap(edited.effects[:, :-1].nan_to_num(0.0), expected[:, :-1].nan_to_num(0.0)) < 1e-9
    assert gap(plain.effects.nan_to_num(0.0), edited.effects.nan_to_num(0.0)) > 1e-6
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before


@torch.no_grad()
def test_the_model_is_left_as_it_was_after_errors_and_interrupts() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    logits = model(text)
    attributes = [set(vars(module)) for module in model.modules()]

    for error in (KeyboardInterrupt, RuntimeError):
        calls: list[int] = []

        def fail(x: Tensor, hook: Any, error: type = error, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise error
            return x

        with pytest.raises(error), model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", fail)]):
            suppression(model, text, SPANS, config=SPARSE, batch_size=1, progress=False)
        assert gap(model(text), logits) == 0
        assert [set(vars(module)) for module in model.modules()] == attributes


def test_derivations_are_traced_to_what_they_use(mini: Any) -> None:
    """The bundled model: suppress a derivation's antecedents, and the digit it states is what changes."""
    task = tl_stream.tasks.reasoning_trace(mini.tokenizer, 24, seed=0)
    derived = [each for each in task.sentences if each.kind == "derivation" and each.value_span]
    rows = [(each.value_span.start - 1, each.value_span.start) for each in derived if each.value_span]
    config = StreamConfig(block_q=1, block_k=1, k=32)
    found = suppression(mini, task.text, task.sentences, config=config, targets=rows, progress=False)
    hits = [set(found.top_sources(i, len(x.antecedents))) == set(x.antecedents) for i, x in enumerate(derived)]
    assert sum(hits) >= 0.9 * len(hits)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "sentences were none"),
        ([(3, 3), (4, 6)], r"sentences\[0\] was the empty span 3:3"),
        ([(3, 9), (50, 62)], r"sentences\[1\] was the span 50:62, outside the text's tokens 0:61"),
        ([(3, 9), (8, 12)], r"sentences\[1\] was the span 8:12, which begins before sentences\[0\] ends"),
        ([(20, 29), (8, 12)], "ascending spans"),
    ],
    ids=["none", "empty", "outside", "overlap", "order"],
)
def test_bad_spans(spans: list[Any], message: str) -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    _, cache = model.run_with_sparse_cache(text, config=SPARSE)
    for call in (
        lambda: sentence_matrix(cache, 0, spans),
        lambda: vertical_scores(cache, spans),
        lambda: suppression(model, text, spans, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_arguments() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    _, cache = model.run_with_sparse_cache(text, config=SPARSE)
    with pytest.raises(ValueError, match="sentences were 1; expected at least 2"):
        suppression(model, text, [(0, 61)])
    with pytest.raises(ValueError, match="sentences were 4 with a proximity of 4"):
        vertical_scores(cache, SPANS[:4])
    with pytest.raises(ValueError, match="sources was"):
        suppression(model, text, SPANS, sources=[7])
    with pytest.raises(ValueError, match="batch_size was 0"):
        suppression(model, text, SPANS, batch_size=0)
    with pytest.raises(ValueError, match="config=None"):
        suppression(model, text, SPANS, config=StreamConfig(forward="exact"))
    with pytest.raises(TypeError, match=r"text was \(2, 61\)"):
        suppression(model, tokens(61), SPANS)
    with pytest.raises(TypeError, match="sentences held 'a'"):
        Segments.of(["a"], 61)
    with pytest.raises(KeyError, match="layer was 7"):
        sentence_matrix(cache, 7, SPANS)
    with pytest.raises(ValueError, match="temperature was 0"):
        AnchorSettings(temperature=0)
    _, part = model.run_with_sparse_cache(text, config=SPARSE, pos_slice=slice(-8, None))
    with pytest.raises(ValueError, match="those of a whole text"):
        vertical_scores(part, SPANS)


# Resampling


TEXT = "The coin is heads. It was thrown well. So the answer is heads."
COINS = tuple(
    Sentence(TEXT[a:b], Span(0, 1), (a, b), rule_tag(TEXT[a:b])) for a, b in ((0, 18), (19, 38), (39, 62))
)  # fmt: skip


def toss(prefix: str, n: int) -> list[str]:
    """Heads or tails by turns, until the first sentence settles it. Every other throw is told in another way."""
    if "coin is" in prefix:
        return [" It was thrown well. heads", " Nobody saw the throw at all. heads"] * (n // 2)
    return [" The coin is heads. heads", " Somehow tails came up today. tails"] * (n // 2)


def test_importance_by_resampling() -> None:
    found = resampling_importance(TEXT, COINS, toss, lambda text: text.split()[-1], samples=20, metric="difference")
    assert [each.resampling for each in found.sentences] == [0.5, 0.0, 0.0]
    assert found.sentences[0].counterfactual == 1.0  # those that say something else all end in tails
    assert found.sentences[0].different == 10
    assert found.to_dataframe()["sentence"].tolist() == [0, 1, 2]
    kl = resampling_importance(TEXT, COINS, toss, lambda text: text.split()[-1], samples=20, progress=False)
    p, q = numpy.array([11, 11]) / 22, numpy.array([21, 1]) / 22
    assert kl.sentences[0].resampling == pytest.approx((p * numpy.log(p / q)).sum())


def test_an_own_metric_and_bad_ones() -> None:
    def by_heads(without: Counter[str], having: Counter[str]) -> float:
        return (having["heads"] - without["heads"]) / having.total()

    options: dict[str, Any] = {"samples": 4, "progress": False}
    args = TEXT, COINS, toss, lambda text: text.split()[-1]
    assert resampling_importance(*args, metric=by_heads, **options).sentences[0].resampling == 0.5
    with pytest.raises(ValueError, match=r"metric gave tensor.*expected one finite number"):
        resampling_importance(*args, metric=lambda a, b: torch.zeros(2), **options)
    with pytest.raises(ValueError, match="similarity gave nan"):
        resampling_importance(*args, similarity=lambda a, b: float("nan"), **options)
    with pytest.raises(ValueError, match="metric was 'tv'"):
        resampling_importance(*args, metric="tv", **options)
    with pytest.raises(ValueError, match="sampler gave 1"):
        resampling_importance(TEXT, COINS, lambda prefix, n: ["x"], args[3], **options)
    with pytest.raises(ValueError, match="answer found none"):
        resampling_importance(TEXT, COINS, toss, lambda text: None, **options)


@torch.no_grad()
def test_tables_and_plots() -> None:
    model, text = build("gqa"), tokens(61, batch=1)
    _, cache = model.run_with_sparse_cache(text, config=SPARSE)
    vertical = vertical_scores(cache, SPANS, settings=AnchorSettings(proximity=2))
    heads = receiver_heads(vertical)
    effects = suppression(model, text, SPANS, config=SPARSE, progress=False)
    assert len(vertical.to_dataframe()) == 3 * 4 * 7
    assert heads.to_dataframe()["is_receiver"].all()
    assert len(effects.to_dataframe()) == 7 * 6 / 2
    for result in (vertical, heads, effects):
        figure = result.plot()
        assert "plotly" in figure.to_html()
        assert result.exact_for in figure.layout.title.text

"""RULER's tasks for tokenizers of every common kind: exact lengths, spans that hold what they say, depths, answers."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers_zoo as zoo
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tl_stream.models import load_tokenizer
from tl_stream.tasks import (
    RULER,
    FrequencyTask,
    NeedleTask,
    Span,
    Task,
    TrackingTask,
    cwe,
    fwe,
    niah,
    niah_multikey_1,
    niah_multikey_2,
    niah_multikey_3,
    niah_multiquery,
    niah_multivalue,
    niah_single_2,
    score,
    vt,
)
from tl_stream.tasks.filler import essays

ENGLISH_MODEL = Path(__file__).parents[1] / "benchmarks" / "english" / "model"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerBase:
    match name:
        case "english":
            return AutoTokenizer.from_pretrained(ENGLISH_MODEL, local_files_only=True)
        case "bytes":
            return zoo.byte_pairs(257)
        case "byte pairs":
            return zoo.byte_pairs(700)
        case "pieces":
            return zoo.pieces()
        case "slow":
            return zoo.SlowCharacters()
    return load_tokenizer()


EVERY = ("english", "bytes", "byte pairs", "pieces", "slow")


@pytest.fixture(scope="module")
def english() -> PreTrainedTokenizerBase:
    return tokenizer_named("english")


def text_at(tokenizer: PreTrainedTokenizerBase, task: Task, span: Span) -> str:
    return str(tokenizer.decode(tokenizer(task.prompt)["input_ids"][span.slice])).strip()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task_name", RULER)
def test_every_task_has_the_asked_length_and_true_spans(name: str, task_name: str) -> None:
    tokenizer = tokenizer_named(name)
    for length in (1999, 3001):
        task = RULER[task_name](tokenizer, length, seed=length)
        ids = tokenizer(task.prompt)["input_ids"]
        assert len(ids) == length == task.length
        question = text_at(tokenizer, task, task.question)
        assert task.prompt.endswith(question.removesuffix("</s>"))
        prefix = text_at(tokenizer, task, task.answer_prefix)
        assert prefix.endswith(":")
        assert question.removesuffix("</s>").endswith(prefix)
        spans = sorted((*task.needles, *task.distractors, task.question), key=lambda span: span.start)
        assert all(before.stop <= after.start for before, after in pairwise(spans))
        _check_needles(tokenizer, task)
        assert score(task, f"It is {task.answer.upper()}.") == 1.0
        assert score(task, "I don't know.") == 0.0


def _check_needles(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """The text at every span is the needle that the answer needs, letter for letter."""
    found = [text_at(tokenizer, task, span) for span in task.needles]
    if isinstance(task, NeedleTask):
        keys = [key for key in task.keys for _ in range(len(task.needles) // len(task.keys))]
        assert len(found) == len(task.references) == len(keys) == len(task.values)
        for needle, key, value, span in zip(found, keys, task.references, task.values, strict=True):
            assert re.fullmatch(rf"One of the special magic (number|uuid)s for {key} is: {value}\.", needle)
            assert text_at(tokenizer, task, span) == value
        others = task.distractors[:: max(1, len(task.distractors) // 8)]
        for other in (text_at(tokenizer, task, span) for span in others):
            assert re.fullmatch(rf"One of the special magic (numbers|uuids) for [\w -]+ is: ([0-9]{{7}}|{UUID})\.", other)
            assert not any(f"for {key} is" in other for key in task.keys)
    elif isinstance(task, TrackingTask):
        hops = [f"VAR {b} = VAR {a}." for a, b in pairwise(task.variables)]
        assert found == [f"VAR {task.variables[0]} = {task.value}.", *hops]
    else:
        assert isinstance(task, FrequencyTask)
        assert Counter(found) == dict(zip(task.references, task.counts, strict=True))


def test_tasks_are_as_defined(english: PreTrainedTokenizerBase) -> None:
    """Keys, values, queries and haystacks of arXiv:2404.06654, appendix B."""
    make = {name: RULER[name](english, 2000, seed=1) for name in RULER}
    asked = {name: len(task.needles) for name, task in make.items() if name.startswith("niah")}
    assert asked == dict.fromkeys(asked, 1) | {"niah_multivalue": 4, "niah_multiquery": 4}
    assert len(make["niah_multikey_1"].distractors) == 3
    assert len(make["niah_multikey_2"].distractors) > 50
    assert len(make["niah_multikey_3"].distractors) > 15
    assert len(set(make["niah_multivalue"].references)) == 4
    assert re.fullmatch(UUID, make["niah_single_3"].answer)
    assert re.search(rf"for {UUID} is:$", make["niah_multikey_3"].prompt)
    assert "The grass is green. The sky is blue." in make["niah_single_1"].prompt
    assert len(make["vt"].needles) == 5
    for name in ("niah_single_2", "niah_multivalue"):
        assert sum(sentence in make[name].prompt for sentence in essays()) > 40
    assert make["niah_single_2"].prompt != niah_single_2(english, 2000, seed=2).prompt
    assert make["niah_single_2"] == niah_single_2(english, 2000, seed=1)


def test_needles_among_needles_have_keys_of_their_own(english: PreTrainedTokenizerBase) -> None:
    for length in (2000, 9000):  # the longer one takes more keys than there are words
        prompt = niah_multikey_2(english, length, depth=0.3, seed=5).prompt
        keys = re.findall(r"numbers for ([\w ]+) is: \d", prompt)
        assert len(keys) == len(set(keys)) > 80


@pytest.mark.parametrize("haystack", ["noise", "essays"])
def test_depths_place_needles(english: PreTrainedTokenizerBase, haystack: str) -> None:
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        task = niah(english, 6000, depth=depth, haystack=haystack, seed=4)
        assert abs(task.needle.start / 6000 - depth) < 0.04
        assert task.depths == (depth,)


def test_every_needle_has_a_depth_of_its_own(english: PreTrainedTokenizerBase) -> None:
    depths = [0.9, 0.1, 0.5, 0.3]
    for make in (niah_multivalue, niah_multiquery):
        task = make(english, 6000, depth=depths, seed=2)
        assert [round(span.start / 6000, 1) for span in task.needles] == depths
        together = make(english, 6000, depth=0.5, seed=2)
        assert together.needles[-1].stop - together.needles[0].start == sum(map(len, together.needles))
        assert len(set(make(english, 6000, seed=2).depths)) == 4
    task = niah_multikey_1(english, 6000, depth=depths, seed=2)
    assert [round(span.start / 6000, 1) for span in (*task.needles, *task.distractors)] == depths
    chain = vt(english, 6000, depth=[0.0, 0.2, 0.4, 0.6, 0.8], seed=2)
    assert [round(span.start / 6000, 1) for span in chain.needles] == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_frequent_words_are_the_most_frequent(english: PreTrainedTokenizerBase) -> None:
    for length in (1500, 5000, 40_000):
        task = cwe(english, length, seed=3)
        counts = Counter(re.findall(r"\d\. ([a-z]+)", task.prompt))
        (common, *_), (rare, *_) = sorted(counts.values(), reverse=True), sorted(counts.values())
        assert common == 10 * rare
        assert {word for word, count in counts.items() if count == common} == set(task.references)
        if length == 5000:
            assert (common, rare) == (30, 3)
    for length in (500, 5000, 40_000):
        task = fwe(english, length, seed=3)
        ranked = Counter(re.findall(r"\b[A-Z]{5}\b", task.prompt)).most_common(4)
        assert tuple(word for word, _ in ranked[:3]) == task.references
        assert ranked[2][1] > ranked[3][1]
        assert tuple(count for _, count in ranked[:3]) == task.counts


def test_the_bundled_tokenizer_writes_what_it_has_words_for() -> None:
    tokenizer = load_tokenizer()
    for make in (niah_multikey_1, niah_multivalue, niah_multiquery, niah_single_2):
        task = make(tokenizer, 700, haystack="noise", seed=3)
        ids = tokenizer(task.prompt)["input_ids"]
        assert len(ids) == 700
        assert tokenizer.unk_token_id not in ids
        _check_needles(tokenizer, task)
        with pytest.raises(ValueError, match=r"tokenizer: its vocabulary lacks \d+ words of this text: '\w+', .*'noise'"):
            make(tokenizer, 700, haystack="essays", seed=3)
        assert make(tokenizer, 700, seed=3).prompt == task.prompt
    for name in ("niah_single_3", "niah_multikey_3", "cwe", "fwe"):
        with pytest.raises(ValueError, match="tokenizer: its vocabulary lacks"):
            RULER[name](tokenizer, 2000)
    with pytest.raises(ValueError, match=r"lacks 2 words of this text: 'numbered', 'common'; expected"):
        niah(tokenizer, 700, haystack="We walk on the numbered hill. The sky is common.")


def test_own_text_serves_as_haystack() -> None:
    """Even with a tokenizer that knows no other words."""
    own = "Alpha beta gamma. Delta delta epsilon! Zeta eta theta iota kappa?"
    template = niah(load_tokenizer(), 400, seed=6).prompt
    tokenizer = zoo.words(f"{own} {template}".replace("So we walk", "").replace(" on", ""))
    for length in range(200, 230):
        task = niah(tokenizer, length, haystack=own, depth=0.5, seed=6)
        ids = tokenizer(task.prompt)["input_ids"]
        assert len(ids) == length
        assert tokenizer.unk_token_id not in ids
    assert task.prompt.count("Delta delta epsilon!") > 3


def test_text_without_sentences_is_cut(english: PreTrainedTokenizerBase) -> None:
    task = niah(english, 1000, haystack="word " * 5000, depth=0.5, seed=1)
    assert abs(task.needle.start / 1000 - 0.5) < 0.06


def test_every_length_is_met(english: PreTrainedTokenizerBase) -> None:
    for length in range(300, 380):
        assert len(english(niah_single_2(english, length, seed=length).prompt)["input_ids"]) == length


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: niah(t, 900, depth=[0.1, 0.2]), ValueError, "depth: got 2 depths; expected 1"),
        (lambda t: niah_multiquery(t, 900, depth=[]), ValueError, "depth: got 0 depths; expected 4"),
        (lambda t: niah_multikey_1(t, 900, depth=[0.1] * 3), ValueError, "expected 1 (the needles asked for) or 4 (all)"),
        (lambda t: niah_multivalue(t, 900, depth=[0, 0.5, 1, 1.1]), ValueError, "depth: 1.1 is outside 0..1"),
        (lambda t: vt(t, 900, depth=[0.5, 0.4, 0.6, 0.7, 0.8]), ValueError, "expected ascending depths"),
        (lambda t: niah(t, 900, values=0), ValueError, "values: got 0"),
        (lambda t: niah(t, 900, queries=2), ValueError, "queries: got 2; expected 1..1"),
        (lambda t: niah(t, 900, haystack="prose"), ValueError, "haystack: got 'prose'; expected 'noise', 'essays'"),
        (lambda t: niah(t, 900, haystack=" "), ValueError, "haystack: got a text without words"),
        (lambda t: cwe(t, 300), ValueError, "length: 300 tokens are too few"),
        (lambda t: fwe(t, 100), ValueError, "length: 100 tokens are too few"),
        (lambda t: niah_multikey_3(t, 100), ValueError, "length: 100 tokens are too few"),
    ],
)
def test_bad_input_is_named(english: PreTrainedTokenizerBase, make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(english)

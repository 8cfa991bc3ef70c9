"""The task generators: exact length, spans that hold what they say, known dependencies, determinism."""

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from transformers import PreTrainedTokenizerBase

from tl_stream.models.tokenizer import build_tokenizer
from tl_stream.tasks import Span, niah, niah_multikey_1, niah_single_1, reasoning_trace, variable_tracking


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(max_length=16384)


def text_at(tokenizer: PreTrainedTokenizerBase, text: str, span: Span) -> str:
    return str(tokenizer.decode(tokenizer(text)["input_ids"][span.slice]))


@pytest.mark.parametrize("length", [150, 257, 1000, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_prompts_have_exactly_the_asked_length(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
    for task in (
        niah_single_1(tokenizer, length, depth=0.3, seed=seed),
        niah_multikey_1(tokenizer, length, depth=0.3, haystack="noise", seed=seed),
        variable_tracking(tokenizer, length, seed=seed),
    ):
        ids = tokenizer(task.prompt)["input_ids"]
        assert len(ids) == length == task.length
        assert tokenizer.unk_token_id not in ids


def test_every_length_from_the_shortest_on_is_met(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"length: 10 tokens are too few; .* ask for \d+ or more") as error:
        niah_single_1(tokenizer, 10)
    shortest = int(re.findall(r"ask for (\d+)", str(error.value))[0])
    for length in range(shortest, shortest + 30):
        assert len(tokenizer(niah_single_1(tokenizer, length).prompt)["input_ids"]) == length
    with pytest.raises(ValueError, match="too few"):
        niah_single_1(tokenizer, shortest - 1)


@pytest.mark.parametrize("keys", [1, 4])
def test_needle_spans_hold_needles(tokenizer: PreTrainedTokenizerBase, keys: int) -> None:
    task = niah(tokenizer, 600, depth=0.7, keys=keys, seed=3)
    needle = f"One of the special magic numbers for {task.key} is: {task.answer}."
    assert text_at(tokenizer, task.prompt, task.needle) == needle
    assert text_at(tokenizer, task.prompt, task.value) == task.answer
    assert len(task.value) == len(task.answer) == 7
    question = text_at(tokenizer, task.prompt, task.question)
    assert question.startswith(f"What is the special magic number for {task.key}")
    assert question.endswith("is:")
    assert task.question.stop == task.length
    assert len(task.distractors) == keys - 1
    for span in task.distractors:
        distractor = text_at(tokenizer, task.prompt, span)
        assert re.fullmatch(r"One of the special magic numbers for \w+ is: \d{7}\.", distractor)
        assert f"for {task.key} " not in distractor
    assert task.score(f" {task.answer}.") == 1.0
    assert task.score(task.answer[:-1]) == 0.0


def test_the_answer_is_scored_not_what_stands_before_it(tokenizer: PreTrainedTokenizerBase) -> None:
    task, other = niah(tokenizer, 600, keys=4, seed=3), "1234567"
    right = task.answer
    question = f"What is the special magic number for {task.key} in the text above?"
    for output in (
        right,
        f"It is the number {right}.",
        f"{question} 1 of 4: {right}",
        f"{right}, not {other}",
        f"{right} {right}",
    ):
        assert task.score(output) == 1.0, output
    for output in ("", question, other, f"{other}, {right}", f"One of the numbers for lake is: {other}. {question} {right}"):
        assert task.score(output) == 0.0, output
    assert [output_part(f"It is {right}.", place) for place in task.given(f"It is {right}.")] == [right]
    several = niah(tokenizer, 600, values=2, seed=3)
    first, second = several.references
    for output, share in ((f"{second} {first}", 1.0), (f"{first} {first} {second}", 1.0), (f"{other} {first} {second}", 0.5)):
        assert several.score(output) == share, output


def output_part(output: str, place: range) -> str:
    return output[place.start : place.stop]


def test_depth_places_the_needle(tokenizer: PreTrainedTokenizerBase) -> None:
    starts = [niah(tokenizer, 2000, depth=step / 10, keys=4, seed=1).needle.start for step in range(11)]
    assert starts == sorted(starts)
    first, last = niah_single_1(tokenizer, 2000, depth=0.0), niah_single_1(tokenizer, 2000, depth=1.0)
    assert text_at(tokenizer, first.prompt, Span(1, first.needle.start)).endswith("ask you about them later.")
    assert last.needle.stop == last.question.start
    middle = niah_single_1(tokenizer, 2000, depth=0.5)
    assert abs(middle.needle.start / 2000 - 0.5) < 0.02


def test_tracking_spans_hold_the_chain(tokenizer: PreTrainedTokenizerBase) -> None:
    task = variable_tracking(tokenizer, 500, chains=2, hops=3, seed=4)
    names = task.variables
    expected = [f"VAR {names[0]} = {task.value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    assert [text_at(tokenizer, task.prompt, span) for span in task.assignments] == expected
    assert [span.start for span in task.assignments] == sorted(span.start for span in task.assignments)
    assert len(task.distractors) == 4
    assert not any(name in text_at(tokenizer, task.prompt, span) for name in names for span in task.distractors)
    assert task.answer.split() == list(names)
    assert task.score(f" {task.answer}.") == 1.0
    assert task.score(" ".join(names[:1])) == 0.25


@pytest.mark.parametrize("count", [8, 50, 200])
def test_trace_spans_tile_the_text(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    task = reasoning_trace(tokenizer, count, seed=5)
    ids = tokenizer(task.text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert len(task.sentences) == count
    assert task.sentences[0].span.start == 1  # after BOS
    assert all(a.span.stop == b.span.start for a, b in pairwise(task.sentences))
    assert task.sentences[-1].span.stop == len(ids)
    for sentence in task.sentences:
        assert text_at(tokenizer, task.text, sentence.span) == sentence.text
        assert (sentence.value is None) == (sentence.value_span is None)
        if sentence.value_span is not None:
            assert text_at(tokenizer, task.text, sentence.value_span) == sentence.value
    assert re.split(r"(?<=[.?!]) ", task.text) == [sentence.text for sentence in task.sentences]
    assert task.text == f"{task.prompt} {task.answer}."
    assert task.score(f" {task.answer}.") == 1.0


def test_traces_of_200_sentences_have_2048_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert min(len(tokenizer(reasoning_trace(tokenizer, 200, seed=s).text)["input_ids"]) for s in range(40)) >= 2048


ARITHMETIC: list[tuple[str, Callable[..., int]]] = [
    (r"larger of (\w+) and (\w+)", max),
    (r"gets (\d) more than (\w+),", lambda c, a: a + c),
    (r"take (\w+) and add (\d),", lambda a, c: a + c),
    (r"beats (\w+) by (\d),", lambda a, c: a + c),
    (r"gets (\d) fewer than (\w+),", lambda c, a: a - c),
    (r"take (\w+) and drop (\d),", lambda a, c: a - c),
    (r"trails (\w+) by (\d),", lambda a, c: a - c),
    (r"(?:as many as|level with) (\w+),", lambda a: a),
]


def test_values_follow_from_the_stated_antecedents(tokenizer: PreTrainedTokenizerBase) -> None:
    """Does the sums again from the sentences' wording alone."""
    task = reasoning_trace(tokenizer, 150, seed=6)
    stated: dict[str, tuple[int, int]] = {}  # name -> value, sentence
    for index, sentence in enumerate(task.sentences):
        if sentence.kind == "derivation":
            pattern, rule = next((p, f) for p, f in ARITHMETIC if re.search(p, sentence.text))
            words = re.findall(pattern, sentence.text)[0]
            words = (words,) if isinstance(words, str) else words
            used = [word for word in words if not word.isdigit()]
            operands = [int(word) if word.isdigit() else stated[word][0] for word in words]
            assert sentence.value == str(rule(*operands) % 10)
            assert sentence.antecedents == tuple(stated[name][1] for name in used)
        if sentence.kind in ("fact", "derivation"):
            name = re.findall(r"(\w+) has \d", sentence.text)[-1]
            assert name not in stated
            stated[name] = (int(sentence.value or ""), index)
        if sentence.kind in ("plan", "check"):
            (about,) = sentence.antecedents
            assert re.findall(r"(\w+) has \d", task.sentences[about].text)[-1] in sentence.text
    goal, (value, index) = list(stated.items())[-1]
    assert f"does {goal} have" in task.sentences[1].text
    assert (task.answer, task.sentences[-1].antecedents) == (str(value), (index,))


def test_traces_hold_all_kinds_of_sentences(tokenizer: PreTrainedTokenizerBase) -> None:
    kinds = [sentence.kind for sentence in reasoning_trace(tokenizer, 200, seed=7).sentences]
    assert set(kinds) == {"setup", "fact", "derivation", "plan", "check", "filler", "answer"}
    assert kinds.count("derivation") > 120


def test_the_seed_decides_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for make in (
        lambda seed: niah_multikey_1(tokenizer, 300, depth=0.4, haystack="noise", seed=seed),
        lambda seed: variable_tracking(tokenizer, 300, seed=seed),
        lambda seed: reasoning_trace(tokenizer, 30, seed=seed),
    ):
        assert make(1) == make(1)
        assert make(1).prompt != make(2).prompt


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: niah(t, 500, depth=1.5), "depth: 1.5 is outside 0..1"),
        (lambda t: niah(t, 500, depth=float("nan")), "depth: nan is outside 0..1"),
        (lambda t: niah(t, 500, keys=0), "keys: got 0; expected 1.."),
        (lambda t: niah_multikey_1(t, 60, haystack="noise"), "length: 60 tokens are too few"),
        (lambda t: variable_tracking(t, 30), "length: 30 tokens are too few"),
        (lambda t: variable_tracking(t, 500, hops=-1), "chains, hops: got 1 and -1"),
        (lambda t: variable_tracking(t, 5000, chains=99), "chains, hops: got 99 and 4"),
        (lambda t: reasoning_trace(t, 20, rule_weights=(0, 0, 0, 0)), "rule_weights: got (0, 0, 0, 0)"),
        (lambda t: reasoning_trace(t, 20, rule_weights=(1, 1)), "rule_weights: got (1, 1); expected 4 integers"),
        (lambda t: reasoning_trace(t, 3), "sentences: got 3; expected 8.."),
        (lambda t: reasoning_trace(t, 1000), "sentences: got 1000; expected 8.."),
    ],
)
def test_bad_input_is_named(tokenizer: PreTrainedTokenizerBase, make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tokenizer)

"""Reasoning traces whose dependencies are known: each sentence derives a value from named earlier sentences.

Every number is kept modulo 10, which the text says, so that a value is one digit.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.spans import Span, TokenIndex, join
from tl_stream.tasks.vocabulary import NAMES

SETUP = (
    "Everybody counts marbles and keeps only the last digit.",
    "How many marbles does {name} have in the end?",
)
FACTS = ("{name} has {value} marbles.", "{name} has {value} to begin with.", "We know that {name} has {value}.")
CONCLUSIONS = (", so {name} has {value}.", ", thus {name} has {value}.", ", which means that {name} has {value}.")
ANSWER = "So in the end {name} has {value}."
PLANS = ("Next we look at {a}.", "For the next step we need {a}.", "Now let us use {a} again.")
CHECKS = ("Wait, let me check {a} again.", "The step for {a} was right.", "Let me be sure about {a}.")
FILLERS = ("This takes a while.", "It is a long story.", "Good, we move on.", "Let us think step by step.")


@dataclass(frozen=True)
class Rule:
    """One way to derive a value: its wordings over names a, b and a constant c, and the arithmetic."""

    wordings: tuple[str, ...]
    antecedents: int
    compute: Callable[[int, int, int], int]


RULES = (
    Rule(
        ("{name} gets {c} more than {a}", "If we take {a} and add {c}", "{name} beats {a} by {c}"),
        1,
        lambda a, b, c: a + c,
    ),
    Rule(
        ("{name} gets {c} fewer than {a}", "If we take {a} and drop {c}", "{name} trails {a} by {c}"),
        1,
        lambda a, b, c: a - c,
    ),
    Rule(("{name} gets as many as {a}", "{name} is level with {a}"), 1, lambda a, b, c: a),
    Rule(
        ("{name} gets the larger of {a} and {b}", "The larger of {a} and {b} goes to {name}"),
        2,
        lambda a, b, c: max(a, b),
    ),
)
RULE_WEIGHTS = (3, 3, 2, 2)
MODULUS = 10
MAX_CONSTANT = 3

Kind = Literal["setup", "fact", "derivation", "plan", "check", "filler", "answer"]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a trace.

    `antecedents` are the indices of the earlier sentences that it needs: for a derivation and the answer those that
    state the values it uses, for a plan or a check the one that it speaks of. `value` is the digit that the sentence
    states last and `value_span` its tokens; both are None for sentences that state none.
    """

    text: str
    kind: Kind
    span: Span
    antecedents: tuple[int, ...]
    value: str | None
    value_span: Span | None


@dataclass(frozen=True)
class ReasoningTask:
    """A trace ended by the answer. `prompt` ends just before `answer`; `text` has both, and a full stop."""

    prompt: str
    answer: str
    text: str
    sentences: tuple[Sentence, ...]

    def score(self, output: str) -> float:
        """1.0 if the first word of `output` is the answer, else 0.0."""
        return float(output.strip()[:1] == self.answer)


@dataclass(frozen=True)
class _Draft:
    text: str
    kind: Kind
    antecedents: tuple[int, ...] = ()
    value: str | None = None
    name: str = ""


@dataclass(frozen=True)
class _Known:
    """A name, its value, and the sentence that states it."""

    name: str
    value: int
    sentence: int


def reasoning_trace(
    tokenizer: PreTrainedTokenizerBase,
    sentences: int = 50,
    *,
    rule_weights: tuple[int, ...] = RULE_WEIGHTS,
    seed: int = 0,
) -> ReasoningTask:
    """A trace of `sentences` sentences: the problem, given facts, derivations, plans, checks, filler, the answer.

    About one sentence in seven of the body is a fact, one in eight derives nothing. Half of the antecedents are among
    the last few derived values, the rest anywhere before; the answer is the value derived last.

    Args:
        tokenizer: spans count the tokens it gives by default for `text`.
        sentences: how many sentences in all, 8 or more.
        rule_weights: how often each of RULES is drawn: more, fewer, as many, the larger of two.
        seed: the same seed gives the same trace.

    Raises ValueError when there are too few sentences, more than there are names for, or weights that fit no rules.
    """
    if not 8 <= sentences <= len(NAMES):
        raise ValueError(f"sentences: got {sentences}; expected 8..{len(NAMES)}: the problem, facts, derivations, the answer")
    if len(rule_weights) != len(RULES) or min(rule_weights) < 0 or max(rule_weights) <= 0:
        raise ValueError(f"rule_weights: got {rule_weights}; expected {len(RULES)} integers >= 0, not all 0")
    drafts = _write(random.Random(seed), sentences, rule_weights)
    text, parts = join([draft.text for draft in drafts])
    tokens = TokenIndex(tokenizer, text)
    done = tuple(
        Sentence(
            text=draft.text,
            kind=draft.kind,
            span=tokens.span(part.start, part.stop),
            antecedents=draft.antecedents,
            value=draft.value,
            value_span=None if draft.value is None else tokens.span(*part.find(draft.value)),
        )
        for draft, part in zip(drafts, parts, strict=True)
    )
    answer = drafts[-1].value
    assert answer is not None
    return ReasoningTask(prompt=text[: text.rindex(f" {answer}")], answer=answer, text=text, sentences=done)


def _write(rng: random.Random, count: int, rule_weights: tuple[int, ...]) -> list[_Draft]:
    names = rng.sample(NAMES, len(NAMES))
    known: list[_Known] = []
    drafts = [_Draft(SETUP[0], "setup"), _Draft(SETUP[1], "setup")]
    while len(drafts) < count - 1:
        is_last = len(drafts) == count - 2
        draw = rng.random()
        if len(known) < 2 or (draw < 0.14 and not is_last):
            draft = _fact(rng, names.pop())
        elif draw < 0.26 and not is_last:
            draft = _aside(rng, known)
        else:
            draft = _derivation(rng, names.pop(), known, rule_weights)
        if draft.value is not None:
            known.append(_Known(draft.name, int(draft.value), len(drafts)))
        drafts.append(draft)
    goal = known[-1]
    drafts[1] = _Draft(SETUP[1].format(name=goal.name), "setup")
    answer = ANSWER.format(name=goal.name, value=goal.value)
    return [*drafts, _Draft(answer, "answer", (goal.sentence,), str(goal.value))]


def _fact(rng: random.Random, name: str) -> _Draft:
    value = str(rng.randrange(MODULUS))
    return _Draft(rng.choice(FACTS).format(name=name, value=value), "fact", value=value, name=name)


def _aside(rng: random.Random, known: list[_Known]) -> _Draft:
    kind: Kind = rng.choice(("plan", "check", "filler"))
    if kind == "filler":
        return _Draft(rng.choice(FILLERS), kind)
    about = _pick(rng, known)
    wording = rng.choice(PLANS if kind == "plan" else CHECKS)
    return _Draft(wording.format(a=about.name), kind, (about.sentence,))


def _derivation(rng: random.Random, name: str, known: list[_Known], rule_weights: tuple[int, ...]) -> _Draft:
    (rule,) = rng.choices(RULES, rule_weights)
    a = _pick(rng, known)
    b = _pick(rng, [other for other in known if other is not a])
    constant = rng.randint(1, MAX_CONSTANT)
    value = str(rule.compute(a.value, b.value, constant) % MODULUS)
    premise = rng.choice(rule.wordings).format(name=name, a=a.name, b=b.name, c=constant)
    text = premise + rng.choice(CONCLUSIONS).format(name=name, value=value)
    return _Draft(text, "derivation", tuple(used.sentence for used in (a, b)[: rule.antecedents]), value, name)


def _pick(rng: random.Random, known: list[_Known]) -> _Known:
    """One of the last eight as often as one from anywhere before: near and far dependencies."""
    return rng.choice(known[-8:] if rng.random() < 0.5 else known)

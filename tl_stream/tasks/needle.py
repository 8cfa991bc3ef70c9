"""Needles in a haystack, in the manner of RULER's niah tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.filler import sentences_of
from tl_stream.tasks.spans import Span
from tl_stream.tasks.task import Task
from tl_stream.tasks.text import Depth, build_haystack, given_depths
from tl_stream.tasks.vocabulary import KEYS

INTRO = "Some special magic numbers are hidden in the text below. I will ask you about them later."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
PREFIX = "One of the special magic numbers for {key} is:"
QUESTION = f"What is the special magic number for {{key}} in the text above? {PREFIX}"
PREFIX_FOR_SEVERAL = "The special magic numbers for {key} are:"
QUESTION_FOR_SEVERAL = f"What are all the special magic numbers for {{key}} in the text above? {PREFIX_FOR_SEVERAL}"
DIGITS = 7
_SHORTEST_NEEDLE = 10  # tokens

KeyKind = Literal["words", "uuids"]
ValueKind = Literal["numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class NeedleTask(Task):
    """A haystack with needles, some of which are asked for.

    Attributes:
        keys: What the asked needles are asked for by.
        depths: Where the asked needles lie in the haystack.
        values: Tokens of the value in each of the asked `needles`.
    """

    keys: tuple[str, ...]
    depths: tuple[float, ...]
    values: tuple[Span, ...]

    @property
    def key(self) -> str:
        """The first key."""
        return self.keys[0]

    @property
    def depth(self) -> float:
        """The first needle's depth."""
        return self.depths[0]

    @property
    def needle(self) -> Span:
        """The first asked needle: its whole sentence."""
        return self.needles[0]

    @property
    def value(self) -> Span:
        """The tokens of its value."""
        return self.values[0]

    def given(self, output: str) -> tuple[range, ...]:
        """The first values in an output that look like those asked for, as many as were asked for, each once.

        So a list of everything that the text hides is no answer to a question for one of them.
        """
        places: dict[str, range] = {}
        for match in re.finditer("|".join(map(_alike, self.references)), output, re.IGNORECASE):
            places.setdefault(match[0].lower(), range(*match.span()))
        return tuple(places.values())[: len(self.references)]


def _alike(value: str) -> str:
    """A pattern of numbers or uuids as long as one."""
    return "\\d" * len(value) if value.isdigit() else re.sub("[0-9a-f]", "[0-9a-f]", value)


def niah(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    depth: Depth = 0.5,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    haystack: str = "noise",
    key_kind: KeyKind = "words",
    value_kind: ValueKind = "numbers",
    seed: int = 0,
) -> NeedleTask:
    """Needles at chosen depths, each with a key and a value, some of which are asked for.

    Args:
        tokenizer: `length` and all spans count the tokens it gives by default, BOS included where it adds one.
        length: The exact number of tokens of the prompt.
        depth: Where the asked needles lie: the share of the haystack's sentences that comes before. One for all, a list
            (of the asked needles, or of all of them, the asked ones first), or None: random. Others lie at random.
        keys: How many keys there are.
        values: How many needles each key has, each with a value of its own.
        queries: How many of the keys are asked for.
        haystack: "noise" (a few sentences over and over), "essays" (prose of the package's own, from a random sentence on),
            "needles" (other keys, all of them distractors), or a text, repeated where it is too short.
        key_kind: Words or uuids.
        value_kind: Numbers of 7 digits or uuids.
        seed: The same seed gives the same text.

    Raises ValueError when the length is too short or can't be met exactly, a depth lies outside 0..1, there are too few or too
    many depths, a number or a kind is out of range, or the tokenizer lacks words; TypeError for a depth that is no number.
    """
    _check(keys, values, queries, key_kind, value_kind)
    rng = random.Random(seed)
    others = length // _SHORTEST_NEEDLE + 1 if haystack == "needles" else 0
    names = _names(rng, keys + others, key_kind)
    hidden = [(key, _value(rng, value_kind)) for key in names[:keys] for _ in range(values)]
    asked = queries * values
    depths = given_depths(depth, asked, len(hidden))
    depths += [rng.random() for _ in range(len(hidden) - len(depths))]
    texts = [_needle(key, value, value_kind) for key, value in hidden]
    if others:
        sentences: Sequence[str] = [_needle(key, _value(rng, value_kind), value_kind) for key in names[keys:]]
    else:
        sentences = sentences_of(haystack, rng.random())

    listed = _listed(names[:queries])
    question, prefix = (QUESTION, PREFIX) if asked == 1 else (QUESTION_FOR_SEVERAL, PREFIX_FOR_SEVERAL)
    tail = _worded(question, value_kind).format(key=listed)
    placed = list(zip(depths, texts, strict=True))
    built = build_haystack(tokenizer, length, _worded(INTRO, value_kind), placed, tail, sentences)
    tokens, references = built.tokens, tuple(value for _, value in hidden[:asked])
    return NeedleTask(
        prompt=built.text,
        answer=_listed(references),
        references=references,
        length=length,
        needles=tuple(tokens.part(part) for part in built.hidden[:asked]),
        distractors=tuple(tokens.part(part) for part in (*built.hidden[asked:], *(built.sentences if others else ()))),
        question=tokens.part(built.tail),
        answer_prefix=tokens.span(*built.tail.find(_worded(prefix, value_kind).format(key=listed))),
        keys=tuple(names[:queries]),
        depths=tuple(depths[:asked]),
        values=tuple(tokens.span(*part.find(value)) for part, value in zip(built.hidden, references, strict=False)),
    )


def _check(keys: int, values: int, queries: int, key_kind: str, value_kind: str) -> None:
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys: got {keys}; expected 1..{len(KEYS)}, the number of words needles can be named by")
    if values < 1:
        raise ValueError(f"values: got {values}; expected at least 1 needle for each key")
    if not 1 <= queries <= keys:
        raise ValueError(f"queries: got {queries}; expected 1..{keys}, the number of keys")
    for name, kind, kinds in (("key_kind", key_kind, ("words", "uuids")), ("value_kind", value_kind, ("numbers", "uuids"))):
        if kind not in kinds:
            raise ValueError(f"{name}: got {kind!r}; expected {' or '.join(map(repr, kinds))}")


def _names(rng: random.Random, count: int, kind: KeyKind) -> list[str]:
    """Different keys: words, two words each where there are not enough, or uuids."""
    if kind == "uuids":
        return [_uuid(rng) for _ in range(count)]
    if count <= len(KEYS):
        return rng.sample(KEYS, count)
    pairs = rng.sample(range(len(KEYS) * (len(KEYS) - 1)), count)
    chosen = [divmod(pair, len(KEYS) - 1) for pair in pairs]
    return [f"{KEYS[first]} {KEYS[second + (second >= first)]}" for first, second in chosen]


def _value(rng: random.Random, kind: ValueKind) -> str:
    return _uuid(rng) if kind == "uuids" else "".join(rng.choice("0123456789") for _ in range(DIGITS))


def _uuid(rng: random.Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def _needle(key: str, value: str, kind: ValueKind) -> str:
    return _worded(NEEDLE, kind).format(key=key, value=value)


def _worded(text: str, kind: ValueKind) -> str:
    return text.replace("number", kind.removesuffix("s"))


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last

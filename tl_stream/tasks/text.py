"""Texts of an exact token length, and where in the tokens each part of them lies."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.vocabulary import NOISE

STRETCH = "So we walk{}."
STRETCH_WORD = " on"
CORRECTIONS = 8


@dataclass(frozen=True)
class Span:
    """The half-open range of token positions `start <= position < stop`, special tokens such as BOS counted."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The same range, to index tokens or activations with."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """A sentence (or several) of a text under construction, with the character range it ended up at."""

    text: str
    start: int
    stop: int

    def find(self, piece: str) -> tuple[int, int]:
        """The character range of the last occurrence of `piece` in this part."""
        start = self.start + self.text.rindex(piece)
        return start, start + len(piece)


def join(sentences: Sequence[str]) -> tuple[str, list[Part]]:
    """The sentences joined by single spaces, and the character range of each."""
    parts, start = [], 0
    for sentence in sentences:
        parts.append(Part(sentence, start, start + len(sentence)))
        start += len(sentence) + 1
    return " ".join(sentences), parts


class TokenIndex:
    """Maps character ranges of one text to token spans.

    Tokens are those that `tokenizer(text)` gives by default, with whatever special tokens it adds.

    Raises ValueError for a tokenizer that does not know the characters its tokens come from (a "slow" one).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer "
                "(PreTrainedTokenizerFast); load it with AutoTokenizer.from_pretrained(...)"
            )
        encoding = tokenizer(text, return_offsets_mapping=True)
        self.ids: list[int] = encoding["input_ids"]
        ends = [(stop, i) for i, (start, stop) in enumerate(encoding["offset_mapping"]) if stop > start]
        self._stops = [stop for stop, _ in ends]
        self._positions = [i for _, i in ends]

    def span(self, start: int, stop: int) -> Span:
        """The tokens that hold the characters `start <= c < stop`."""
        first = bisect_left(self._stops, start + 1)
        last = bisect_left(self._stops, stop)
        return Span(self._positions[first], self._positions[last] + 1)


@dataclass(frozen=True)
class Haystack:
    """A text of exact token length: head, noise with sentences hidden in it, tail."""

    text: str
    tokens: TokenIndex
    hidden: tuple[Part, ...]
    tail: Part


def build_haystack(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    head: str,
    hidden: Sequence[tuple[float, str]],
    tail: str,
) -> Haystack:
    """Hides sentences among repeated noise sentences so that the whole has exactly `length` tokens.

    `hidden` holds (depth, sentence) pairs: depth 0 is before the first noise sentence, 1 after the last. What whole
    noise sentences leave over is made up by stretching one last noise sentence word by word.

    Raises ValueError when `length` is too short for head, tail and hidden sentences, or cannot be met exactly
    with this tokenizer.
    """
    for depth, _ in hidden:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth: {depth} is outside 0..1; 0 puts the sentence first in the noise and 1 last")

    costs = _Costs(tokenizer)
    fixed = len(tokenizer(" ".join([head, *(sentence for _, sentence in hidden), tail]))["input_ids"])
    if length < fixed + costs.stretch:
        raise ValueError(
            f"length: {length} tokens are too few; beginning, hidden sentences and question alone take {fixed}; "
            f"ask for {fixed + costs.stretch} or more"
        )
    room = length - fixed
    for _ in range(CORRECTIONS):
        haystack = _assemble(tokenizer, head, costs.noise(room), hidden, tail)
        error = length - len(haystack.tokens.ids)
        if error == 0:
            return haystack
        room += error
    raise ValueError(f"length: found no noise that gives exactly {length} tokens with this tokenizer; try another")


class _Costs:
    """What the noise sentences cost in tokens, each taken alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        special = len(tokenizer("")["input_ids"])
        self.sentences = [len(tokenizer(sentence)["input_ids"]) - special for sentence in NOISE]
        self.stretch = len(tokenizer(STRETCH.format(""))["input_ids"]) - special

    def noise(self, room: int) -> list[str]:
        """Noise sentences in turn as long as there is room, then a stretched one that takes what is left."""
        noise: list[str] = []
        while room - (cost := self.sentences[len(noise) % len(NOISE)]) >= self.stretch:
            noise.append(NOISE[len(noise) % len(NOISE)])
            room -= cost
        return [*noise, STRETCH.format(STRETCH_WORD * (room - self.stretch))]


def _assemble(
    tokenizer: PreTrainedTokenizerBase, head: str, noise: list[str], hidden: Sequence[tuple[float, str]], tail: str
) -> Haystack:
    order = sorted(range(len(hidden)), key=lambda i: hidden[i][0])
    sentences, places, done = [head], {}, 0
    for i in order:
        before = round(hidden[i][0] * len(noise))
        sentences += noise[done:before]
        done = before
        places[i] = len(sentences)
        sentences.append(hidden[i][1])
    text, parts = join([*sentences, *noise[done:], tail])
    hidden_parts = tuple(parts[places[i]] for i in range(len(hidden)))
    return Haystack(text, TokenIndex(tokenizer, text), hidden_parts, parts[-1])

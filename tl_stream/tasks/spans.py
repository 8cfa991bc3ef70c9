"""Where in the tokens of a text its parts lie."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase


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

    Tokens are those that `tokenizer(text)` gives by default, with whatever special tokens it adds. A fast tokenizer says
    which characters each token comes from. With another, the text is tokenized once more up to each end of a range: O(T) a
    span, and it takes for granted that tokens don't reach over the spaces that parts are joined by.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self._tokenizer, self._text = tokenizer, text
        encoding = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
        self.ids: list[int] = encoding["input_ids"]
        if tokenizer.is_fast:
            places = [(start, stop, i) for i, (start, stop) in enumerate(encoding["offset_mapping"]) if stop > start]
            self._starts = [start for start, _, _ in places]
            self._stops = [stop for _, stop, _ in places]
            self._positions = [i for _, _, i in places]

    def span(self, start: int, stop: int) -> Span:
        """The tokens that hold the characters `start <= c < stop`."""
        if not self._tokenizer.is_fast:
            return Span(self._tokens_before(start), self._tokens_before(stop))
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop) - 1
        return Span(self._positions[first], self._positions[last] + 1)

    def part(self, part: Part) -> Span:
        """The tokens of a part."""
        return self.span(part.start, part.stop)

    def _tokens_before(self, character: int) -> int:
        ids = self._tokenizer(self._text[:character].rstrip())["input_ids"]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.ids, strict=False)))

"""What fills a text between its needles: sentences in turn, and a last one that is stretched token by token."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import cycle

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.vocabulary import NOISE

STRETCH = "So we walk{}."
STRETCH_WORD = " on"
_PIECES = (STRETCH_WORD, " so", " a", " .", "!", ".", "o", "k")
_TRIED = 13
_LONGEST = 40


@cache
def essays() -> tuple[str, ...]:
    """The sentences of the essays that come with the package."""
    return split((files("tl_stream.tasks") / "essays.txt").read_text(encoding="utf-8"))


def split(text: str) -> tuple[str, ...]:
    """The sentences of a text; longer ones than 40 words are cut.

    Raises ValueError for a text without words.
    """
    words = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s", text)]
    parts = [sentence[i : i + _LONGEST] for sentence in words for i in range(0, len(sentence), _LONGEST)]
    if not parts:
        raise ValueError("haystack: got a text without words; expected sentences to hide needles in")
    return tuple(" ".join(part) for part in parts)


def sentences_of(haystack: str, start: float) -> tuple[str, ...]:
    """The sentences of a haystack: "noise", "essays" (from a sentence on that `start`, 0..1, tells), or a text.

    Raises ValueError for a word that names none.
    """
    match haystack:
        case "noise":
            return NOISE
        case "essays":
            first = int(start * len(essays()))
            return essays()[first:] + essays()[:first]
    if re.fullmatch(r"\w+", haystack):
        raise ValueError(f"haystack: got {haystack!r}; expected 'noise', 'essays', or a text to hide needles in")
    return split(haystack)


def essays_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """ "essays", or "noise" where the tokenizer lacks words for those."""
    return "noise" if _has_unknown(tokenizer, " ".join(essays())) else "essays"


@dataclass(frozen=True)
class Stretch:
    """A last sentence that takes as many tokens as are left over: `cost` and one more for every `piece` in it."""

    template: str
    piece: str
    cost: int

    def text(self, pieces: int) -> str:
        """The sentence with so many pieces."""
        return self.template.format(self.piece * pieces)


class Filler:
    """Fills a number of tokens with sentences.

    Raises ValueError where the tokenizer has nothing that takes one token at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]):
        self._costs = list(zip(sentences, _costs(tokenizer, sentences), strict=True))
        is_noise = sentences is NOISE or _has_unknown(tokenizer, " ".join(NOISE))
        self._short = [] if is_noise else list(zip(NOISE, _costs(tokenizer, NOISE), strict=True))
        self.stretch = _find_stretch(tokenizer, sentences)
        self.longest = max(cost for _, cost in self._costs)

    def fill(self, room: int) -> tuple[list[str], list[str], int]:
        """Sentences in turn as long as there is room, then short ones likewise, then the pieces to stretch the last one by."""
        own, room = _take(cycle(self._costs), room, self.stretch.cost)
        short, room = _take(cycle(self._short), room, self.stretch.cost)
        return own, short, room - self.stretch.cost


def _take(costs: Iterator[tuple[str, int]], room: int, spare: int) -> tuple[list[str], int]:
    taken = []
    for sentence, cost in costs:
        if room - cost < spare:
            break
        taken.append(sentence)
        room -= cost
    return taken, room


def _costs(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> list[int]:
    """Tokens that each sentence takes in the middle of a text."""
    once = tokenizer(list(sentences))["input_ids"]
    twice = tokenizer([f"{sentence} {sentence}" for sentence in sentences])["input_ids"]
    return [max(1, len(both) - len(one)) for one, both in zip(once, twice, strict=True)]


def _find_stretch(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> Stretch:
    words = dict.fromkeys(re.findall(r"\w+", " ".join(sentences[:_LONGEST])))
    before = len(tokenizer(sentences[0])["input_ids"])
    for template, piece in _stretches(words):
        texts = [f"{sentences[0]} {template.format(piece * pieces)}" for pieces in range(_TRIED)]
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        grows_by_one = lengths == list(range(lengths[0], lengths[0] + _TRIED))
        if grows_by_one and not _has_unknown(tokenizer, template.format(piece)):
            return Stretch(template, piece, lengths[0] - before)
    raise ValueError(
        "tokenizer: found no word or mark that takes one token wherever it is repeated, so no text has an exact length; "
        "expected one that knows a word of the haystack, or the letter 'o'"
    )


def _stretches(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Templates of last sentences and what to repeat in them: first the usual one, then made of the haystack's own words."""
    for piece in _PIECES:
        yield STRETCH, piece
    for word in words:
        yield f"{word}{{}}.", f" {word}"
        yield f"{word}{{}}", f" {word}"


def _has_unknown(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    unknown = tokenizer.unk_token_id  # GPT-2's is its BOS, too
    return unknown is not None and unknown in tokenizer(text, add_special_tokens=False)["input_ids"]


def check_known(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raises ValueError where the tokenizer has no token for some word of a text, and names the first of them."""
    if not _has_unknown(tokenizer, text):
        return
    words = [word for word in dict.fromkeys(text.split()) if _has_unknown(tokenizer, word)]
    named = ", ".join([*(repr(word.strip(".,:?!")) for word in words[:8]), *(["..."] if len(words) > 8 else [])])
    raise ValueError(
        f"tokenizer: its vocabulary lacks {len(words)} words of this text: {named}; expected one that "
        "can write them all. Take another tokenizer, or a task or haystack in words that this one has, such as 'noise'"
    )

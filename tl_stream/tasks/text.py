"""Texts of an exact token length with sentences hidden in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.filler import Filler, check_known
from tl_stream.tasks.spans import Part, TokenIndex, join
from tl_stream.tasks.vocabulary import NOISE

CORRECTIONS = 8

Depth = float | int | Sequence[float | int] | None
"""Where needles lie in a haystack: one place for all, a place for each, or None, at random. 0: before all else, 1: after."""


@dataclass(frozen=True)
class Haystack:
    """A text of exact token length: head, sentences with others hidden among them, tail."""

    text: str
    tokens: TokenIndex
    head: Part
    hidden: tuple[Part, ...]
    sentences: tuple[Part, ...]
    tail: Part


def build_haystack(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    head: str,
    hidden: Sequence[tuple[float, str]],
    tail: str,
    sentences: Sequence[str] = NOISE,
) -> Haystack:
    """Hides sentences among others, repeated as often as it takes, so that the whole has exactly `length` tokens.

    `hidden` holds (depth, sentence) pairs: that share of the other sentences comes before. What whole sentences leave over
    is made up by short ones, and by stretching a last one token by token.

    Raises ValueError when a depth lies outside 0..1, when `length` is too short for head, tail and hidden sentences, when it
    can't be met exactly with this tokenizer, and when the tokenizer lacks words.
    """
    for depth, _ in hidden:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth: {depth} is outside 0..1; 0 puts the sentence before all else and 1 last")

    filler = Filler(tokenizer, sentences)
    fixed = len(tokenizer(" ".join([head, *(sentence for _, sentence in hidden), tail]))["input_ids"])
    if length < fixed + filler.stretch.cost:
        raise ValueError(
            f"length: {length} tokens are too few; beginning, hidden sentences and question alone take {fixed}; "
            f"ask for {fixed + filler.stretch.cost} or more"
        )
    room = length - fixed
    own, short, pieces = filler.fill(room)
    for _ in range(CORRECTIONS):
        last = " ".join([*short, filler.stretch.text(pieces)])
        haystack = _assemble(tokenizer, head, [*own, last], hidden, tail)
        error = length - len(haystack.tokens.ids)
        if error == 0:
            check_known(tokenizer, haystack.text)
            return haystack
        room += error
        if 0 <= pieces + error < filler.longest:
            pieces += error
        else:
            own, short, pieces = filler.fill(max(room, filler.stretch.cost))
    raise ValueError(f"length: found no noise that gives exactly {length} tokens with this tokenizer; try another")


def _assemble(
    tokenizer: PreTrainedTokenizerBase, head: str, sentences: list[str], hidden: Sequence[tuple[float, str]], tail: str
) -> Haystack:
    order = sorted(range(len(hidden)), key=lambda i: hidden[i][0])
    texts, places, done = [head], {}, 0
    for i in order:
        before = round(hidden[i][0] * len(sentences))
        texts += sentences[done:before]
        done = before
        places[i] = len(texts)
        texts.append(hidden[i][1])
    text, parts = join([*texts, *sentences[done:], tail])
    hidden_parts = tuple(parts[places[i]] for i in range(len(hidden)))
    others = sorted(set(range(1, len(parts) - 1)) - set(places.values()))[:-1]  # the last one is no whole sentence
    return Haystack(text, TokenIndex(tokenizer, text), parts[0], hidden_parts, tuple(parts[i] for i in others), parts[-1])


def given_depths(depth: Depth, needles: int, most: int) -> list[float]:
    """The depths that a user has chosen, for at least so many needles unless for none (None).

    Raises TypeError for what is no number, ValueError for a list that is too short or too long.
    """
    if depth is None:
        return []
    depths = list(depth) if isinstance(depth, Sequence) and not isinstance(depth, str) else [depth] * needles
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in depths):
        raise TypeError(f"depth: got {depth!r}; expected a number in 0..1, a list of them, or None for random places")
    if len(depths) not in (needles, most):
        choice = f"{needles}" if needles == most else f"{needles} (the needles asked for) or {most} (all)"
        raise ValueError(f"depth: got {len(depths)} depths; expected {choice}")
    return [float(each) for each in depths]

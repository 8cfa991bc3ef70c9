"""`sentences`: a text cut into sentences, each with its characters, its tokens and a tag."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_stream.analysis.checks import check_one_text
from tl_stream.analysis.tags import rule_tag
from tl_stream.tasks.spans import Span, TokenIndex

Range = tuple[int, int]
Splitter = Callable[[str], list[Range]]
_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_END = re.compile(r"(?<=[.?!])(?=[ \n])|\n\s*\n")
_SHORTEST = 10


@dataclass(frozen=True)
class Sentence:
    """One sentence of a text.

    Attributes:
        text: What it says.
        span: Its tokens, BOS counted.
        chars: Its characters, `start <= c < stop`.
        tag: What the tagger called it.
    """

    text: str
    span: Span
    chars: Range
    tag: str


def paper_split(text: str) -> list[Range]:
    """The paper's rule, as character ranges (Bogdan et al. 2025, arXiv:2506.19143).

    Between `<think>` and `</think>` where there are both, else everywhere: cut after `.`, `?` or `!` before a space or a
    newline, and at blank lines; a piece of less than 10 characters joins the next (the last one, the one before).
    """
    thinking = _THINKING.search(text)
    start, stop = thinking.span(1) if thinking else (0, len(text))
    cuts = [start, *(match.start() for match in _END.finditer(text, start, stop)), stop]
    pieces: list[Range] = []
    begin = start
    for cut in cuts[1:]:
        piece = _stripped(text, begin, cut)
        if piece[1] - piece[0] >= _SHORTEST:
            pieces.append(piece)
            begin = cut
    last = _stripped(text, begin, stop)
    if last[1] > last[0]:
        pieces[-1:] = [(pieces[-1][0] if pieces else last[0], last[1])]
    return pieces


def line_split(text: str) -> list[Range]:
    """Every line that isn't blank, as character ranges."""
    lines = (_stripped(text, *match.span()) for match in re.finditer(r"[^\n]+", text))
    return [line for line in lines if line[1] > line[0]]


def sentences(
    text: str | Int[Tensor, "1 pos"],
    model: Any,
    *,
    split: Splitter | Sequence[Range] = paper_split,
    tagger: Callable[[str], str] = rule_tag,
) -> tuple[Sentence, ...]:
    """Cut a text into sentences.

    Args:
        text: The text, or its tokens (which have to be those that its decoding gives again).
        model: The model that reads it, or a fast tokenizer; spans count the tokens that `model.to_tokens(text)` (or
            `tokenizer(text)`) gives.
        split: The paper's rule, `line_split`, a function from a text to character ranges, or the ranges themselves.
        tagger: From a sentence's text to its tag.

    Raises:
        TypeError: Neither text nor tokens of one text.
        ValueError: No sentence, a range that is empty, out of order or outside the text, tokens that decoding and encoding
            don't give back, or a tokenizer without character offsets.
    """
    tokenizer = getattr(model, "tokenizer", model)
    written = text if isinstance(text, str) else _decoded(text, tokenizer)
    index = TokenIndex(tokenizer, written)
    read = _tokens(text, written, model, index)
    shift = _shift(read, index.ids)
    ranges = split(written) if callable(split) else list(split)
    _check(ranges, len(written))
    found: list[Sentence] = []
    for start, stop in ranges:
        span = index.span(start, stop)
        first = max(span.start + shift, found[-1].span.stop if found else 0)  # a token can hold two sentences' characters
        if first < span.stop + shift:
            piece = written[start:stop]
            found.append(Sentence(piece, Span(first, span.stop + shift), (start, stop), tagger(piece)))
    return tuple(found)


def _stripped(text: str, start: int, stop: int) -> Range:
    """The range without the white space at its ends."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, start + len(piece.strip()))


def _decoded(tokens: Any, tokenizer: Any) -> str:
    check_one_text(tokens)
    return tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)


def _tokens(text: Any, written: str, model: Any, index: TokenIndex) -> list[int]:
    """What the model reads."""
    if isinstance(text, Tensor):
        return text[0].tolist()
    return model.to_tokens(written, truncate=False)[0].tolist() if hasattr(model, "to_tokens") else index.ids


def _shift(read: list[int], ids: list[int]) -> int:
    """How far the model's tokens are behind the tokenizer's: a BOS that only one of them has."""
    shift = len(read) - len(ids)
    if read[max(0, shift) :] != ids[max(0, -shift) :]:
        raise ValueError(
            f"text was read as {len(read)} tokens, but encodes to {len(ids)} others; expected the same but for a BOS. Pass the "
            "text instead of its tokens, or token spans of your own to the analysis."
        )
    return shift


def _check(ranges: Sequence[Range], length: int) -> None:
    if not ranges:
        raise ValueError("text held no sentence; expected at least one. (split found none.)")
    before = 0
    for start, stop in ranges:
        if not before <= start < stop <= length:
            raise ValueError(
                f"split gave the characters {start}:{stop} after {before}; expected ascending ranges, none empty, within the "
                f"text's {length} characters."
            )
        before = stop

"""Needle in a haystack of noise, in the manner of RULER's niah tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.text import Span, build_haystack
from tl_stream.tasks.vocabulary import KEYS

INTRO = "Some special magic numbers are hidden in the text below. I will ask you about them later."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} in the text above? One of the special magic numbers for {key} is:"
DIGITS = 7


@dataclass(frozen=True)
class NeedleTask:
    """A haystack with one needle that is asked for.

    `prompt` has exactly `length` tokens (BOS included) and ends just before `answer`. `needle` is the whole needle
    sentence, `value` the tokens of its number, `distractors` the needles with other keys, `question` everything from
    the question to the end of the prompt.
    """

    prompt: str
    answer: str
    length: int
    depth: float
    key: str
    needle: Span
    value: Span
    distractors: tuple[Span, ...]
    question: Span

    def score(self, output: str) -> float:
        """1.0 if `output` holds the number, else 0.0 (RULER's string match)."""
        return float(self.answer in output)


def niah(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: float = 0.5, keys: int = 1, seed: int = 0) -> NeedleTask:
    """A needle at a chosen depth, with `keys - 1` needles for other keys at random depths.

    Args:
        tokenizer: a fast tokenizer; `length` and all spans count the tokens it gives by default.
        length: the exact number of tokens of the prompt.
        depth: where the needle lies in the noise: 0 before its first sentence, 1 after its last.
        keys: how many needles there are in all, each with its own key and number.
        seed: the same seed gives the same text.

    Raises ValueError when the length is too short, the depth outside 0..1 or `keys` out of range.
    """
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys: got {keys}; expected 1..{len(KEYS)}, the number of words needles can be named by")
    rng = random.Random(seed)
    names = rng.sample(KEYS, keys)
    values = ["".join(rng.choice("0123456789") for _ in range(DIGITS)) for _ in names]
    depths = [depth, *(rng.random() for _ in names[1:])]
    sentences = [NEEDLE.format(key=key, value=value) for key, value in zip(names, values, strict=True)]
    hidden = list(zip(depths, sentences, strict=True))
    haystack = build_haystack(tokenizer, length, INTRO, hidden, QUESTION.format(key=names[0]))
    spans = [haystack.tokens.span(part.start, part.stop) for part in haystack.hidden]
    return NeedleTask(
        prompt=haystack.text,
        answer=values[0],
        length=length,
        depth=depth,
        key=names[0],
        needle=spans[0],
        value=haystack.tokens.span(*haystack.hidden[0].find(values[0])),
        distractors=tuple(spans[1:]),
        question=haystack.tokens.span(haystack.tail.start, haystack.tail.stop),
    )


def niah_single_1(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: float = 0.5, seed: int = 0) -> NeedleTask:
    """One needle among noise sentences (RULER's niah_single_1); see `niah`."""
    return niah(tokenizer, length, depth=depth, keys=1, seed=seed)


def niah_multikey_1(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: float = 0.5, seed: int = 0) -> NeedleTask:
    """Four needles with different keys, one asked for (RULER's niah_multikey_1, here in noise); see `niah`."""
    return niah(tokenizer, length, depth=depth, keys=4, seed=seed)

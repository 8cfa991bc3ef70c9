"""Which words come up most, in the manner of RULER's cwe and fwe tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.filler import Filler
from tl_stream.tasks.task import Task
from tl_stream.tasks.text import build_haystack
from tl_stream.tasks.vocabulary import CODES, KEYS, NOISE

CWE_INTRO = "Here is a numbered list of words. A few of them come up far more often than the rest; I will ask for those later."
CWE_PREFIX = "The {count} words that come up most often are:"
CWE_QUESTION = f"Which {{count}} words come up most often in the list above? {CWE_PREFIX}"
CWE_WORDS = 10
CWE_TIMES = 3
CWE_RATIO = 10
CWE_FEWEST = 10

FWE_INTRO = "Here is a text in coded words, with dots in between that mean nothing. I will ask which words are frequent."
FWE_PREFIX = "The {count} most frequent coded words are:"
FWE_QUESTION = f"Leave the dots aside. What are the {{count}} most frequent coded words in the text above? {FWE_PREFIX}"
FWE_WORDS = 3
FWE_DOTS = "..."
FWE_EXPONENT = 2.0


@dataclass(frozen=True, kw_only=True)
class FrequencyTask(Task):
    """A list of words, of which the most frequent are asked for. `needles` are all places where those stand, in order.

    Attributes:
        counts: How often each of the `references` stands in the list.
    """

    counts: tuple[int, ...]


def cwe(tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0) -> FrequencyTask:
    """A numbered list in which ten words come up ten times as often as the others (RULER's cwe: 30 times and 3 times).

    In long lists, which have more places than there are words for, all come up more often, in short ones less, in the same
    ratio. What the list leaves over is filled with noise between it and the question.

    Args:
        tokenizer: `length` and all spans count the tokens it gives by default.
        length: The exact number of tokens of the prompt.
        seed: The same seed gives the same text.

    Raises ValueError when the length is too short or can't be met exactly, or the tokenizer lacks words.
    """

    def draw(places: int) -> tuple[list[str], list[str]]:
        rng = random.Random(seed)
        words = rng.sample(KEYS, len(KEYS))
        common, others = words[:CWE_WORDS], words[CWE_WORDS:]
        times = next((t for t in range(CWE_TIMES, 0, -1) if _others(places, t) >= CWE_FEWEST), 0)
        while _others(places, times) > len(others):
            times += 1
        listed = common * (CWE_RATIO * times) + others[: _others(places, times)] * times
        rng.shuffle(listed)
        return common, [f"{number}. {word}" for number, word in enumerate(listed, 1)]

    fewest = CWE_WORDS * CWE_RATIO + CWE_FEWEST
    return _build(tokenizer, length, CWE_INTRO, CWE_QUESTION, CWE_PREFIX, draw, fewest)


def _others(places: int, times: int) -> int:
    """How many other words the list has places for when each comes up so often."""
    return (places - CWE_WORDS * CWE_RATIO * times) // times if times else 0


def fwe(tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0) -> FrequencyTask:
    """Coded words, the r-th of them about r^-2 as frequent as the first, which are dots; the next three are asked for.

    That is RULER's fwe (a Zeta distribution of exponent 2), but with the expected frequencies themselves, so that the answer is
    the only one. What the words leave over is filled with noise between them and the question.

    Args:
        tokenizer: `length` and all spans count the tokens it gives by default.
        length: The exact number of tokens of the prompt.
        seed: The same seed gives the same text.

    Raises ValueError when the length is too short or can't be met exactly, or the tokenizer lacks words.
    """

    def draw(places: int) -> tuple[list[str], list[str]]:
        rng = random.Random(seed)
        words = [FWE_DOTS, *rng.sample(CODES, len(CODES))]
        shares = [rank**-FWE_EXPONENT for rank in range(1, len(words) + 1)]
        counts = [int(places * share / sum(shares)) for share in shares]
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        listed += [FWE_DOTS] * (places - len(listed))
        rng.shuffle(listed)
        return words[1 : 1 + FWE_WORDS], listed

    fewest = 100  # places, of which the dots take 60 or so, the words asked for 15, 6 and 3, the next one 2
    return _build(tokenizer, length, FWE_INTRO, FWE_QUESTION, FWE_PREFIX, draw, fewest)


def _build(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    intro: str,
    question: str,
    prefix: str,
    draw: Callable[[int], tuple[list[str], list[str]]],
    fewest: int,
) -> FrequencyTask:
    """The longest list that fits. `draw` gives the words asked for, and as many entries as there are places."""
    common, entries = draw(fewest)
    tail, prefix = (wording.format(count=len(common)) for wording in (question, prefix))

    def size(places: int) -> int:
        return len(tokenizer(" ".join([intro, *draw(places)[1], tail]))["input_ids"])

    spare = Filler(tokenizer, NOISE).stretch.cost
    low, high = fewest, max(fewest + 1, length)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) + spare <= length else (low, middle)
    common, entries = draw(low)
    head = " ".join([intro, *entries])
    built = build_haystack(tokenizer, length, head, [], tail)
    named = re.compile(rf"\b({'|'.join(common)})\b")
    places = list(named.finditer(built.head.text, len(intro)))
    return FrequencyTask(
        prompt=built.text,
        answer=", ".join(common),
        references=tuple(common),
        length=length,
        needles=tuple(built.tokens.span(*match.span()) for match in places),
        distractors=(),
        question=built.tokens.part(built.tail),
        answer_prefix=built.tokens.span(*built.tail.find(prefix)),
        counts=tuple(sum(match.group() == word for match in places) for word in common),
    )

"""Variable tracking, in the manner of RULER's vt task (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.filler import sentences_of
from tl_stream.tasks.spans import Span
from tl_stream.tasks.task import Task
from tl_stream.tasks.text import Depth, build_haystack, given_depths
from tl_stream.tasks.vocabulary import VARIABLES

INTRO = "Track the chain of variable assignment hidden in the text below."
FIRST = "VAR {name} = {value}."
HOP = "VAR {name} = VAR {source}."
PREFIX = "By the chain of variable assignment, the variables that are assigned the value {value} are:"
QUESTION = f"Find all variables that are assigned the value {{value}} in the text above. {PREFIX}"
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class TrackingTask(Task):
    """A haystack with chains of assignments, one of which is asked for.

    The answer names the variables of the asked chain in order, separated by spaces. `needles` are the sentences of that
    chain in order, so that each needs the one before it; `distractors` are those of the other chains.

    Attributes:
        value: The number that is asked for.
    """

    value: str

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables of the asked chain, in order."""
        return self.references

    @property
    def assignments(self) -> tuple[Span, ...]:
        """The needles."""
        return self.needles


def variable_tracking(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    chains: int = 1,
    hops: int = 4,
    depth: Depth = None,
    haystack: str = "noise",
    seed: int = 0,
) -> TrackingTask:
    """Chains `VAR A = 12345`, `VAR B = VAR A`, ... in order at depths of the haystack; which hold the first value?

    Args:
        tokenizer: `length` and all spans count the tokens it gives by default.
        length: The exact number of tokens of the prompt.
        chains: Number of chains; the first is asked for.
        hops: Assignments from variable to variable in a chain, which therefore has `hops + 1` variables.
        depth: Where the sentences of the asked chain lie: one place for all, an ascending list, or None: random.
        haystack: "noise", "essays" or a text; see `niah`.
        seed: The same seed gives the same text.

    Raises ValueError when the length is too short or can't be met exactly, more variables are needed than there are names, the
    depths are too few, too many, out of range or not ascending, or the tokenizer lacks words; TypeError for a depth that is no
    number.
    """
    per_chain = hops + 1
    if chains < 1 or hops < 0 or chains * per_chain > len(VARIABLES):
        raise ValueError(
            f"chains, hops: got {chains} and {hops}; expected chains >= 1, hops >= 0 and "
            f"chains * (hops + 1) <= {len(VARIABLES)}, the number of variable names"
        )
    chosen = given_depths(depth, per_chain, per_chain)
    if chosen != sorted(chosen):
        raise ValueError(f"depth: got {depth}; expected ascending depths: each assignment needs the one before it")
    rng = random.Random(seed)
    names = rng.sample(VARIABLES, chains * per_chain)
    values = [str(value) for value in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), chains)]
    hidden: list[tuple[float, str]] = []
    for chain, value in enumerate(values):
        own = names[chain * per_chain : (chain + 1) * per_chain]
        depths = sorted(rng.random() for _ in own)
        hops_text = [HOP.format(name=name, source=source) for source, name in pairwise(own)]
        places = chosen if chosen and chain == 0 else depths
        hidden += zip(places, [FIRST.format(name=own[0], value=value), *hops_text], strict=True)
    sentences = sentences_of(haystack, rng.random())
    built = build_haystack(tokenizer, length, INTRO, hidden, QUESTION.format(value=values[0]), sentences)
    spans = [built.tokens.part(part) for part in built.hidden]
    return TrackingTask(
        prompt=built.text,
        answer=" ".join(names[:per_chain]),
        references=tuple(names[:per_chain]),
        length=length,
        needles=tuple(spans[:per_chain]),
        distractors=tuple(spans[per_chain:]),
        question=built.tokens.part(built.tail),
        answer_prefix=built.tokens.span(*built.tail.find(PREFIX.format(value=values[0]))),
        value=values[0],
    )


def vt(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = None, haystack: str = "noise", seed: int = 0
) -> TrackingTask:
    """One chain of four hops in noise (RULER's vt); see `variable_tracking`."""
    return variable_tracking(tokenizer, length, depth=depth, haystack=haystack, seed=seed)

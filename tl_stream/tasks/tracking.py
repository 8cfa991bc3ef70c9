"""Variable tracking, in the manner of RULER's vt task (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.text import Span, build_haystack
from tl_stream.tasks.vocabulary import VARIABLES

INTRO = "Track the chain of variable assignment hidden in the text below."
FIRST = "VAR {name} = {value}."
HOP = "VAR {name} = VAR {source}."
QUESTION = (
    "Find all variables that are assigned the value {value} in the text above. "
    "By the chain of variable assignment, the variables that are assigned the value {value} are:"
)
DIGITS = 5


@dataclass(frozen=True)
class TrackingTask:
    """A haystack with chains of assignments, one of which is asked for.

    `prompt` has exactly `length` tokens and ends just before `answer`: the names of the asked chain in order, separated
    by spaces. `assignments` are the sentences of that chain in order, so that each needs the one before it;
    `distractors` are those of the other chains.
    """

    prompt: str
    answer: str
    length: int
    variables: tuple[str, ...]
    value: str
    assignments: tuple[Span, ...]
    distractors: tuple[Span, ...]
    question: Span

    def score(self, output: str) -> float:
        """The share of the chain's variables that `output` names (RULER's score)."""
        return sum(name in output for name in self.variables) / len(self.variables)


def variable_tracking(
    tokenizer: PreTrainedTokenizerBase, length: int, *, chains: int = 1, hops: int = 4, seed: int = 0
) -> TrackingTask:
    """Chains `VAR A = 12345`, `VAR B = VAR A`, ... in order at random depths of the noise; which hold the first value?

    Args:
        tokenizer: a fast tokenizer; `length` and all spans count the tokens it gives by default.
        length: the exact number of tokens of the prompt.
        chains: number of chains; the first is asked for.
        hops: assignments from variable to variable in a chain, which therefore has `hops + 1` variables.
        seed: the same seed gives the same text.

    Raises ValueError when the length is too short or more variables are needed than there are names.
    """
    per_chain = hops + 1
    if chains < 1 or hops < 0 or chains * per_chain > len(VARIABLES):
        raise ValueError(
            f"chains, hops: got {chains} and {hops}; expected chains >= 1, hops >= 0 and "
            f"chains * (hops + 1) <= {len(VARIABLES)}, the number of variable names"
        )
    rng = random.Random(seed)
    names = rng.sample(VARIABLES, chains * per_chain)
    values = [str(value) for value in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), chains)]
    hidden: list[tuple[float, str]] = []
    for chain, value in enumerate(values):
        own = names[chain * per_chain : (chain + 1) * per_chain]
        depths = sorted(rng.random() for _ in own)
        hops_text = [HOP.format(name=name, source=source) for source, name in pairwise(own)]
        hidden += zip(depths, [FIRST.format(name=own[0], value=value), *hops_text], strict=True)
    haystack = build_haystack(tokenizer, length, INTRO, hidden, QUESTION.format(value=values[0]))
    spans = [haystack.tokens.span(part.start, part.stop) for part in haystack.hidden]
    return TrackingTask(
        prompt=haystack.text,
        answer=" ".join(names[:per_chain]),
        length=length,
        variables=tuple(names[:per_chain]),
        value=values[0],
        assignments=tuple(spans[:per_chain]),
        distractors=tuple(spans[per_chain:]),
        question=haystack.tokens.span(haystack.tail.start, haystack.tail.stop),
    )

"""What all tasks with known answers have in common, and how answers are scored."""

import re
from dataclasses import dataclass

from tl_stream.tasks.spans import Span


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt whose answer, and the places it depends on, are known by construction.

    Attributes:
        prompt: The text; the tokenizer that it was made for gives `length` tokens for it, special ones such as BOS counted.
        answer: What follows the prompt, after a space, in a model that gets everything right.
        references: The pieces that an answer is scored by, in order.
        length: Number of tokens of the prompt.
        needles: Tokens of the passages that the answer depends on.
        distractors: Tokens of the passages that look like needles and aren't asked for.
        question: Tokens from the question to the end of the prompt.
        answer_prefix: Tokens of the question's end that the answer completes.
    """

    prompt: str
    answer: str
    references: tuple[str, ...]
    length: int
    needles: tuple[Span, ...]
    distractors: tuple[Span, ...]
    question: Span
    answer_prefix: Span

    def given(self, output: str) -> tuple[range, ...]:
        """Where an output gives its answer: the characters of each reference that it holds, where that comes first."""
        found = (re.search(re.escape(reference), output, re.IGNORECASE) for reference in self.references)
        return tuple(range(*match.span()) for match in found if match)

    def score(self, output: str) -> float:
        """See `score`."""
        return score(self, output)


def score(task: Task, output: str) -> float:
    """The share of the task's references that what `output` gives as its answer holds, whatever their case.

    RULER's string match (arXiv:2404.06654), of generated text. What stands before the answer, a word or the question once more,
    doesn't count; where a task tells what answers look like (`NeedleTask`), other answers before the right one do.
    """
    given = {output[place.start : place.stop].lower() for place in task.given(output)}
    return sum(reference.lower() in given for reference in task.references) / len(task.references)

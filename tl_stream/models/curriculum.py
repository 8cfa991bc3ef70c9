"""What the bundled model is trained on: texts of the tasks as token ids, positions and loss weights."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_stream.tasks import niah, reasoning_trace, variable_tracking
from tl_stream.tasks.needle import QUESTION
from tl_stream.tasks.reasoning import ANSWER, RULE_WEIGHTS

TRAINING_SEEDS = range(2**32, 2**48)
"""Task seeds used in training. Smaller ones, and so all that people usually type, give texts the model never saw."""

REST_WEIGHT = 0.05
REST_TOTAL = 8.0
ANSWER_TOTAL = 24.0
"""What a token that is no answer weighs, what all such tokens of a text weigh at most, and all its answers at most."""

EASY_RULES = ((0, 0, 1, 0), (2, 2, 1, 0), RULE_WEIGHTS)
"""Only copying, then arithmetic with one antecedent, then all: without the first two, looking up a value and reckoning
with it wait for each other, and neither is learned."""
HARD_RULES = ((1, 1, 0, 8), (2, 2, 1, 8), RULE_WEIGHTS)
"""More of what takes two antecedents."""

Text = tuple[list[int], list[tuple[int, float]]]
"""Token ids, and which of them are answers: (position, weight) pairs."""


@dataclass(frozen=True)
class Sample:
    """Token ids, the position of each, and how much predicting each counts in the loss."""

    ids: list[int]
    positions: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Samples padded at the right, where weights are 0."""

    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]


@dataclass(frozen=True)
class Mixture:
    """How often each kind of text is drawn, how many tokens the texts have, how many have positions without jumps."""

    induction: float
    recall: float
    needle: float
    tracking: float
    reasoning: float
    lengths: tuple[int, ...]
    contiguous: float
    rules: tuple[tuple[int, ...], ...] = EASY_RULES


def jumping_positions(rng: random.Random, length: int, max_position: int, places: list[int]) -> list[int]:
    """Ascending positions below `max_position`, in up to eight jumps, each before one of the `places` in the text."""
    spare = rng.randrange(max_position - length)
    cuts = sorted(rng.randrange(spare + 1) for _ in range(rng.randint(1, 8)))
    jumps = [0] * length
    for before, after in pairwise([0, *cuts]):
        jumps[rng.choice(places)] += after - before
    return [i + offset for i, offset in enumerate(accumulate(jumps))]


class Curriculum:
    """Draws training samples and batches; everything follows from `seed`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_position: int, seed: int):
        self.tokenizer = tokenizer
        self.max_position = max_position
        self.rng = random.Random(seed)
        self.stop_id = tokenizer.convert_tokens_to_ids(".")

    def batch(self, mixture: Mixture, tokens: int) -> Batch:
        """About `tokens` tokens of texts of one length, drawn from the mixture."""
        length = self.rng.choice(mixture.lengths)
        samples = [self.sample(mixture, length) for _ in range(max(1, tokens // length))]
        width = max(len(sample.ids) for sample in samples)

        def padded(rows: Sequence[list], fill: int | float) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        return Batch(
            padded([sample.ids for sample in samples], self.tokenizer.pad_token_id),
            padded([sample.positions for sample in samples], 0),
            padded([sample.weights for sample in samples], 0.0),
        )

    def sample(self, mixture: Mixture, length: int) -> Sample:
        """One text of about `length` tokens."""
        reasoning = partial(self.reasoning, rules=self.rng.choice(mixture.rules))
        kinds = (self.induction, self.recall, self.needle, self.tracking, reasoning)
        shares = (mixture.induction, mixture.recall, mixture.needle, mixture.tracking, mixture.reasoning)
        (kind,) = self.rng.choices(kinds, shares)
        ids, answers = kind(length)
        weights = [min(REST_WEIGHT, REST_TOTAL / len(ids))] * len(ids)
        scale = min(1.0, ANSWER_TOTAL / sum(weight for _, weight in answers))
        for position, weight in answers:
            weights[position] = weight * scale
        return Sample(ids, self._positions(ids, self.rng.random() < mixture.contiguous), weights)

    def _positions(self, ids: list[int], contiguous: bool) -> list[int]:
        """Positions as if much text had been left out after some of the sentences."""
        if contiguous:
            return list(range(len(ids)))
        stops = [i for i, token in enumerate(ids[:-1]) if token == self.stop_id] or [len(ids) // 2]
        return jumping_positions(self.rng, len(ids), self.max_position, [stop + 1 for stop in stops])

    def _seed(self) -> int:
        return self.rng.randrange(TRAINING_SEEDS.start, TRAINING_SEEDS.stop)

    def induction(self, length: int) -> Text:
        """Runs of random tokens, each repeated once: what gives a small model general induction."""
        ids, answers = [self.tokenizer.bos_token_id], []
        while len(ids) < min(length, 512) - 24:
            run = [self._token() for _ in range(self.rng.randint(12, 40))]
            ids += [*run, *run]
            answers += [(i, 0.25) for i in range(len(ids) - len(run) + 1, len(ids))]
        return ids, answers

    def recall(self, length: int) -> Text:
        """Pairs of random tokens at a fixed distance, then asked for in another order, from first to second or back.

        It is what the tasks have in common, with much more to predict per text: a needle's number follows its key at a
        distance of three, a variable stands three before the one it was copied to.
        """
        between = [self._token() for _ in range(self.rng.randint(0, 4))]
        backwards = self.rng.random() < 0.4
        count = max(4, min(length, 1024) // (2 * len(between) + 6))
        keys = self.rng.sample(range(4, len(self.tokenizer)), count)
        pairs = [(key, self._token()) for key in keys]
        ids, answers = [self.tokenizer.bos_token_id], []
        for key, value in pairs:
            ids += [value, *between, key, self.stop_id] if backwards else [key, *between, value, self.stop_id]
        for key, value in self.rng.sample(pairs, count):
            ids += [key] if backwards else [key, *between]
            answers.append((len(ids), 0.25))
            ids += [value, self.stop_id]
        return ids, answers

    def _token(self) -> int:
        return self.rng.randrange(4, len(self.tokenizer))

    def needle(self, length: int) -> Text:
        """A haystack with some needles, of which one to four are asked for in turn."""
        keys = self.rng.choice((1, 4, 4, 8) if length >= 256 else (1, 2, 4))
        task = niah(self.tokenizer, length, depth=self.rng.random(), keys=keys, seed=self._seed())
        ids = self.tokenizer(task.prompt)["input_ids"]
        others = [str(self.tokenizer.decode(ids[span.slice])) for span in task.distractors]
        text, ends = f"{task.prompt} {task.answer}.", [len(ids)]
        for other in self.rng.sample(others, min(len(others), self.rng.randint(1, 4))):
            key, value = re.findall(r"for (\w+) is: (\d+)", other)[0]
            text += f" {QUESTION.format(key=key)}"
            ends.append(len(self.tokenizer(text)["input_ids"]))
            text += f" {value}."
        answers = [(end + i, 2.0 if i == 0 else 1.0) for end in ends for i in range(8)]
        return [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id], answers

    def tracking(self, length: int) -> Text:
        """A chain of variables and their names in order."""
        task = variable_tracking(self.tokenizer, length, seed=self._seed())
        ids = [*self.tokenizer(f"{task.prompt} {task.answer}.")["input_ids"], self.tokenizer.eos_token_id]
        return ids, [(i, 1.0) for i in range(length, len(ids))]

    def reasoning(self, length: int, rules: tuple[int, ...] = RULE_WEIGHTS) -> Text:
        """A trace of as many sentences as make about `length` tokens, then some of its values once more."""
        count = max(8, min(length // 13, 220))
        task = reasoning_trace(self.tokenizer, count, rule_weights=rules, seed=self._seed())
        derived = [s.value_span for s in task.sentences if s.kind in ("derivation", "answer") and s.value_span]
        answers = [(span.start, 1.0) for span in derived]
        ids = self.tokenizer(task.text)["input_ids"]
        stated = [re.findall(r"(\w+) has (\d)", s.text)[-1] for s in task.sentences if s.value]
        for name, value in self.rng.sample(stated, self.rng.randint(0, 1 + len(stated) // 3)):
            ids += self.tokenizer(ANSWER.format(name=name, value=value))["input_ids"][1:]
            answers.append((len(ids) - 2, 1.0))
        return [*ids, self.tokenizer.eos_token_id], answers

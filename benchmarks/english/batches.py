"""What the English model is trained on: windows of text, repeated passages and repeated random tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tl_stream.models.curriculum import Batch, Sample, jumping_positions

LONGEST_RUN = 40


@dataclass(frozen=True)
class Mixture:
    """How often each kind of sample is drawn, how many tokens they have, how many have positions without jumps."""

    text: float
    repeats: float
    random: float
    lengths: tuple[int, ...]
    contiguous: float


class Drawer:
    """Draws training samples and batches from a stream of token ids; everything follows from `seed`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Sequence[int], max_position: int, seed: int):
        self.stream = stream
        self.max_position = max_position
        self.rng = random.Random(seed)
        self.bos, self.size = tokenizer.bos_token_id, len(tokenizer)
        (self.newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def batch(self, mixture: Mixture, tokens: int) -> Batch:
        """About `tokens` tokens in samples of one length, drawn from the mixture."""
        length = self.rng.choice(mixture.lengths)
        samples = [self.sample(mixture, length) for _ in range(max(1, tokens // length))]
        return Batch(
            torch.tensor([sample.ids for sample in samples]),
            torch.tensor([sample.positions for sample in samples]),
            torch.tensor([sample.weights for sample in samples]),
        )

    def sample(self, mixture: Mixture, length: int) -> Sample:
        """One sample of exactly `length` tokens, BOS first."""
        kinds = (self.text, self.repeats, self.random_runs)
        (kind,) = self.rng.choices(kinds, (mixture.text, mixture.repeats, mixture.random))
        ids, weights, seams = kind(length - 1)
        positions = self._positions(length, seams, self.rng.random() < mixture.contiguous)
        return Sample([self.bos, *ids], positions, [0.0, *weights])

    def window(self, length: int) -> list[int]:
        """Tokens from somewhere in the stream."""
        start = self.rng.randrange(len(self.stream) - length)
        return list(self.stream[start : start + length])

    def text(self, length: int) -> tuple[list[int], list[float], list[int]]:
        """Ids, weights, and where positions may jump: between paragraphs."""
        ids = self.window(length)
        return ids, [1.0] * length, [i + 1 for i, token in enumerate(ids) if token == self.newline]

    def repeats(self, length: int) -> tuple[list[int], list[float], list[int]]:
        """A passage, other text, the passage again; positions may jump between these."""
        passage = self.window(self.rng.randint(length // 8, length // 3))
        between = self.window(self.rng.randint(0, length - 2 * len(passage)))
        ids = [*passage, *between, *passage]
        seams = [len(passage), len(passage) + len(between), len(ids)]
        return [*ids, *self.window(length - len(ids))], [1.0] * length, seams

    def random_runs(self, length: int) -> tuple[list[int], list[float], list[int]]:
        """Runs of random tokens, each twice; only the second time counts, and positions may jump before any run."""
        ids: list[int] = []
        weights: list[float] = []
        seams: list[int] = []
        while len(ids) < length:
            run = [self.rng.randrange(self.size) for _ in range(self.rng.randint(12, LONGEST_RUN))]
            ids += [*run, *run]
            weights += [0.0] * (len(run) + 1) + [1.0] * (len(run) - 1)
            seams += [len(ids) - len(run), len(ids)]
        return ids[:length], weights[:length], [seam for seam in seams if seam < length]

    def _positions(self, length: int, seams: list[int], contiguous: bool) -> list[int]:
        """Positions as if much text had been left out at some of the seams."""
        if contiguous or not seams:
            return list(range(length))
        return jumping_positions(self.rng, length, self.max_position, [min(seam + 1, length - 1) for seam in seams])

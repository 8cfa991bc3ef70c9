"""What a run that reads a KV cache has to know of the queries before it, to choose as a run that reads all of the text again.

With one query a block a row's choice rests on the keys before it, which are in the KV cache, and on the earlier queries that
`Common` samples, which are not: these are kept here, from run to run of one text, O(log T) of them a layer. They are found by
their places in the text, and known to be of the same text by their keys, which must be those in the cache.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.estimator.common import PER_OCTAVE, Asked, Common, sampled
from tl_stream.estimator.problem import Problem
from tl_stream.masking import NEVER
from tl_stream.score_mod import AtRows


@dataclass
class Sample:
    """The sampled queries of one text (or of a batch without padding) in one layer.

    Attributes:
        queries: As in `Problem`, `[batch, head_index, sample, d_head]`.
        keys: Those at the same places, `[batch, kv_head_index, sample, d_head]`.
        reach: How many keys each may read, itself included, `[sample]`.
        first: Number of the present run's first query in the text.
        start: Place of the text's first token among the keys.
        common: What they have in common, and of which of them, as far as it was asked for.
    """

    queries: Float[Tensor, "batch head_index sample d_head"]
    keys: Float[Tensor, "batch kv_head_index sample d_head"]
    reach: Int[Tensor, " sample"]
    first: int
    start: int
    common: tuple[tuple[int, ...], Common] | None = None

    @classmethod
    def of(cls, problem: Problem) -> Sample:
        """That of one run."""
        tokens = problem.mask.tokens
        start = 0 if tokens is None else int(tokens[0].int().argmax())
        first = int(problem.first_own[0]) - start
        rows = [row for row in sampled(first + problem.shape[2]) if row >= first]
        run, text = (torch.tensor(rows, dtype=torch.long, device=problem.keys.device) + x for x in (-first, start))
        reach = problem.last_key[run] - problem.first_key[run]
        return cls(problem.queries[:, :, run, 0], problem.keys.flatten(2, 3)[:, :, text], reach, first, start)

    def after(self, before: Sample | None, problem: Problem) -> Sample | None:
        """This one and those of the runs before it; None: not all that the KV cache is of are known."""
        if not self.first:
            return self
        rows = sampled(self.first)
        if before is None or before.keys.shape[2] < len(rows) or before.start != self.start:
            return None
        kept = slice(len(rows))
        places = torch.tensor(rows, device=self.keys.device) + self.start
        if not torch.equal(before.keys[:, :, kept], problem.keys.flatten(2, 3)[:, :, places]):
            return None
        queries, keys = (
            torch.cat([old[:, :, kept], new], 2) for old, new in ((before.queries, self.queries), (before.keys, self.keys))
        )
        return Sample(queries, keys, torch.cat([before.reach[kept], self.reach]), self.first, self.start, before.common)

    def in_common(self, problem: Problem, number: int) -> Common:
        """`Common.of` those that count for this run's queries. Between two sampled queries nothing is computed anew."""
        rows = sampled(self.first + problem.shape[2])
        first = max(bisect_right(rows, self.first) - PER_OCTAVE, 0)
        of = (first, len(rows), number)
        if self.common is None or self.common[0] != of:
            self.common = of, Common.of(self._asked(problem, rows, first), number)
        return self.common[1]._replace(first=self.first)

    def _asked(self, problem: Problem, rows: list[int], first: int) -> Asked:
        row = torch.tensor(rows[first:], device=self.keys.device)
        own, reach = row + self.start, self.reach[first:]
        real = torch.ones_like(row, dtype=torch.bool) if problem.mask.tokens is None else problem.mask.tokens[0, own]
        stop = (own + 1).int()
        asked = problem._replace(
            queries=self.queries[:, :, first:, None],
            mask=replace(problem.mask, start=stop - reach.int(), stop=stop),
            mods=tuple(AtRows(mod, row - self.first) for mod in problem.mods),
            real=real[:, None],
            first_key=(own + 1 - reach).masked_fill(~real, NEVER),
            last_key=(own + 1).masked_fill(~real, 0),
            first_own=own.masked_fill(~real, NEVER),
        )
        return Asked(asked, rows[first:], (own + 1).tolist())


class Earlier:
    """The samples of all layers and texts, as the last run of each left them."""

    def __init__(self) -> None:
        self.samples: dict[tuple[int, int], Sample] = {}
        self.has_warned = False

    def of(self, problem: Problem, layer: int, text: int) -> Sample | None:
        """Note a run, with one query a block; what is known of its text up to its end.

        Returns:
            None: The run reads a KV cache that holds other keys than the last run here left.
        """
        sample = Sample.of(problem).after(self.samples.get((layer, text)), problem)
        if sample is not None:
            self.samples[layer, text] = sample
        elif not self.has_warned:
            self.has_warned = True
            warnings.warn(
                "A run read a KV cache that this context has not seen filled as it is (it comes from elsewhere, is of another "
                "text than the last run, or dropped the keys outside a sliding window): in spite of block_q=1 its rows may "
                "choose other key blocks than in a run that reads all of the text again, and are another sparse model.",
                stacklevel=2,
            )
        return sample

    def clear(self) -> None:
        """Forget everything."""
        self.samples.clear()

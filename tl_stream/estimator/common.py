"""What a head's queries have in common: key blocks that they read wherever they stand, at one place or at one distance.

After the vertical and slash lines of MInference (arXiv:2407.02490, section 3): a few queries read everything; the places and
the distances that hold most of their attention are candidates for the queries after them. So a positional head, whose single
queries each look as if they read something else, is seen as what it is.

Sampled are `PER_OCTAVE` queries between each position and its double, and a query block is given what the latest `PER_OCTAVE`
of them read in all: nothing that comes after it counts. O(T d) time, as each octave costs half of what the next one does;
some `PER_OCTAVE` numbers a key block and head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.estimator.candidates import best
from tl_stream.estimator.problem import Problem, block_masses
from tl_stream.masking import NEVER
from tl_stream.score_mod import AtRows

PER_OCTAVE = 64


class Asked(NamedTuple):
    """The sampled queries, which read everything.

    Attributes:
        problem: Each as a query block of its own.
        rows: Number of the query block to which each belongs, and from which on it counts.
        ends: One past the last key that each one's block may read.
    """

    problem: Problem
    rows: list[int]
    ends: list[int]

    @classmethod
    def of(cls, problem: Problem) -> Asked:
        """One query each of a run's sampled query blocks, at changing places within them."""
        rows, block_q = sampled(problem.shape[2]), problem.block_q
        chosen = torch.tensor(rows, device=problem.queries.device)
        real = problem.real[chosen]
        place = torch.arange(len(rows), device=chosen.device) % block_q
        last = block_q - 1 - real.flip(-1).int().argmax(-1)
        place = torch.minimum(torch.maximum(place, real.int().argmax(-1)), last)  # padding asks nothing
        query_pos = chosen * block_q + place
        start, stop = problem.mask.bounds(query_pos)
        asked = problem._replace(
            queries=problem.queries.flatten(2, 3)[:, :, query_pos, None],
            mask=replace(problem.mask, start=start, stop=stop),
            mods=tuple(AtRows(mod, query_pos) for mod in problem.mods),
            real=real.gather(1, place[:, None]),
            first_key=problem.first_key[chosen],
            last_key=problem.last_key[chosen],
            first_own=problem.first_own[chosen],
        )
        earlier = problem.mask.key_length - problem.mask.query_length
        return cls(asked, rows, [earlier + (row + 1) * block_q for row in rows])

    def octave(self, first: int) -> tuple[Problem, Int[Tensor, "sample 1"]]:
        """`PER_OCTAVE` of them from the one numbered `first` on, and their numbers. No key after them is looked at."""
        stop = min(first + PER_OCTAVE, len(self.rows))
        part = self.problem.slice(first, stop)
        until = -(-self.ends[stop - 1] // part.block_k)
        return part._replace(keys=part.keys[:, :, :until]), torch.arange(first, stop, device=part.keys.device)[:, None]


class Common(NamedTuple):
    """Key blocks that the queries of a head read most, so far.

    Attributes:
        places: Numbers of key blocks, or distances from a query block's own key block, in key blocks; the best first.
        moving: Which of them are distances.
        rows: The query blocks from which on each sample counts.
        first: Number, counted as in `rows`, of the run's first query block.
    """

    places: Int[Tensor, "batch head_index sample block"]
    moving: Bool[Tensor, "batch head_index sample block"]
    rows: Int[Tensor, " sample"]
    first: int = 0

    @classmethod
    def of(cls, asked: Asked, number: int) -> Common:
        """The `number` places and distances with the most attention, the first and the own block aside: a tree keeps these."""
        n_blocks = asked.problem.keys.shape[2]
        held, found, earlier = [], [], None
        for first in range(0, len(asked.rows), PER_OCTAVE):
            masses = _by_place_and_distance(*asked.octave(first), n_blocks)
            so_far = masses.cumsum(2)
            latest = so_far if earlier is None else so_far + earlier[:, :, : masses.shape[2]]
            number_of_each = torch.arange(2 * n_blocks, device=masses.device).expand(latest.shape)
            found.append(best(latest, number_of_each, min(number, n_blocks)))
            held.append(latest.gather(-1, found[-1]))
            # Summed anew, not subtracted: what is left of a difference would depend on how long the text is.
            earlier = pad(masses.flip(2).cumsum(2).flip(2)[:, :, 1:], (0, 0, 0, 1))
        lines, nowhere = torch.cat(found, 2), torch.cat(held, 2) == 0
        places, moving = (lines % n_blocks).masked_fill(nowhere, NEVER), (lines >= n_blocks) & ~nowhere
        return cls(places, moving, torch.tensor(asked.rows, device=lines.device))

    def blocks(
        self, problem: Problem, query_pos: Int[Tensor, "q_block block_q"], number: Int[Tensor, "head_index q_block"]
    ) -> tuple[Tensor, Tensor]:
        """The best `number` key blocks for each query block, and which of them it can have.

        Returns:
            `[batch, head_index, q_block, block]`, twice.
        """
        latest = torch.searchsorted(self.rows, self.first + query_pos[:, 0] // problem.block_q, right=True) - 1
        places, moving = self.places[:, :, latest], self.moving[:, :, latest]
        blocks = torch.where(moving, problem.diagonal - places, places)
        wanted = torch.arange(blocks.shape[-1], device=blocks.device) < number[..., None]
        wanted = wanted & problem.readable(blocks, problem.block_k)
        return blocks.masked_fill(~wanted, 0), wanted


def sampled(n_rows: int) -> list[int]:
    """The sampled ones of so many rows, `PER_OCTAVE` between each and its double; of more rows the same ones and others."""
    rows = {int(2 ** (step / PER_OCTAVE)) - 1 for step in range(PER_OCTAVE * n_rows.bit_length())}
    return sorted(row for row in rows if row < n_rows)


def _by_place_and_distance(
    problem: Problem, number: Tensor, n_blocks: int
) -> Float[Tensor, "batch head_index sample two_n_blocks"]:
    """Each query's attention to each key block, then to each distance; 0 for the first and the own block."""
    blocks, readable = problem.blocks_in_reach()
    kept_anyway = (blocks == problem.sink) | (blocks == problem.diagonal)
    every = blocks.shape[-1] == problem.keys.shape[2]
    masses = block_masses(problem, number, None if every else blocks, readable).masked_fill(kept_anyway, 0.0)
    distance = problem.diagonal - blocks
    none = masses.new_zeros(*masses.shape[:3], n_blocks)
    at_place = none.scatter_add(-1, blocks, masses)
    at_distance = none.scatter_add(-1, distance.clamp(min=0), masses.masked_fill(distance < 0, 0.0))
    return torch.cat([at_place, at_distance], -1)

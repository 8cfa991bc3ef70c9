"""What a head's queries have in common: key blocks that they read wherever they stand, at one place or at one distance.

After the vertical and slash lines of MInference (arXiv:2407.02490, section 3): a few queries read everything; the places and
the distances that hold most of their attention are candidates for the queries after them. So a positional head, whose single
queries each look as if they read something else, is seen as what it is.

Sampled are `PER_OCTAVE` queries between each position and its double, and a query block is given what the latest `PER_OCTAVE`
of them read in all: nothing that comes after it counts. O(T d) time, as each octave costs half of what the next one does;
some `PER_OCTAVE` numbers a key block and head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.estimator.problem import Problem, block_masses

PER_OCTAVE = 64


class Common(NamedTuple):
    """Key blocks that the queries of a head read most, so far.

    Attributes:
        places: Numbers of key blocks, or distances from a query block's own key block, in key blocks; the best first.
        moving: Which of them are distances.
        rows: The query blocks from which on each sample counts.
    """

    places: Int[Tensor, "batch head_index sample block"]
    moving: Bool[Tensor, "batch head_index sample block"]
    rows: Int[Tensor, " sample"]

    @classmethod
    def of(cls, problem: Problem, number: int) -> Common:
        """The `number` places and distances with the most attention, the first and the own block aside: a tree keeps these."""
        rows, n_blocks = _sampled_rows(problem), problem.keys.shape[2]
        best, earlier = [], None
        for first in range(0, len(rows), PER_OCTAVE):
            masses = _by_place_and_distance(*_one_query_each(problem, rows, first), n_blocks)
            so_far = masses.cumsum(2)
            latest = so_far if earlier is None else so_far + earlier[:, :, -1:] - earlier[:, :, : masses.shape[2]]
            best.append(latest.topk(min(number, n_blocks)).indices)
            earlier = so_far
        found = torch.cat(best, 2)
        return cls(found % n_blocks, found >= n_blocks, torch.tensor(rows, device=found.device))

    def blocks(
        self, problem: Problem, query_pos: Int[Tensor, "q_block block_q"], number: Int[Tensor, "head_index q_block"]
    ) -> tuple[Tensor, Tensor]:
        """The best `number` key blocks for each query block, and which of them it can have.

        Returns:
            `[batch, head_index, q_block, block]`, twice.
        """
        latest = torch.searchsorted(self.rows, query_pos[:, 0] // problem.block_q, right=True) - 1
        places, moving = self.places[:, :, latest], self.moving[:, :, latest]
        blocks = torch.where(moving, problem.diagonal - places, places)
        wanted = torch.arange(blocks.shape[-1], device=blocks.device) < number[..., None]
        return blocks.clamp(min=0), wanted & problem.readable(blocks, problem.block_k)


def _sampled_rows(problem: Problem) -> list[int]:
    """Query blocks, so many between each and its double; in a longer text the same ones and more."""
    n_blocks = problem.shape[2]
    rows = {int(2 ** (step / PER_OCTAVE)) - 1 for step in range(PER_OCTAVE * n_blocks.bit_length())}
    return sorted(row for row in rows if row < n_blocks)


def _one_query_each(problem: Problem, rows: list[int], first: int) -> tuple[Problem, Int[Tensor, "sample 1"]]:
    """One query of each of an octave's query blocks, at changing places within them, as blocks of their own; its position."""
    chosen = torch.tensor(rows[first : first + PER_OCTAVE], device=problem.queries.device)
    real, block_q = problem.real[chosen], problem.block_q
    place = torch.arange(first, first + len(chosen), device=chosen.device) % block_q
    last = block_q - 1 - real.flip(-1).int().argmax(-1)
    place = torch.minimum(torch.maximum(place, real.int().argmax(-1)), last)  # padding asks nothing
    query_pos = chosen * block_q + place
    earlier = problem.mask.key_length - problem.mask.query_length
    until = earlier + (rows[first + len(chosen) - 1] + 1) * block_q  # no key after them is looked at
    part = problem._replace(
        queries=problem.queries.flatten(2, 3)[:, :, query_pos, None],
        keys=problem.keys[:, :, : -(-until // problem.block_k)],
        real=real.gather(1, place[:, None]),
        first_key=problem.first_key[chosen],
        last_key=problem.last_key[chosen],
        first_own=problem.first_own[chosen],
    )
    return part, query_pos[:, None]


def _by_place_and_distance(
    problem: Problem, query_pos: Tensor, n_blocks: int
) -> Float[Tensor, "batch head_index sample two_n_blocks"]:
    """Each query's attention to each key block, then to each distance; 0 for the first and the own block."""
    blocks, readable = problem.blocks_in_reach()
    kept_anyway = (blocks == problem.sink) | (blocks == problem.diagonal)
    every = blocks.shape[-1] == problem.keys.shape[2]
    masses = block_masses(problem, query_pos, None if every else blocks, readable).masked_fill(kept_anyway, 0.0)
    distance = problem.diagonal - blocks
    none = masses.new_zeros(*masses.shape[:3], n_blocks)
    at_place = none.scatter_add(-1, blocks, masses)
    at_distance = none.scatter_add(-1, distance.clamp(min=0), masses.masked_fill(distance < 0, 0.0))
    return torch.cat([at_place, at_distance], -1)

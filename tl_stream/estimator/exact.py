"""The exact oracle: the true attention mass of every key block, streamed in O(T) memory and O(T^2) time."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from tl_stream.estimator.candidates import Candidates
from tl_stream.estimator.problem import Problem, block_masses


def exact_masses(problem: Problem, query_pos: Int[Tensor, "q_block block_q"]) -> Candidates:
    """Every readable key block and its share of attention; negative where the mask leaves a query block nothing of it."""
    problem = problem.with_readable_keys()
    blocks, used = problem.readable_blocks()
    return blocks, block_masses(problem, query_pos, None, used).masked_fill(~used, -1.0)

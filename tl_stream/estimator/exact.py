"""The exact oracle: the true attention mass of every key block, streamed in O(T) memory and O(T^2) time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.estimator.problem import Problem, block_masses


def exact_masses(
    problem: Problem, query_pos: Int[Tensor, "q_block block_q"]
) -> tuple[Int[Tensor, "batch head_index q_block candidate"], Float[Tensor, "batch head_index q_block candidate"]]:
    """Every key block and its share of the query block's attention; negative where the mask leaves nothing of it."""
    blocks = torch.arange(problem.keys.shape[2], device=query_pos.device).expand(*problem.shape, -1)
    first = blocks * problem.block_k
    used = (first < problem.last_key[:, None]) & (first + problem.block_k > problem.first_key[:, None])
    return blocks, block_masses(problem, query_pos, blocks, used).masked_fill(~used, -1.0)

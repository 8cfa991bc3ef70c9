"""From candidates to kept blocks: as many as the budget allows, the best first."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.budget import Budget
from tl_stream.config import StreamConfig
from tl_stream.estimator.problem import Problem


class Limits:
    """What the budgets of a layer's heads allow.

    Attributes:
        most: Most blocks that any query block may keep.
        all: Whether every query block may keep everything.
        blocks: Most blocks that each query block may keep, `[head_index, q_block]`.
        shares: Share of attention at which a row has enough, `[head_index, 1, 1]`; infinite: never.
    """

    def __init__(self, problem: Problem, budgets: list[Budget]) -> None:
        n_blocks, device = problem.keys.shape[2], problem.keys.device
        different = set(budgets)
        self.most = max(each.blocks(n_blocks) for each in different)
        self.all = all(each.blocks(n_blocks) == n_blocks and each.share is None for each in different)
        first, last = problem.first_key // problem.block_k, (problem.last_key - 1) // problem.block_k
        readable = (last - first + 1).clamp(min=0)
        by_number = {each: torch.tensor([each.blocks(n) for n in range(n_blocks + 1)], device=device) for each in different}
        self.blocks: Int[Tensor, "head_index q_block"] = torch.stack([by_number[each][readable] for each in budgets])
        shares = [math.inf if each.share is None else each.share for each in budgets]
        self.shares: Float[Tensor, "head_index 1 1"] = torch.tensor(shares, device=device)[:, None, None]


def keep_most(
    problem: Problem, rows: slice, blocks: Tensor, masses: Tensor, limits: Limits, config: StreamConfig
) -> tuple[Int[Tensor, "batch head_index q_block slot"], Int[Tensor, "batch head_index q_block"]]:
    """The candidate blocks of greatest mass within the limits, sorted by position, and how many of them count.

    Args:
        problem: Some query blocks.
        rows: Which ones these are.
        blocks: Candidates, `[batch, head_index, q_block, candidate]`.
        masses: Share of attention of each; negative where it doesn't count.
        limits: For all query blocks.
        config: Which blocks are kept in any case.
    """
    forced = _forced(problem, blocks, masses, config)
    # 2 exceeds any share of attention, so that what must be kept comes first.
    best = masses.masked_fill(forced, 2.0).topk(min(limits.most, masses.shape[-1])).indices
    forced, masses, blocks = (x.gather(-1, best) for x in (forced, masses, blocks.expand(masses.shape)))
    so_far = masses.clamp(min=0).cumsum(-1) - masses.clamp(min=0)
    rank = torch.arange(best.shape[-1], device=best.device)
    used = (rank < limits.blocks[:, rows, None]) & (so_far < limits.shares) & (masses >= 0) | forced
    past_the_end = problem.keys.shape[2]
    indices = blocks.masked_fill(~used, past_the_end).sort(-1).values
    return indices.masked_fill(indices == past_the_end, 0).int(), used.sum(-1).int()


def _forced(problem: Problem, blocks: Tensor, masses: Tensor, config: StreamConfig) -> Bool[Tensor, ...]:
    forced = torch.zeros_like(masses, dtype=torch.bool)
    if config.keep_local:
        forced = forced | (blocks == problem.diagonal)
    if config.keep_sink:
        forced = forced | (blocks == problem.sink)
    return forced & (masses >= 0)

"""From candidates to kept blocks: as many as the budget allows, the best first."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.budget import Budget
from tl_stream.config import StreamConfig
from tl_stream.estimator.candidates import best
from tl_stream.estimator.hierarchical import Beam
from tl_stream.estimator.problem import Problem


class Limits:
    """What the budgets of a layer's heads allow.

    Attributes:
        most: Most blocks that any query block may keep by its budget.
        span: Most key blocks that any query block may read.
        own: Most key blocks in which the queries of one block stand themselves, which are kept beside the budget's.
        blocks: Most blocks that each query block may keep, `[head_index, q_block]`.
        shares: Share of attention at which a row has enough, `[head_index, 1, 1]`; infinite: never.
    """

    def __init__(self, problem: Problem, budgets: list[Budget]) -> None:
        n_blocks, device = problem.keys.shape[2], problem.keys.device
        self.span = problem.span
        self.by_number = {each: [each.blocks(n) for n in range(n_blocks + 1)] for each in set(budgets)}
        self.most = max(numbers[-1] for numbers in self.by_number.values())
        self.own = _most_own(problem)
        allowed = {each: torch.tensor(numbers, device=device)[problem.n_readable] for each, numbers in self.by_number.items()}
        self.blocks: Int[Tensor, "head_index q_block"] = torch.stack([allowed[each] for each in budgets])
        shares = [math.inf if each.share is None else each.share for each in budgets]
        self.shares: Float[Tensor, "head_index 1 1"] = torch.tensor(shares, device=device)[:, None, None]

    def exceed(self, multiple: int) -> bool:
        """Whether some query block may have more key blocks to read than this multiple of its budget."""
        return any(multiple * min(numbers) < n for n, numbers in enumerate(zip(*self.by_number.values(), strict=True)))

    def beam(self, multiple: int) -> Beam:
        """As many tree nodes as blocks, or a multiple of that: by the position, so that a longer text finds the same."""
        least = [multiple * min(numbers) for numbers in zip(*self.by_number.values(), strict=True)]
        start = max((-(-n // (2 * width)) - 1).bit_length() for n, width in enumerate(least[: self.span + 1]) if n)
        return Beam(multiple * self.blocks[..., None], min(least[1:]), multiple * self.most, start, self.span)


def keep_most(
    problem: Problem, rows: slice, blocks: Tensor, masses: Tensor, limits: Limits, config: StreamConfig
) -> tuple[Int[Tensor, "batch head_index q_block slot"], Int[Tensor, "batch head_index q_block"]]:
    """The candidate blocks of greatest mass within the limits, and the query block's own ones beside them: every query reads
    something. Sorted by position.

    Args:
        problem: Some query blocks.
        rows: Which ones these are.
        blocks: Candidates, `[batch, head_index, q_block, candidate]`.
        masses: Share of attention of each; negative where it doesn't count.
        limits: For all query blocks.
        config: Whether the first block is kept in any case.

    Returns:
        Kept blocks, and how many of them count.
    """
    forced, masses, blocks = in_order(problem, blocks, masses, limits.most, config)
    so_far = masses.clamp(min=0).cumsum(-1) - masses.clamp(min=0)
    rank = torch.arange(blocks.shape[-1], device=blocks.device)
    used = (rank < limits.blocks[:, rows, None]) & (so_far < limits.shares) & (masses >= 0) | forced
    own, is_own = _own_blocks(problem, limits.own)
    used = used & ~are_own(problem, blocks)  # these are added, all of them
    past_the_end = problem.keys.shape[2]
    own = own.masked_fill(~is_own, past_the_end).expand(*used.shape[:3], -1)
    kept = torch.cat([own, blocks.masked_fill(~used, past_the_end)], -1)
    kept = pad(kept, (0, limits.most - used.shape[-1]), value=past_the_end).sort(-1).values
    return kept.masked_fill(kept == past_the_end, 0).int(), (kept < past_the_end).sum(-1).int()


def in_order(
    problem: Problem, blocks: Tensor, masses: Tensor, number: int, config: StreamConfig
) -> tuple[Bool[Tensor, "*shape"], Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Which of the best candidates are kept in any case, their masses and blocks, in the order in which a budget takes them."""
    forced = (blocks == problem.sink) & (masses >= 0) if config.keep_sink else torch.zeros_like(masses, dtype=torch.bool)
    blocks = blocks.expand(masses.shape)
    # 2 exceeds any share of attention, so that what must be kept comes first.
    first = best(masses.masked_fill(forced, 2.0), blocks, min(number, masses.shape[-1]))
    return forced.gather(-1, first), masses.gather(-1, first), blocks.gather(-1, first)


def are_own(problem: Problem, blocks: Int[Tensor, "batch head_index q_block slot"]) -> Bool[Tensor, "*shape"]:
    """Which of them the queries of a block stand in themselves: kept whatever the budget."""
    return (blocks >= problem.first_own[:, None] // problem.block_k) & (blocks <= problem.diagonal)


def _own_blocks(problem: Problem, most: int) -> tuple[Int[Tensor, "q_block own"], Bool[Tensor, "q_block own"]]:
    """The key blocks in which a block's queries stand themselves, and which of them count."""
    own = problem.first_own[:, None] // problem.block_k + torch.arange(most, device=problem.keys.device)
    return own, own <= problem.diagonal


def _most_own(problem: Problem) -> int:
    """Most key blocks over which the positions of one query block stretch; they repeat with a period."""
    (n_queries, n_keys), block_q, block_k = (
        (problem.mask.query_length, problem.mask.key_length),
        problem.block_q,
        problem.block_k,
    )
    first = [n_keys - n_queries + i * block_q for i in range(min(problem.shape[2], block_k))]
    return max((min(at + block_q, n_keys) - 1) // block_k - at // block_k + 1 for at in first)

"""Scores of tree nodes: how strongly a query block may read the keys that a node covers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.estimator.problem import Problem
from tl_stream.estimator.pyramid import Level

Scores = Float[Tensor, "batch head_index q_block node"]
NodeScores = Callable[[Problem, Level, int, Tensor, Tensor, Tensor], tuple[Scores, ...]]


def by_mean_and_box(
    problem: Problem,
    nodes_of: Level,
    level: int,
    mean_query: Float[Tensor, "batch head_index q_block d_head"],
    query_pos: Int[Tensor, "q_block block_q"],
    nodes: Int[Tensor, "batch head_index q_block node"],
) -> tuple[Scores, Scores]:
    """The mean query's score on each node's mean key, and its greatest possible score within each node's bounds."""
    zeros, positive, negative = torch.zeros_like(mean_query), mean_query.clamp(min=0), mean_query.clamp(max=0)
    on_mean, in_box = torch.cat([mean_query, zeros, zeros], -1), torch.cat([zeros, positive, negative], -1)
    products = torch.stack([on_mean, in_box], -2) @ problem.select(nodes_of.statistics, nodes).transpose(-1, -2)
    mean, box = products.unbind(-2)
    return _scored(problem, mean, level, query_pos, nodes), _scored(problem, box, level, query_pos, nodes)


def by_mean(
    problem: Problem, nodes_of: Level, level: int, mean_query: Tensor, query_pos: Tensor, nodes: Tensor
) -> tuple[Scores]:
    """The mean query's score on each node's mean key (Stream, section 3)."""
    return (by_mean_and_box(problem, nodes_of, level, mean_query, query_pos, nodes)[0],)


def by_box(
    problem: Problem, nodes_of: Level, level: int, mean_query: Tensor, query_pos: Tensor, nodes: Tensor
) -> tuple[Scores]:
    """The mean query's greatest possible score within each node's bounds (Quest, arXiv:2406.10774)."""
    return (by_mean_and_box(problem, nodes_of, level, mean_query, query_pos, nodes)[1],)


def by_centre(
    problem: Problem, nodes_of: Level, level: int, mean_query: Tensor, query_pos: Tensor, nodes: Tensor
) -> tuple[Scores]:
    """The mean query's score on the key in the middle of each node (HiP, arXiv:2406.09827)."""
    size = problem.block_k << level
    centre = torch.minimum(nodes * size + size // 2, problem.last_key[:, None] - 1)
    keys = problem.select(problem.keys.flatten(2, 3), centre)
    products = (keys @ mean_query[..., None]).squeeze(-1)
    return (_scored(problem, products, level, query_pos, nodes),)


def _scored(problem: Problem, products: Tensor, level: int, query_pos: Tensor, nodes: Tensor) -> Tensor:
    """What the model makes of products with a whole node: for positions, the node's last key and the block's last query."""
    last_key = torch.minimum((nodes + 1) * (problem.block_k << level), problem.last_key[:, None]) - 1
    last_query = query_pos.amax(-1).clamp(max=problem.mask.query_length - 1)[:, None]
    return problem.score(products, last_query, last_key)

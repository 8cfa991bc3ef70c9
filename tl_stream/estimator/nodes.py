"""Scores of tree nodes: how strongly a query block may read the keys that a node covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.estimator.problem import Problem
from tl_stream.estimator.pyramid import Level


class Nodes(NamedTuple):
    """Some nodes of one level of the tree, for each query block.

    Attributes:
        ids: Their numbers, `[batch, head_index, q_block, node]`.
        used: Which of them count.
        level: 0: single key blocks; node i of level l covers the key blocks `i * 2^l <= block < (i + 1) * 2^l`.
        every: Whether they are all nodes of the level, in order.
    """

    ids: Int[Tensor, "batch head_index q_block node"]
    used: Bool[Tensor, "batch head_index q_block node"]
    level: int
    every: bool = False

    def take(self, chosen: Tensor, fresh: Tensor) -> Nodes:
        """The chosen ones, of which those count that are fresh."""
        return Nodes(self.ids.gather(-1, chosen), fresh, self.level)


class Groups(NamedTuple):
    """Queries of a block that lie together, each group represented by its mean.

    Attributes:
        mean: Mean query, `[batch, head_index, q_block, group, d_head]`.
        last: Position of the last query of each group, `[q_block, group, 1]`.
        weight: Share of the block's queries in each group, `[q_block, group, 1]`.
    """

    mean: Float[Tensor, "batch head_index q_block group d_head"]
    last: Int[Tensor, "q_block group 1"]
    weight: Float[Tensor, "q_block group 1"]

    @classmethod
    def of(cls, problem: Problem, query_pos: Int[Tensor, "q_block block_q"], number: int) -> Groups:
        """Cut every block into so many groups, or fewer where it has fewer queries."""
        size = -(-problem.block_q // number)
        inside = pad(query_pos < problem.mask.query_length, (0, -problem.block_q % size)).unflatten(1, (-1, size))
        count = inside.sum(-1)
        total = pad(problem.queries, (0, 0, 0, -problem.block_q % size)).unflatten(3, (-1, size)).sum(4)
        last = query_pos[:, :1] + torch.arange(size, inside[0].numel() + 1, size, device=count.device) - 1
        mean = total / count.clamp(min=1)[:, :, None]
        return cls(mean, last.clamp(max=problem.mask.query_length - 1)[:, :, None], (count / count.sum(-1, True))[:, :, None])


Scores = Float[Tensor, "batch head_index q_block group node"]
NodeScores = Callable[[Problem, Level, Groups, Nodes], tuple[Scores, ...]]


def by_mean_and_box(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> tuple[Scores, Scores]:
    """Each group's score on each node's mean key, and its greatest possible score within each node's bounds."""
    query, zeros = groups.mean, torch.zeros_like(groups.mean)
    rows = torch.cat([torch.cat([query, zeros, zeros], -1), torch.cat([zeros, query.clamp(min=0), query.clamp(max=0)], -1)], 3)
    mean, box = _products(problem, rows, nodes_of.statistics, nodes).chunk(2, 3)
    return _scored(problem, mean, groups, nodes), _scored(problem, box, groups, nodes)


def by_mean(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> tuple[Scores]:
    """Each group's score on each node's mean key (Stream, section 3)."""
    return (by_mean_and_box(problem, nodes_of, groups, nodes)[0],)


def by_box(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> tuple[Scores]:
    """Each group's greatest possible score within each node's bounds (Quest, arXiv:2406.10774)."""
    return (by_mean_and_box(problem, nodes_of, groups, nodes)[1],)


def by_centre(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> tuple[Scores]:
    """Each group's score on the key in the middle of each node (HiP, arXiv:2406.09827)."""
    size = problem.block_k << nodes.level
    centre = torch.minimum(nodes.ids * size + size // 2, problem.last_key[:, None] - 1)
    keys = problem.select(problem.keys.flatten(2, 3), centre)
    return (_scored(problem, groups.mean @ keys.transpose(-1, -2), groups, nodes),)


def _products(problem: Problem, rows: Tensor, statistics: Tensor, nodes: Nodes) -> Tensor:
    """`rows` `[batch, head_index, q_block, row, n]` times the statistics of the nodes."""
    if not nodes.every:
        return rows @ problem.select(statistics, nodes.ids).transpose(-1, -2)
    of_head = statistics.repeat_interleave(rows.shape[1] // statistics.shape[1], 1)
    return (rows.flatten(2, 3) @ of_head.transpose(-1, -2)).unflatten(2, rows.shape[2:4])


def _scored(problem: Problem, products: Tensor, groups: Groups, nodes: Nodes) -> Tensor:
    """What the model makes of products with a whole node: for positions, the node's last key and the group's last query."""
    last_key = torch.minimum((nodes.ids + 1) * (problem.block_k << nodes.level), problem.last_key[:, None]) - 1
    return problem.score(products, groups.last, last_key[:, :, :, None])

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
    def of(cls, problem: Problem, query_pos: Int[Tensor, "q_block block_q"], size: int) -> Groups:
        """Groups of so many queries; the last one of a block may have fewer."""
        missing = -problem.block_q % size
        inside = pad(problem.real, (0, missing)).unflatten(1, (-1, size))
        count = inside.sum(-1)
        total = pad(problem.queries, (0, 0, 0, missing)).unflatten(3, (-1, size)).sum(4)
        last = query_pos[:, :1] + torch.arange(size, problem.block_q + missing + 1, size, device=count.device) - 1
        mean, weight = total / count.clamp(min=1)[:, :, None], count / count.sum(-1, True).clamp(min=1)
        return cls(mean, last.clamp(max=problem.mask.query_length - 1)[:, :, None], weight[:, :, None])


class Criterion(NamedTuple):
    """One way to score nodes.

    Attributes:
        score: `score(problem, nodes_of, groups, nodes)`, `[batch, head_index, q_block, group, node]`.
        groups: The queries.
        prefixes: What `build_prefixes` gives, by which each query block's own leaf is scored: of the whole leaf, the future,
            too, would be known. None: by the whole leaf, where no score of it counts, or which no statistics describe.
    """

    score: Callable[[Problem, Level, Groups, Nodes], Tensor]
    groups: Groups
    prefixes: Level | None = None

    def shares(self, problem: Problem, nodes_of: Level, nodes: Nodes) -> Float[Tensor, "batch head_index q_block node"]:
        """The share of attention that each node gets (softmax over the nodes that count), in the mean over the queries."""
        scores = self.score(problem, nodes_of, self.groups, nodes)
        if self.prefixes is not None and nodes.level == 0:
            last = (problem.last_key - 1).clamp(min=0)[:, None].expand(*problem.shape, 1)
            own = self.score(problem, self.prefixes, self.groups, Nodes(last, last >= 0, 0))
            scores = torch.where((nodes.ids == problem.diagonal)[:, :, :, None], own, scores)
        scores = scores.masked_fill(~nodes.used[:, :, :, None], -torch.inf)
        return (scores.softmax(-1).nan_to_num(0.0) * self.groups.weight).sum(3)


def by_mean(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> Tensor:
    """Each group's score on each node's mean key (Stream, section 3)."""
    return _scored(problem, _products(problem, groups.mean, nodes_of.mean, nodes), groups, nodes)


def by_box(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> Tensor:
    """Each group's greatest possible score within each node's bounds (Quest, arXiv:2406.10774)."""
    signed = torch.cat([groups.mean.clamp(min=0), groups.mean.clamp(max=0)], -1)
    return _scored(problem, _products(problem, signed, nodes_of.bounds, nodes), groups, nodes)


def by_centre(problem: Problem, nodes_of: Level, groups: Groups, nodes: Nodes) -> Tensor:
    """Each group's score on the key in the middle of each node (HiP, arXiv:2406.09827)."""
    size = problem.block_k << nodes.level
    centre = torch.minimum(nodes.ids * size + size // 2, problem.last_key[:, None] - 1)
    keys = problem.select(problem.keys.flatten(2, 3), centre)
    return _scored(problem, groups.mean @ keys.transpose(-1, -2), groups, nodes)


def _products(problem: Problem, rows: Tensor, of_nodes: Tensor, nodes: Nodes) -> Tensor:
    """`rows` `[batch, head_index, q_block, row, n]` times what is known of the nodes, `[batch, kv_head_index, node, n]`."""
    if not nodes.every:
        return rows @ problem.select(of_nodes, nodes.ids).transpose(-1, -2)
    of_head = of_nodes.repeat_interleave(rows.shape[1] // of_nodes.shape[1], 1)
    return (rows.flatten(2, 3) @ of_head.transpose(-1, -2)).unflatten(2, rows.shape[2:4])


def _scored(problem: Problem, products: Tensor, groups: Groups, nodes: Nodes) -> Tensor:
    """What the model makes of products with a whole node: for positions, the node's last key and the group's last query."""
    last_key = torch.minimum((nodes.ids + 1) * (problem.block_k << nodes.level), problem.last_key[:, None]) - 1
    return problem.score(products, groups.last, last_key[:, :, :, None])

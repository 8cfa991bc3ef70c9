"""Hierarchical refinement: which key blocks each query block reads, in O(T log T) time and O(T) memory.

After Stream (Rosser et al. 2025, section 3) and HiP (arXiv:2406.09827):

1. Cut the keys after the rotary embedding into blocks (leaves); per leaf the mean and the elementwise least and
   greatest key; a binary pyramid of those.                                                            O(T d)
2. A query block is represented by its mean query.                                                     O(T d)
3. Beam of W nodes, starting at the finest level with at most 2 W of them. Each step drops the nodes that lie wholly outside
   what the mask allows, keeps the W best, and takes their children. The ancestors of the block's own leaf and of
   the first leaf are always kept: the one's statistics contain future keys, the other is the attention sink.
                                                                                              O(T / b_q * W d log T)

`tree_masses` is that, with W = k and one score a node: what was published. `dual_masses` keeps far more of the attention at the
same budget, by four changes:

- The beam is wide, W = 4 * beam * k: at a query block a step, nodes cost little.
- Half of it is kept by the score on the nodes' means, half by the greatest score possible within their bounds.
- Four groups of neighbouring queries speak for the block; each shares itself out among the nodes (softmax), and a node's score
  is the mean of its shares: so that what few queries want strongly counts.
- The best 2 * beam * k leaves are scored exactly (`block_masses`), for all queries of the block or for some evenly spaced
  ones; the k with the most mass are kept.                                                   O(T * beam k b_k d)
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.estimator.candidates import Candidates
from tl_stream.estimator.compiled import compiled
from tl_stream.estimator.nodes import Groups, Nodes, NodeScores, by_mean_and_box
from tl_stream.estimator.problem import Problem, block_masses
from tl_stream.estimator.pyramid import Level, build_pyramid

QUERY_GROUPS = 4
WIDTH = 4


def build_levels(problem: Problem) -> list[Level]:
    """The key pyramid of a problem, padding left out."""
    n_blocks, block_k = problem.keys.shape[2:4]
    positions = torch.arange(n_blocks * block_k, device=problem.keys.device)
    valid = (positions < problem.mask.key_length)[None]
    if problem.mask.key_valid is not None:
        valid = valid & problem.mask.key_valid[:, positions.clamp(max=problem.mask.key_length - 1)]
    return build_pyramid(problem.keys, valid.expand(problem.keys.shape[0], -1).unflatten(1, (n_blocks, block_k)))


def dual_masses(
    problem: Problem,
    levels: list[Level],
    query_pos: Int[Tensor, "q_block block_q"],
    leaves: int,
    leaf_queries: int | None,
    compile: bool,
) -> Candidates:
    """Candidate key blocks and their shares of attention among them; negative where a candidate doesn't count.

    Args:
        problem: Some query blocks, all keys.
        levels: The key pyramid.
        query_pos: Position of each query.
        leaves: How many key blocks a row are scored exactly.
        leaf_queries: Queries of a block that score them; None: all.
        compile: Run the refinement and the leaves' scores through `torch.compile`.
    """
    run = compiled(_refine) if compile else _refine
    found = run(problem, levels, Groups.of(problem, query_pos, QUERY_GROUPS), dual_width(leaves), leaves, by_mean_and_box)
    some = _some_queries(problem, query_pos, leaf_queries)
    masses = block_masses(*some, found.ids, found.used, compile=compile)
    return found.ids, masses.masked_fill(~found.used, -1.0)


def dual_width(leaves: int) -> int:
    """Nodes that `dual_masses` keeps a step (W above), for so many leaves."""
    return WIDTH * leaves // 2


def tree_masses(
    problem: Problem,
    levels: list[Level],
    query_pos: Int[Tensor, "q_block block_q"],
    width: int,
    scores: NodeScores,
    compile: bool,
) -> Candidates:
    """Candidate key blocks and their shares of attention, were each key's score its leaf's; negative as above.

    Args:
        problem, levels, query_pos, compile: As `dual_masses` takes them.
        width: Nodes kept a step (W above).
        scores: How nodes are scored.
    """
    run = compiled(_refine) if compile else _refine
    block = Groups.of(problem, query_pos, 1)
    found = run(problem, levels, block, width, 2 * width, scores)
    (logits,) = scores(problem, levels[0], block, found)
    masses = logits.squeeze(3).masked_fill(~found.used, -torch.inf).softmax(-1)
    return found.ids, masses.masked_fill(~found.used, -1.0)


def _refine(problem: Problem, levels: list[Level], groups: Groups, width: int, leaves: int, scores: NodeScores) -> Nodes:
    """The leaves that remain of the tree."""
    nodes = _start(problem, levels, width)
    while nodes.level > 0:
        nodes = _children(problem, levels, _best(problem, levels, groups, nodes, width, scores))
    nodes = _best(problem, levels, groups, nodes, leaves, scores)
    return nodes._replace(ids=nodes.ids.clamp(max=problem.keys.shape[2] - 1))


def _start(problem: Problem, levels: list[Level], width: int) -> Nodes:
    """All nodes of the finest level that has at most 2 W of them."""
    level = next(i for i, nodes in enumerate(levels) if nodes.n_keys.shape[1] <= 2 * width)
    index = torch.arange(levels[level].n_keys.shape[1], device=problem.keys.device).expand(*problem.shape, -1)
    return Nodes(index, _in_range(problem, levels[level], level, index), level, every=True)


def _children(problem: Problem, levels: list[Level], nodes: Nodes) -> Nodes:
    level = nodes.level - 1
    index = torch.stack([2 * nodes.ids, 2 * nodes.ids + 1], -1).flatten(-2)
    used = nodes.used.repeat_interleave(2, -1) & _in_range(problem, levels[level], level, index)
    return Nodes(index, used, level)


def _in_range(problem: Problem, nodes_of: Level, level: int, index: Tensor) -> Tensor:
    """Whether a node holds a key that some query of the block may read."""
    size = problem.block_k << level
    inside = (index * size < problem.last_key[:, None]) & ((index + 1) * size > problem.first_key[:, None])
    return inside & (nodes_of.n_keys[problem.batch_index, index] > 0)


def _best(problem: Problem, levels: list[Level], groups: Groups, nodes: Nodes, number: int, scores: NodeScores) -> Nodes:
    """The best of the nodes: an equal part of them by each score, of those not yet taken. Those on the two paths come first."""
    if nodes.ids.shape[-1] <= number:
        return nodes
    found = scores(problem, levels[nodes.level], groups, nodes)
    on_path = (nodes.ids == problem.diagonal >> nodes.level) | (nodes.ids == problem.sink >> nodes.level)
    chosen, fresh, taken = [], [], ~nodes.used
    for i, score in enumerate(found):
        shares = score.masked_fill(~nodes.used[:, :, :, None], -torch.inf).softmax(-1)
        mean = (shares.nan_to_num(0.0) * groups.weight).sum(3).masked_fill(on_path, torch.inf)
        best = mean.masked_fill(taken, -1.0).topk((number + len(found) - 1 - i) // len(found), sorted=False).indices
        # Where fewer nodes are left than wanted, this repeats some that were taken: those must count once.
        fresh.append(~taken.gather(-1, best))
        chosen.append(best)
        taken = taken.scatter(-1, best, True)
    return nodes.take(torch.cat(chosen, -1), torch.cat(fresh, -1))


def _some_queries(problem: Problem, query_pos: Tensor, number: int | None) -> tuple[Problem, Tensor]:
    """The problem for `number` evenly spaced queries of each block, the last real one among them; and their positions."""
    if number is None or number >= problem.block_q:
        return problem, query_pos
    real = (query_pos < problem.mask.query_length).sum(-1)
    steps = torch.arange(1, number + 1, device=query_pos.device)
    chosen = ((steps * real[:, None]) // number - 1).clamp(min=0)
    index = chosen[:, :, None].expand(*problem.shape, -1, problem.queries.shape[-1])
    return problem._replace(queries=problem.queries.gather(3, index)), query_pos.gather(1, chosen)

"""Hierarchical refinement: which key blocks each query block reads, in O(T log T) time and O(T) memory.

After Stream (Rosser et al. 2025, section 3) and HiP (arXiv:2406.09827):

1. Cut the keys after the rotary embedding into blocks (leaves); per leaf the mean and the elementwise least and
   greatest key; a binary pyramid of those.                                                            O(T d)
2. A query block is represented by its mean query.                                                     O(T d)
3. Beam of W nodes, starting at the finest level with at most 2 W of them. Each step takes the children, drops those that lie
   wholly outside what the mask allows, and keeps the W best. The ancestors of the block's own leaf and of the first leaf
   are always kept: the one's statistics contain future keys, the other is the attention sink.     O(T / b_q * W d log T)

`tree_masses` is that, with W = k and one score a node: what was published. `dual_masses` changes two things, which keep far
more of the attention at the same budget: W = beam * k nodes are kept, half by their mean and half by their bounds; and

4. the up to 2 W leaves that remain are scored exactly (`block_masses`), for all queries of the block or for some
   evenly spaced ones; the k with the most mass are kept.                                       O(T * W b_k d)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.estimator.candidates import Candidates
from tl_stream.estimator.compiled import compiled
from tl_stream.estimator.nodes import NodeScores, by_mean_and_box
from tl_stream.estimator.problem import Problem, block_masses
from tl_stream.estimator.pyramid import Level, build_pyramid


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
    width: int,
    leaf_queries: int | None,
    compile: bool,
) -> Candidates:
    """Candidate key blocks and their shares of attention among them; negative where a candidate doesn't count.

    Args:
        problem: Some query blocks, all keys.
        levels: The key pyramid.
        query_pos: Position of each query.
        width: Nodes kept a step (W above).
        leaf_queries: Queries of a block that score the leaves; None: all.
        compile: Run the refinement and the leaves' scores through `torch.compile`.
    """
    run = compiled(_refine) if compile else _refine
    leaves, used = run(problem, levels, query_pos, width, by_mean_and_box)
    masses = block_masses(*_some_queries(problem, query_pos, leaf_queries), leaves, used, compile=compile)
    return leaves, masses.masked_fill(~used, -1.0)


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
        problem, levels, query_pos, width, compile: As `dual_masses` takes them.
        scores: How nodes are scored.
    """
    run = compiled(_refine) if compile else _refine
    leaves, used = run(problem, levels, query_pos, width, scores)
    (logits,) = scores(problem, levels[0], 0, _mean_query(problem, query_pos), query_pos, leaves)
    masses = logits.masked_fill(~used, -torch.inf).softmax(-1)
    return leaves, masses.masked_fill(~used, -1.0)


def _refine(
    problem: Problem, levels: list[Level], query_pos: Tensor, width: int, scores: NodeScores
) -> tuple[Tensor, Bool[Tensor, ...]]:
    """The leaves that remain of the tree, and which of them count."""
    mean_query = _mean_query(problem, query_pos)
    nodes, used, level = _start(problem, levels, width)
    while level > 0:
        if nodes.shape[-1] > width:
            found = scores(problem, levels[level], level, mean_query, query_pos, nodes)
            on_path = (nodes == problem.diagonal >> level) | (nodes == problem.sink >> level)
            nodes, used = _keep_best(found, on_path, nodes, used, width)
        level -= 1
        nodes = torch.stack([2 * nodes, 2 * nodes + 1], -1).flatten(-2)
        used = used.repeat_interleave(2, -1) & _in_range(problem, levels[level], level, nodes)
    return nodes.clamp(max=problem.keys.shape[2] - 1), used


def _keep_best(scores: tuple[Tensor, ...], on_path: Tensor, nodes: Tensor, used: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best of the nodes: an equal part of them by each score, of those not yet taken. First those on the path."""
    taken, chosen, fresh = ~used, [], []
    for i, score in enumerate(scores):
        first = score.masked_fill(on_path, torch.inf) if i == 0 else score
        part = (width + len(scores) - 1 - i) // len(scores)
        best = first.masked_fill(taken, -torch.inf).topk(part, sorted=False).indices
        # Where fewer nodes are left than wanted, this repeats some that were taken: those must count once.
        fresh.append(~taken.gather(-1, best))
        chosen.append(best)
        taken = taken.scatter(-1, best, True)
    index = torch.cat(chosen, -1)
    return nodes.gather(-1, index), torch.cat(fresh, -1)


def _some_queries(problem: Problem, query_pos: Tensor, number: int | None) -> tuple[Problem, Tensor]:
    """The problem for `number` evenly spaced queries of each block, the last real one among them; and their positions."""
    if number is None or number >= problem.block_q:
        return problem, query_pos
    real = (query_pos < problem.mask.query_length).sum(-1)
    steps = torch.arange(1, number + 1, device=query_pos.device)
    chosen = ((steps * real[:, None]) // number - 1).clamp(min=0)
    index = chosen[:, :, None].expand(*problem.shape, -1, problem.queries.shape[-1])
    return problem._replace(queries=problem.queries.gather(3, index)), query_pos.gather(1, chosen)


def _mean_query(problem: Problem, query_pos: Tensor) -> Float[Tensor, "batch head_index q_block d_head"]:
    inside = query_pos < problem.mask.query_length
    return problem.queries.sum(3) / inside.sum(-1)[:, None]


def _start(problem: Problem, levels: list[Level], width: int) -> tuple[Tensor, Bool[Tensor, ...], int]:
    """All nodes of the finest level that has at most 2 W of them."""
    level = next(i for i, nodes in enumerate(levels) if nodes.n_keys.shape[1] <= 2 * width)
    nodes = torch.arange(levels[level].n_keys.shape[1], device=problem.keys.device).expand(*problem.shape, -1)
    return nodes, _in_range(problem, levels[level], level, nodes), level


def _in_range(problem: Problem, nodes_of: Level, level: int, nodes: Tensor) -> Bool[Tensor, ...]:
    """Whether a node holds a key that some query of the block may read."""
    size = problem.block_k << level
    inside = (nodes * size < problem.last_key[:, None]) & ((nodes + 1) * size > problem.first_key[:, None])
    return inside & (nodes_of.n_keys[problem.batch_index, nodes] > 0)

"""Hierarchical refinement: which key blocks each query block reads, in O(T log T) time and O(T) memory.

After Stream (Rosser et al. 2025, section 3) and HiP (arXiv:2406.09827), with two changes that keep far more of the
attention at the same budget: nodes are kept by two scores, and the surviving leaves are scored exactly.

1. Cut the keys after the rotary embedding into blocks (leaves); per leaf the mean and the elementwise least and
   greatest key; a binary pyramid of those.                                                            O(T d)
2. A query block is represented by its mean query.                                                     O(T d)
3. Beam of W = beam * k nodes, starting at the level with at most W nodes. Each step takes the children, drops those
   that lie wholly outside what the mask allows, and keeps W: half by the mean query's score on the centroid, half by its
   greatest possible score in the node's box (Quest, arXiv:2406.10774). The ancestors of the block's own leaf and
   of the first leaf are always kept: the one's statistics contain future keys, the other is the attention sink.
                                                                                              O(T / b_q * W d log T)
4. The up to 2 W leaves that remain are scored exactly (`block_masses`), for all queries of the block or for some
   evenly spaced ones; the k with the most mass are kept.                                       O(T * W b_k d)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.estimator.compiled import compiled
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


def hierarchical_masses(
    problem: Problem,
    levels: list[Level],
    query_pos: Int[Tensor, "q_block block_q"],
    width: int,
    leaf_queries: int | None,
    compile: bool,
) -> tuple[Int[Tensor, "batch head_index q_block candidate"], Float[Tensor, "batch head_index q_block candidate"]]:
    """Candidate key blocks and the estimated share of attention of each; negative where a candidate doesn't count.

    Args:
        problem: Some query blocks, all keys.
        levels: The key pyramid.
        query_pos: Position of each query.
        width: Nodes kept a step (W above).
        leaf_queries: Queries of a block that score the leaves; None: all.
        compile: Run the refinement and the leaves' scores through `torch.compile`.
    """
    run = compiled(_refine) if compile else _refine
    nodes, used = run(problem, levels, query_pos, width)
    masses = block_masses(*_some_queries(problem, query_pos, leaf_queries), nodes, used, compile=compile)
    return nodes, masses.masked_fill(~used, -1.0)


def _refine(problem: Problem, levels: list[Level], query_pos: Tensor, width: int) -> tuple[Tensor, Bool[Tensor, ...]]:
    """The leaves that remain of the tree, and which of them count."""
    mean_query = _mean_query(problem, query_pos)
    nodes, used, level = _start(problem, levels, width)
    while level > 0:
        if nodes.shape[-1] > width:
            nodes, used = _keep_best(problem, levels[level], level, mean_query, query_pos, nodes, used, width)
        level -= 1
        nodes = torch.stack([2 * nodes, 2 * nodes + 1], -1).flatten(-2)
        used = used.repeat_interleave(2, -1) & _in_range(problem, levels[level], level, nodes)
    return nodes.clamp(max=problem.keys.shape[2] - 1), used


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


def _keep_best(
    problem: Problem,
    nodes_of: Level,
    level: int,
    mean_query: Tensor,
    query_pos: Tensor,
    nodes: Tensor,
    used: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The `width` best of the nodes: half by centroid, then half of the others by box."""
    on_path = (nodes == problem.diagonal >> level) | (nodes == problem.sink >> level)
    by_centroid, by_box = _node_scores(problem, nodes_of, level, mean_query, query_pos, nodes)
    by_centroid = by_centroid.masked_fill(on_path, torch.inf).masked_fill(~used, -torch.inf)
    first = by_centroid.topk(width - width // 2, sorted=False).indices
    taken = torch.zeros_like(used).scatter(-1, first, True)
    by_box = by_box.masked_fill(~used | taken, -torch.inf)
    second = by_box.topk(width // 2, sorted=False).indices
    chosen = torch.cat([first, second], -1)
    # Where fewer than `width` nodes count, the second half repeats some of the first: those must count once.
    fresh = torch.cat([torch.ones_like(first, dtype=torch.bool), ~taken.gather(-1, second)], -1)
    return nodes.gather(-1, chosen), used.gather(-1, chosen) & fresh


def _node_scores(
    problem: Problem, nodes_of: Level, level: int, mean_query: Tensor, query_pos: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean query's score on each node's centroid, and its greatest possible score in each node's box."""
    zeros, positive, negative = torch.zeros_like(mean_query), mean_query.clamp(min=0), mean_query.clamp(max=0)
    by_centroid, by_box = torch.cat([mean_query, zeros, zeros], -1), torch.cat([zeros, positive, negative], -1)
    products = torch.stack([by_centroid, by_box], -2) @ problem.select(nodes_of.statistics, nodes).transpose(-1, -2)
    centroid, box = products.unbind(-2)
    last_key = torch.minimum((nodes + 1) * (problem.block_k << level), problem.last_key[:, None]) - 1
    last_query = query_pos.amax(-1).clamp(max=problem.mask.query_length - 1)[:, None]
    return problem.score(centroid, last_query, last_key), problem.score(box, last_query, last_key)

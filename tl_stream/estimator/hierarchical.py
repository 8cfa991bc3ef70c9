"""Hierarchical refinement: which key blocks each query block reads, in O(T log T) time and O(T) memory.

After Stream (Rosser et al. 2025, section 3) and HiP (arXiv:2406.09827):

1. Cut the keys after the rotary embedding into blocks (leaves); per leaf the mean and the elementwise least and
   greatest key; a binary pyramid of those.                                                            O(T d)
2. A query block is represented by its mean query.                                                     O(T d)
3. Beam of W nodes (as many as the query block's position allows it), starting at the finest level with at most 2 W of them.
   Each step drops the nodes that lie wholly outside what the mask allows, keeps the W best, and takes their children. The
   ancestors of the block's own leaf and of the first leaf are always kept: the one's statistics contain future keys (the
   leaf itself is scored by its keys up to the query block's end), the other is the attention sink.
                                                                                              O(T / b_q * W d log T)

`tree_masses` is that, with W = k and one score a node: what was published. `dual_masses` keeps far more of the attention at the
same budget, by these changes:

- W = beam * k nodes are kept.
- Half of them by the mean query's score on the nodes' means, half by the greatest scores possible within their bounds of the
  queries, taken two by two: each pair shares itself out among the nodes (softmax), and a node's score is the mean of its
  shares, so that what few queries want strongly counts.
- The W leaves that remain, and k blocks that the head's queries have in common (`Common`), are scored exactly (`block_masses`),
  for all queries of the block or for some evenly spaced ones; the k with the most mass are kept.   O(T * W b_k d)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.estimator.candidates import Candidates, best
from tl_stream.estimator.compiled import compiled
from tl_stream.estimator.nodes import Criterion, Groups, Nodes, by_box, by_mean
from tl_stream.estimator.problem import Problem, block_masses
from tl_stream.estimator.pyramid import Level, build_prefixes, build_pyramid

NEIGHBOURS = 2  # queries that are taken together


class Beam(NamedTuple):
    """How many nodes are kept a step.

    Attributes:
        number: By each query block, `[head_index, q_block, 1]`.
        least: The least of these in any text, at any position.
        most: The most of them.
        start: Level from which on no query block has more than twice as many nodes to read.
        span: The most key blocks that a query block may read.
    """

    number: Int[Tensor, "head_index q_block 1"]
    least: int
    most: int
    start: int
    span: int

    def rows(self, rows: slice) -> Beam:
        """That of some query blocks."""
        return self._replace(number=self.number[:, rows])

    def times(self, factor: int) -> Beam:
        """A multiple of it, for the leaves."""
        return self._replace(number=factor * self.number, least=factor * self.least, most=factor * self.most)

    def part(self, i: int, n: int) -> tuple[int, Int[Tensor, "head_index q_block 1"]]:
        """The i-th of n equal parts: its most, and that of each query block. Earlier ones are rounded up."""
        return (self.most + n - 1 - i) // n, (self.number + n - 1 - i) // n


def build_levels(problem: Problem) -> list[Level]:
    """The key pyramid of a problem, padding left out."""
    return build_pyramid(problem.keys, _valid(problem))


def own_prefixes(problem: Problem) -> Level:
    """What is known of each query's own key block by its keys up to the query."""
    return build_prefixes(problem.keys, _valid(problem))


def _valid(problem: Problem) -> Bool[Tensor, "batch kv_block block_k"]:
    """False for keys that are padding, or past the end."""
    n_blocks, block_k = problem.keys.shape[2:4]
    positions = torch.arange(n_blocks * block_k, device=problem.keys.device)
    valid = (positions < problem.mask.key_length)[None]
    if problem.mask.key_valid is not None:
        valid = valid & problem.mask.key_valid[:, positions.clamp(max=problem.mask.key_length - 1)]
    return valid.expand(problem.keys.shape[0], -1).unflatten(1, (n_blocks, block_k))


def dual_masses(
    problem: Problem,
    levels: list[Level],
    query_pos: Int[Tensor, "q_block block_q"],
    beam: Beam,
    common: tuple[Tensor, Tensor] | None,
    leaf_queries: int | None,
    compile: bool,
) -> Candidates:
    """Candidate key blocks and their shares of attention among them; negative where a candidate doesn't count.

    Args:
        problem: Some query blocks, all keys.
        levels: The key pyramid.
        query_pos: Position of each query.
        beam: Nodes kept a step (W above).
        common: What `Common.blocks` gives for these query blocks: candidates, too; None: none.
        leaf_queries: Queries of a block that score the leaves; None: all.
        compile: Run the refinement and the leaves' scores through `torch.compile`.
    """
    block, pairs = (Groups.of(problem, query_pos, size) for size in (problem.block_q, NEIGHBOURS))
    run = compiled(_refine) if compile else _refine
    leaves = run(problem, levels, (Criterion(by_mean, block), Criterion(by_box, pairs)), beam, beam)
    if common is not None:
        leaves = _with_common(problem, leaves, *common)
    masses = block_masses(*_some_queries(problem, query_pos, leaf_queries), leaves.ids, leaves.used, compile=compile)
    return leaves.ids, masses.masked_fill(~leaves.used, -1.0)


def tree_masses(
    problem: Problem,
    levels: list[Level],
    query_pos: Int[Tensor, "q_block block_q"],
    beam: Beam,
    score: Callable[[Problem, Level, Groups, Nodes], Tensor],
    prefixes: Level | None,
    compile: bool,
) -> Candidates:
    """Candidate key blocks and their shares of attention, were each key's score its leaf's; negative as above.

    Args:
        problem, levels, query_pos, beam, compile: As `dual_masses` takes them.
        score, prefixes: How nodes are scored (`Criterion`).
    """
    criterion = Criterion(score, Groups.of(problem, query_pos, problem.block_q), prefixes)
    run = compiled(_refine) if compile else _refine
    leaves = run(problem, levels, (criterion,), beam, beam.times(2))
    return leaves.ids, criterion.shares(problem, levels[0], leaves).masked_fill(~leaves.used, -1.0)


def _refine(problem: Problem, levels: list[Level], criteria: tuple[Criterion, ...], beam: Beam, leaves: Beam) -> Nodes:
    """The best leaves, at most so many, with at most the beam's nodes on the way."""
    nodes = _start(problem, levels, beam)
    while nodes.level > 0:
        nodes = _children(problem, levels, _best(problem, levels, criteria, nodes, beam))
    nodes = _best(problem, levels, criteria, nodes, leaves)
    return nodes._replace(ids=nodes.ids.clamp(max=problem.keys.shape[2] - 1))


def _start(problem: Problem, levels: list[Level], beam: Beam) -> Nodes:
    """All that it may read of the finest level of which every query block may keep half: under a window, those within it."""
    level = min(beam.start, len(levels) - 1)
    n_nodes, size = levels[level].n_keys.shape[1], problem.block_k << level
    within = (beam.span - 1 >> level) + 2  # a window may begin and end amid a node
    index = torch.arange(min(within, n_nodes), device=problem.keys.device).expand(*problem.shape, -1)
    if within >= n_nodes:
        return Nodes(index, _in_range(problem, levels[level], level, index), level, every=True)
    index = index + problem.first_key[:, None] // size
    inside, index = index < n_nodes, index.clamp(max=n_nodes - 1)
    return Nodes(index, _in_range(problem, levels[level], level, index) & inside, level)


def _children(problem: Problem, levels: list[Level], nodes: Nodes) -> Nodes:
    level = nodes.level - 1
    index = torch.stack([2 * nodes.ids, 2 * nodes.ids + 1], -1).flatten(-2)
    used = nodes.used.repeat_interleave(2, -1) & _in_range(problem, levels[level], level, index)
    return Nodes(index, used, level)


def _in_range(problem: Problem, nodes_of: Level, level: int, index: Tensor) -> Tensor:
    """Whether a node holds a key that some query of the block may read."""
    return problem.readable(index, problem.block_k << level) & (nodes_of.n_keys[problem.batch_index, index] > 0)


def _best(problem: Problem, levels: list[Level], criteria: tuple[Criterion, ...], nodes: Nodes, beam: Beam) -> Nodes:
    """The best of the nodes: an equal part of them by each criterion, of those not yet taken. The two paths come first."""
    if nodes.ids.shape[-1] <= beam.least:
        return nodes
    # What the block's own ancestor holds of the future must not weigh in the others' shares.
    own = nodes.ids == problem.diagonal >> nodes.level
    on_path, others = own | (nodes.ids == problem.sink >> nodes.level), nodes._replace(used=nodes.used & ~own)
    chosen, fresh, taken = [], [], ~nodes.used
    for i, criterion in enumerate(criteria):
        shares = criterion.shares(problem, levels[nodes.level], others).masked_fill(on_path, 2.0)
        most, number = beam.part(i, len(criteria))
        first = best(shares.masked_fill(taken, -1.0), nodes.ids, min(most, shares.shape[-1]))
        within = torch.arange(first.shape[-1], device=first.device) < number
        # Where fewer nodes are left than wanted, this repeats some that were taken: those must count once.
        fresh.append(~taken.gather(-1, first) & within)
        chosen.append(first)
        taken = taken.scatter(-1, first, taken.gather(-1, first) | within)
    return nodes.take(torch.cat(chosen, -1), torch.cat(fresh, -1))


def _with_common(problem: Problem, leaves: Nodes, blocks: Tensor, possible: Tensor) -> Nodes:
    """The leaves and what the head's queries have in common, by position; a block that is there twice counts once."""
    ids, used = torch.cat([leaves.ids, blocks], -1), torch.cat([leaves.used, possible], -1)
    placed, order = ids.masked_fill(~used, problem.keys.shape[2]).sort(-1)
    again = placed == pad(placed, (1, 0), value=-1)[..., :-1]
    return Nodes(ids.gather(-1, order), used.gather(-1, order) & ~again, 0)


def _some_queries(problem: Problem, query_pos: Tensor, number: int | None) -> tuple[Problem, Tensor]:
    """The problem for `number` evenly spaced queries of each block, the last real one among them; and their positions."""
    if number is None or number >= problem.block_q:
        return problem, query_pos
    real_first = torch.sort(~problem.real, dim=-1, stable=True).indices
    steps = torch.arange(1, number + 1, device=query_pos.device)
    rank = ((steps * problem.real.sum(-1, True)) // number - 1).clamp(min=0)
    chosen = real_first.gather(1, rank)
    index = chosen[:, :, None].expand(*problem.shape, -1, problem.queries.shape[-1])
    part = problem._replace(queries=problem.queries.gather(3, index), real=problem.real.gather(1, chosen))
    return part, query_pos.gather(1, chosen)

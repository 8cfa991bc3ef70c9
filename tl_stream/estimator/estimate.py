"""`estimate_layout`: the best key blocks of every query block, by the configured estimator and budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.budget import Budget
from tl_stream.config import StreamConfig
from tl_stream.estimator.candidates import Candidates, Estimator
from tl_stream.estimator.common import Asked, Common
from tl_stream.estimator.earlier import Earlier, Sample
from tl_stream.estimator.exact import exact_masses
from tl_stream.estimator.hierarchical import build_levels, dual_masses, own_prefixes, tree_masses
from tl_stream.estimator.keep import Limits, keep_most
from tl_stream.estimator.nodes import by_box, by_centre, by_mean
from tl_stream.estimator.problem import Problem
from tl_stream.estimator.static import random_masses, window_masses
from tl_stream.estimator.texts import cut_padding, put_back
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.precision import outside_autocast
from tl_stream.score_mod import ScoreMod

_OF_A_SHARE = 4  # numbers that go with a candidate's share of attention while the best are sought
_RUNS_IN_REACH = 8
_TREES = {"stream": by_mean, "hip": by_centre, "box": by_box}


@torch.no_grad()
@outside_autocast
def estimate_layout(
    q: Float[Tensor, "batch head_index query_pos d_head"],
    k: Float[Tensor, "batch kv_head_index key_pos d_head"],
    config: StreamConfig,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    score_mods: Sequence[ScoreMod] = (),
    layer: int = 0,
    earlier: Earlier | None = None,
) -> BlockLayout:
    """Choose the key blocks that each query block reads most, as many as the budget `config.k` allows.

    Args:
        q: Queries, after any rotary embedding.
        k: Keys, likewise; query head h reads kv head `h // (head_index / kv_head_index)`.
        config: Blocks, budget and estimator.
        mask: Which token pairs may attend; None: causal, the queries being the last of the keys.
        scale: Factor on q . k; None: `d_head ** -0.5`.
        score_mods: What the model does to the scaled scores before the softmax.
        layer: Whose q and k these are, for a `PerHead` budget.
        earlier: With `block_q=1`, the runs before this one, whose keys are the first of `k`: then the rows choose as they do
            where all queries are given. This run is noted, too. None: nothing is known of earlier queries.

    Returns:
        A layout of at most that many key blocks a query block; a full one where the budget covers every key block.

    Raises:
        ValueError: Query heads are no multiple of key heads, the mask has other lengths than q and k, or an own estimator's
            result is of another shape than expected.
    """
    mask = AttentionMask.causal(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    _check_shapes(q, k, mask)
    block_q, block_k = min(config.block_q, q.shape[2]), min(config.block_k, k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    budgets = [config.budget.of_head(layer, head) for head in range(q.shape[1])]
    full = BlockLayout.full(mask, block_q, block_k, q.shape[0], q.shape[1])
    is_full = all(each.blocks(full.n_kv_blocks) == full.n_kv_blocks and each.share is None for each in budgets)
    if is_full and earlier is None:
        return full
    parts = []
    for part in cut_padding(q, k, mask, block_q, block_k, scale, score_mods):
        sample = None if earlier is None else earlier.of(part.problem, layer, part.text)
        if not is_full:
            parts.append((part, *_kept(part.problem, config, budgets, sample)))
    if is_full:
        return full
    indices, number = parts[0][1:] if mask.tokens is None else put_back(parts, full)
    if config.budget.needs_shares or mask.tokens is not None:  # then most rows may have fewer blocks than allowed
        indices = indices[..., : max(int(number.max()), 1)]
    return replace(full, kv_indices=indices, kv_num_blocks=number)


def _kept(problem: Problem, config: StreamConfig, budgets: list[Budget], sample: Sample | None) -> tuple[Tensor, Tensor]:
    """Kept blocks `[batch, head_index, q_block, slot]`, and how many of them count."""
    limits = Limits(problem, budgets)
    chunks = [keep_most(*run, limits, config) for run in block_shares(problem, config, limits, sample)]
    indices, number = (torch.cat(parts, 2) for parts in zip(*chunks, strict=True))
    return indices, number


def block_shares(
    problem: Problem, config: StreamConfig, limits: Limits, sample: Sample | None = None
) -> Iterator[tuple[Problem, slice, Tensor, Tensor]]:
    """Candidate key blocks and the share of attention that the configured estimator reckons each to hold, run by run.

    Args:
        problem: All queries and keys.
        config: The estimator.
        limits: How many blocks are wanted.
        sample: The text's earlier queries, and the problem's own; None: there are none, or they aren't known.

    Yields:
        The problem for a run of query blocks, which ones these are, candidates, and shares; negative where one doesn't count.
    """
    positions = torch.arange(problem.shape[2] * problem.block_q, device=problem.keys.device).view(-1, problem.block_q)
    for name, first, last in _by_estimator(problem, config):
        estimate, entries, most = _estimator(problem, name, config, limits, sample)
        for start, stop in problem.runs(entries, first, last, most):
            part, rows = problem.slice(start, stop), slice(start, stop)
            yield part, rows, *_checked(part, *estimate(part, rows, positions[rows]))


def _by_estimator(problem: Problem, config: StreamConfig) -> Iterator[tuple[str | Estimator, int, int]]:
    """Runs `first <= i < last` of query blocks with one estimator: `"auto"` decides by how many keys a block may read."""
    n_blocks = problem.shape[2]
    if config.estimator != "auto":
        yield config.estimator, 0, n_blocks
        return
    few = (problem.last_key - problem.first_key <= config.exact_below).tolist()
    first = 0
    for is_few, blocks in itertools.groupby(few):
        last = first + len(list(blocks))
        yield "exact" if is_few else "dual", first, last
        first = last


def _estimator(
    problem: Problem, name: str | Estimator, config: StreamConfig, limits: Limits, sample: Sample | None
) -> tuple[Callable[[Problem, slice, Tensor], Candidates], int, int | None]:
    """The estimator as a function of some query blocks, how many numbers one of these needs, and the most of these in a run."""
    n_blocks, most = problem.keys.shape[2], limits.most
    of_keys = 3 * problem.keys.shape[-1]  # numbers a candidate whose keys are selected, which copies them
    match name:
        case "dual":
            levels, width = build_levels(problem), config.beam * most
            common = _in_common(problem, most, sample) if limits.exceed(config.beam) else None
            beam = limits.beam(config.beam)

            def dual(part: Problem, rows: slice, query_pos: Tensor) -> Candidates:
                wanted = None if common is None else common.blocks(part, query_pos, limits.blocks[:, rows])
                return dual_masses(part, levels, query_pos, beam.rows(rows), wanted, config.leaf_queries, config.compile)

            return dual, min(2 * width, n_blocks) * of_keys, None
        case "stream" | "hip" | "box":
            levels, score, beam = build_levels(problem), _TREES[name], limits.beam(1)
            prefixes = None if name == "hip" else own_prefixes(problem)  # a centre key is never one of the future

            def tree(part: Problem, rows: slice, query_pos: Tensor) -> Candidates:
                return tree_masses(part, levels, query_pos, beam.rows(rows), score, prefixes, config.compile)

            return tree, min(2 * most, n_blocks) * of_keys, None
        case "exact":
            return (lambda part, rows, query_pos: exact_masses(part, query_pos)), n_blocks * _OF_A_SHARE, _short(problem)
        case "window":
            return (lambda part, rows, query_pos: window_masses(part, most)), most * _OF_A_SHARE, None
        case "random":
            return (lambda part, rows, query_pos: random_masses(part, config.seed or 0)), n_blocks * _OF_A_SHARE, None
        case own:
            assert callable(own)
            return (lambda part, rows, query_pos: own(part, query_pos)), n_blocks * of_keys, None


def _short(problem: Problem) -> int:
    """Query blocks in a run that scores all keys which any of them may read: few, beside which little is scored in vain."""
    reach = min(int((problem.last_key - problem.first_key).max()), problem.mask.key_length)
    return max(1, reach // (_RUNS_IN_REACH * problem.block_q))


def _in_common(problem: Problem, number: int, sample: Sample | None) -> Common:
    """What the head's queries have in common."""
    return Common.of(Asked.of(problem), number) if sample is None else sample.in_common(problem, number)


def _checked(problem: Problem, blocks: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """What an estimator gave, if it is of the right shape."""
    if blocks.shape != masses.shape or blocks.shape[:3] != problem.shape:
        raise ValueError(
            f"The estimator gave blocks {tuple(blocks.shape)} and masses {tuple(masses.shape)}; expected both to be "
            f"[batch, head_index, q_block, candidate] = {(*problem.shape, 'candidate')}."
        )
    return blocks, masses


def _check_shapes(q: Tensor, k: Tensor, mask: AttentionMask) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k had {k.shape[1]} heads; expected a divisor of q's {q.shape[1]} heads (grouped queries).")
    if (mask.query_length, mask.key_length) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask was for {mask.query_length} queries and {mask.key_length} keys; expected q's {q.shape[2]} and "
            f"k's {k.shape[2]}."
        )

"""`estimate_layout`: the best key blocks of every query block, by the configured estimator and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.config import StreamConfig
from tl_stream.estimator.candidates import Estimator
from tl_stream.estimator.common import Common
from tl_stream.estimator.exact import exact_masses
from tl_stream.estimator.hierarchical import build_levels, dual_masses, tree_masses
from tl_stream.estimator.keep import Limits, keep_most
from tl_stream.estimator.nodes import by_box, by_centre, by_mean
from tl_stream.estimator.problem import Problem
from tl_stream.estimator.static import random_masses, window_masses
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.precision import outside_autocast
from tl_stream.score_mod import ScoreMod

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

    Returns:
        A layout of at most that many key blocks a query block; a full one where the budget covers every key block.

    Raises:
        ValueError: Query heads are no multiple of key heads, the mask has other lengths than q and k, or an own estimator's
            result is of another shape than expected.
    """
    mask = AttentionMask.causal(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    _check_shapes(q, k, mask)
    block_q, block_k = min(config.block_q, q.shape[2]), min(config.block_k, k.shape[2])
    full = BlockLayout.full(mask, block_q, block_k, q.shape[0], q.shape[1])
    problem = Problem.of(q, k, mask, block_q, block_k, q.shape[-1] ** -0.5 if scale is None else scale, score_mods)
    limits = Limits(problem, [config.budget.of_head(layer, head) for head in range(q.shape[1])])
    if limits.all:
        return full
    chunks = [keep_most(*run, limits, config) for run in block_shares(problem, config, limits.most)]
    indices, number = (torch.cat(parts, 2) for parts in zip(*chunks, strict=True))
    if config.budget.needs_shares:  # then most rows may have fewer blocks than allowed
        indices = indices[..., : max(int(number.max()), 1)]
    return BlockLayout(indices, number, mask, block_q, block_k, q.shape[0], q.shape[1])


def block_shares(problem: Problem, config: StreamConfig, most: int) -> Iterator[tuple[Problem, slice, Tensor, Tensor]]:
    """Candidate key blocks and the share of attention that the configured estimator reckons each to hold, run by run.

    Args:
        problem: All queries and keys.
        config: The estimator.
        most: How many blocks a row are wanted, at most.

    Yields:
        The problem for a run of query blocks, which ones these are, candidates, and shares; negative where one doesn't count.
    """
    estimate, candidates = _estimator(problem, config, most)
    positions = torch.arange(problem.shape[2] * problem.block_q, device=problem.keys.device).view(-1, problem.block_q)
    for start, stop in problem.runs(candidates * 3 * problem.keys.shape[-1]):
        part = problem.slice(start, stop)
        yield part, slice(start, stop), *_checked(part, *estimate(part, positions[start:stop]))


def _estimator(problem: Problem, config: StreamConfig, most: int) -> tuple[Estimator, int]:
    """The estimator as a function of some query blocks, and how many candidates a row it scores at most."""
    n_blocks = problem.keys.shape[2]
    match config.estimator_for(problem.mask.key_length):
        case "dual":
            levels, width = build_levels(problem), config.beam * most
            common = Common.of(problem, most) if width < n_blocks else None
            options = width, common, config.leaf_queries, config.compile
            return (lambda part, rows: dual_masses(part, levels, rows, *options)), min(2 * width, n_blocks)
        case "stream" | "hip" | "box" as name:
            levels, score = build_levels(problem), _TREES[name]
            return (lambda part, rows: tree_masses(part, levels, rows, most, score, config.compile)), min(2 * most, n_blocks)
        case "exact":
            return exact_masses, n_blocks
        case "window":
            return (lambda part, rows: window_masses(part, most)), most
        case "random":
            generator = torch.Generator().manual_seed(config.seed or 0)
            return (lambda part, rows: random_masses(part, generator)), n_blocks
        case own:
            assert callable(own)
            return own, n_blocks


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

"""`estimate_layout`: the k best key blocks of every query block, by the configured estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.config import StreamConfig
from tl_stream.estimator.exact import exact_masses
from tl_stream.estimator.hierarchical import build_levels, hierarchical_masses
from tl_stream.estimator.problem import Problem
from tl_stream.estimator.static import random_masses, window_masses
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import ScoreMod

Masses = Callable[[Problem, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def estimate_layout(
    q: Float[Tensor, "batch head_index query_pos d_head"],
    k: Float[Tensor, "batch kv_head_index key_pos d_head"],
    config: StreamConfig,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    score_mods: Sequence[ScoreMod] = (),
) -> BlockLayout:
    """Choose the `config.k` key blocks that each query block reads most.

    Args:
        q: Queries, after any rotary embedding.
        k: Keys, likewise; query head h reads kv head `h // (head_index / kv_head_index)`.
        config: Blocks, budget and estimator.
        mask: Which token pairs may attend; None: causal, the queries being the last of the keys.
        scale: Factor on q . k; None: `d_head ** -0.5`.
        score_mods: What the model does to the scaled scores before the softmax.

    Returns:
        A layout of at most k key blocks a query block; a full one where k covers every key block.

    Raises:
        ValueError: Query heads are no multiple of key heads, or the mask has other lengths than q and k.
    """
    mask = AttentionMask.causal(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    _check_shapes(q, k, mask)
    block_q, block_k = min(config.block_q, q.shape[2]), min(config.block_k, k.shape[2])
    full = BlockLayout.full(mask, block_q, block_k, q.shape[0], q.shape[1])
    if config.k >= full.n_kv_blocks:
        return full
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    problem = Problem.of(q, k, mask, block_q, block_k, scale, score_mods)
    masses, candidates = _estimator(problem, config)
    chunks = []
    for start, stop in problem.runs(candidates * 3 * q.shape[-1]):
        query_pos = full.query_positions(start, stop)
        part = problem.slice(start, stop)
        chunks.append(keep_most(part, *masses(part, query_pos), config))
    indices, number = (torch.cat(parts, 2) for parts in zip(*chunks, strict=True))
    return BlockLayout(indices, number, mask, block_q, block_k, q.shape[0], q.shape[1])


def keep_most(
    problem: Problem, blocks: Tensor, masses: Tensor, config: StreamConfig
) -> tuple[Int[Tensor, "batch head_index q_block slot"], Int[Tensor, "batch head_index q_block"]]:
    """The k candidate blocks of greatest mass, sorted by position, and how many of them count (mass >= 0)."""
    forced = torch.zeros_like(masses, dtype=torch.bool)
    if config.keep_local:
        forced = forced | (blocks == problem.diagonal)
    if config.keep_sink:
        forced = forced | (blocks == problem.sink)
    # 2 exceeds any share of attention, so that what must be kept comes first.
    ranked = masses.masked_fill(forced & (masses >= 0), 2.0)
    best = ranked.topk(min(config.k, ranked.shape[-1]), sorted=False)
    used = best.values >= 0
    past_the_end = problem.keys.shape[2]
    indices = blocks.gather(-1, best.indices).masked_fill(~used, past_the_end).sort(-1).values
    return indices.masked_fill(indices == past_the_end, 0).int(), used.sum(-1).int()


def _estimator(problem: Problem, config: StreamConfig) -> tuple[Masses, int]:
    """The estimator as a function of some query blocks, and how many candidates a row it scores."""
    n_blocks = problem.keys.shape[2]
    match config.estimator:
        case "dual":
            levels = build_levels(problem)
            width = config.beam * config.k
            options = width, config.leaf_queries, config.compile
            return (lambda part, rows: hierarchical_masses(part, levels, rows, *options)), min(2 * width, n_blocks)
        case "exact":
            return exact_masses, n_blocks
        case "window":
            return (lambda part, rows: window_masses(part, config.k)), config.k
        case _:
            generator = torch.Generator().manual_seed(config.seed or 0)
            return (lambda part, rows: random_masses(part, generator)), n_blocks


def _check_shapes(q: Tensor, k: Tensor, mask: AttentionMask) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k had {k.shape[1]} heads; expected a divisor of q's {q.shape[1]} heads (grouped queries).")
    if (mask.query_length, mask.key_length) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask was for {mask.query_length} queries and {mask.key_length} keys; expected q's {q.shape[2]} and "
            f"k's {k.shape[2]}."
        )

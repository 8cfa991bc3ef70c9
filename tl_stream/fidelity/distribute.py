"""A total budget, distributed over heads and layers by the attention that each further block holds.

A head's curve is the mean attention of its rows' best block, second best, and so on: it falls, so that taking the greatest of
all heads' next steps, again and again, gives the distribution that keeps the most attention in the mean over heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.budget import PerHead
from tl_stream.config import StreamConfig, as_config
from tl_stream.estimator import Problem, block_shares
from tl_stream.tensors import BlockSparseScores
from tl_stream.tensors.scores_data import ScoresData
from tl_stream.tracing import run_with_sparse_cache


@torch.no_grad()
def distribute(
    model: Any, tokens: Any, blocks: float, *, config: StreamConfig | None = None, at_most: int = 64, **kwargs: Any
) -> PerHead:
    """A budget of `blocks` key blocks a query block in the mean over all heads, more for the heads that spread their attention.

    The model reads the text once with full attention (streamed: linear memory, quadratic time).

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        tokens: The text, as the model takes it.
        blocks: Key blocks a query block and head, in the mean over heads.
        config: Blocks and estimator, by whose shares the heads are judged; None: the defaults.
        at_most: Most blocks that a head can get.
        **kwargs: As for `run_with_sparse_cache`.

    Returns:
        A budget for `StreamConfig(k=...)`, at least 1 block a head.

    Raises:
        ValueError: `blocks` is below 1 or above `at_most`.
    """
    if not 1 <= blocks <= at_most:
        raise ValueError(f"blocks was {blocks}, with at_most={at_most}; expected 1 <= blocks <= at_most.")
    config = replace(as_config(config), k=at_most, forward="exact", layout_from=None, dense_queries=0)
    kwargs["names_filter"] = lambda name: name.endswith("hook_attn_scores")
    _, cache = run_with_sparse_cache(model, tokens, config=config, **kwargs)
    found = [scores for scores in cache.values() if isinstance(scores, BlockSparseScores)]
    curves = {scores._data.origin.layer: curve(scores, config, at_most) for scores in found}
    names = [(layer, head) for layer, steps in curves.items() for head in range(len(steps))]
    steps = torch.cat(list(curves.values()))
    steps[:, 0] = torch.inf
    best = steps.flatten().topk(round(blocks * len(names))).indices // at_most
    numbers = torch.bincount(best, minlength=len(names)).tolist()
    return PerHead(dict(zip(names, numbers, strict=True)), otherwise=round(blocks))


def curve(scores: BlockSparseScores, config: StreamConfig, at_most: int) -> Float[Tensor, "head_index rank"]:
    """The share of attention that the r-th best key block holds, in the mean over the query blocks of each head."""
    data = scores._data
    assert isinstance(data, ScoresData)
    layout, products = data.layout, data.products
    problem = Problem.of(
        products.q, products.k, layout.mask, layout.block_q, layout.block_k, products.scale, products.score_mods
    )
    parts = []
    for *_, shares in block_shares(problem, config, at_most):
        ranked = shares.clamp(min=0).topk(min(at_most, shares.shape[-1])).values
        parts.append(pad(ranked, (0, at_most - ranked.shape[-1])))
    return torch.cat(parts, 2).mean((0, 2))

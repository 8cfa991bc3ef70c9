"""How much of a token can reach a later position at all: the path-sum bound on over-squashing.

Barbero et al. 2024, arXiv:2406.04267, section 5: where attention is taken as it is, the derivative of the last position's
output by token i's input is at most C times the sum over all paths from i to it of the products of their weights; a step from
j to i has the weight a_ij / beta + delta_ij. Here beta = 1, and a is the mean over heads: the sums are the target's row of
(A_L + I) ... (A_1 + I), one sparse product of a vector a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.kept import KeptEntries, KeptRows, patterns_of
from tl_stream.analysis.path_sums import PathSums
from tl_stream.analysis.spans import checked_position


@torch.no_grad()
def over_squashing(cache: Any, target_pos: int | Sequence[int] = -1, *, text: int = 0) -> PathSums:
    """The path sums from every token to some positions, through all cached layers. O(T) time and memory for a constant k.

    A causal model reads a text up to a position as it would read a text that ends there, so that targets are also lengths.
    (In a sparse run the choice of blocks may differ: that of the target's block of queries knows the block's later queries.)

    Args:
        cache: A SparseActivationCache with patterns.
        target_pos: Position(s) that are reached; negative ones count from the end.
        text: Index in the batch.

    Raises:
        IndexError: A target isn't in the text.
        TypeError: Not a sparse cache.
        ValueError: No patterns, or no targets.
    """
    patterns = {layer: KeptEntries.of(pattern, text) for layer, pattern in patterns_of(cache).items()}
    entries = next(iter(patterns.values()))
    given = [target_pos] if isinstance(target_pos, int) else list(target_pos)
    if not given:
        raise ValueError("target_pos was empty; expected a position, or some.")
    targets = [checked_position("target_pos", position, entries.length) for position in given]
    sums = torch.zeros(len(targets), entries.length, dtype=torch.float64, device=entries.device)
    sums[range(len(targets)), targets] = 1.0
    for _, layer in sorted(patterns.items(), reverse=True):
        sums = sums + sum((_through(sums, run, entries.length) for run in layer.runs()), torch.zeros_like(sums))
    return PathSums(tuple(targets), sums.cpu(), len(patterns), cache.config.forward)


def _through(sums: Float[Tensor, "target pos"], run: KeptRows, length: int) -> Float[Tensor, "target pos"]:
    """`sums @ A` for the rows of one run, A the mean over heads."""
    inside = run.query_pos < length
    row = torch.where(inside, sums[:, run.query_pos.clamp(max=length - 1)], 0.0)
    keys: Int[Tensor, " entry"] = run.key_pos.clamp(max=length - 1).flatten()
    total = torch.zeros_like(sums)
    for target, weights in enumerate(row):
        added = torch.einsum("bq,hbqk->hbk", weights, run.weight.double()) / len(run.weight)
        total[target].index_add_(0, keys, added.flatten())
    return total

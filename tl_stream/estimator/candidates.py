"""What an estimator gives: candidate key blocks, and the share of attention that it reckons each to hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.estimator.problem import Problem

Candidates = tuple[Int[Tensor, "batch head_index q_block candidate"], Float[Tensor, "batch head_index q_block candidate"]]
Estimator = Callable[[Problem, Int[Tensor, "q_block block_q"]], Candidates]


def best(
    shares: Float[Tensor, "*rows candidate"], ids: Int[Tensor, "*rows candidate"], number: int
) -> Int[Tensor, "*rows best"]:
    """Where the `number` greatest shares stand, the greatest first; of equal ones, that of the least id.

    `topk` alone would choose between equal ones (of 0, or under a soft-cap that saturates) by how many there are, and so by
    what comes after a row in the text.
    """
    ordered = (shares.float().view(torch.int32).long() << 32) - ids  # shares below 0 are all the same
    return ordered.topk(number).indices

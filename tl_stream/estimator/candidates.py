"""What an estimator gives: candidate key blocks, and the share of attention that it reckons each to hold."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.estimator.problem import Problem

Candidates = tuple[Int[Tensor, "batch head_index q_block candidate"], Float[Tensor, "batch head_index q_block candidate"]]
Estimator = Callable[[Problem, Int[Tensor, "q_block block_q"]], Candidates]

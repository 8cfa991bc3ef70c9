"""Which key blocks each query block reads."""

from tl_stream.estimator.candidates import Candidates, Estimator
from tl_stream.estimator.earlier import Earlier
from tl_stream.estimator.estimate import block_shares, estimate_layout
from tl_stream.estimator.keep import Limits, are_own, in_order
from tl_stream.estimator.problem import Problem, block_masses
from tl_stream.estimator.texts import cut_padding

__all__ = [
    "Candidates",
    "Earlier",
    "Estimator",
    "Limits",
    "Problem",
    "are_own",
    "block_masses",
    "block_shares",
    "cut_padding",
    "estimate_layout",
    "in_order",
]

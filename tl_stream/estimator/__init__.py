"""Which key blocks each query block reads."""

from tl_stream.estimator.candidates import Candidates, Estimator
from tl_stream.estimator.estimate import block_shares, estimate_layout
from tl_stream.estimator.problem import Problem, block_masses

__all__ = ["Candidates", "Estimator", "Problem", "block_masses", "block_shares", "estimate_layout"]

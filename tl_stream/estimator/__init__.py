"""Which key blocks each query block reads."""

from tl_stream.estimator.estimate import estimate_layout

__all__ = ["estimate_layout"]

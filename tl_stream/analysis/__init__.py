"""Analyses of what a sparse cache shows: what heads do, and where information flows."""

from tl_stream.analysis.head_scores import head_scores

__all__ = ["head_scores"]

"""Analyses of what sparse runs show and can do."""

from tl_stream.analysis.needle_result import NeedleCell, NeedleGrid
from tl_stream.analysis.needle_study import needle_grid

__all__ = ["NeedleCell", "NeedleGrid", "needle_grid"]

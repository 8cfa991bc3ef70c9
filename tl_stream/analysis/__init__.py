"""What Stream is used for: studies of a model on a text, each with a statement of what it is exact for."""

from tl_stream.analysis.flip_result import Flip, FlipRun, Flips
from tl_stream.analysis.flips import find_flips

__all__ = ["Flip", "FlipRun", "Flips", "find_flips"]

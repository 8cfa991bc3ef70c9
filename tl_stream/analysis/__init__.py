"""What Stream is used for: studies of a model on a text, each with a statement of what it is exact for."""

from tl_stream.analysis.flip_result import Flip, FlipRun, Flips
from tl_stream.analysis.flips import find_flips
from tl_stream.analysis.patching import patch_by_block
from tl_stream.analysis.patching_result import Effect, PatchEffects

__all__ = ["Effect", "Flip", "FlipRun", "Flips", "PatchEffects", "find_flips", "patch_by_block"]

"""Long-context tasks whose answers, and the places they depend on, are known by construction."""

from tl_stream.tasks.needle import NeedleTask, niah, niah_multikey_1, niah_single_1
from tl_stream.tasks.reasoning import ReasoningTask, Sentence, reasoning_trace
from tl_stream.tasks.text import Span
from tl_stream.tasks.tracking import TrackingTask, variable_tracking

__all__ = [
    "NeedleTask",
    "ReasoningTask",
    "Sentence",
    "Span",
    "TrackingTask",
    "niah",
    "niah_multikey_1",
    "niah_single_1",
    "reasoning_trace",
    "variable_tracking",
]

"""Long-context tasks whose answers, and the places they depend on, are known by construction."""

from tl_stream.tasks.chat import chat_prompt, in_chat
from tl_stream.tasks.frequency import FrequencyTask, cwe, fwe
from tl_stream.tasks.needle import NeedleTask, niah
from tl_stream.tasks.reasoning import ReasoningTask, Sentence, reasoning_trace
from tl_stream.tasks.ruler import (
    RULER,
    niah_multikey_1,
    niah_multikey_2,
    niah_multikey_3,
    niah_multiquery,
    niah_multivalue,
    niah_single_1,
    niah_single_2,
    niah_single_3,
)
from tl_stream.tasks.spans import Span
from tl_stream.tasks.task import Task, score
from tl_stream.tasks.tracking import TrackingTask, variable_tracking, vt

__all__ = [
    "RULER",
    "FrequencyTask",
    "NeedleTask",
    "ReasoningTask",
    "Sentence",
    "Span",
    "Task",
    "TrackingTask",
    "chat_prompt",
    "cwe",
    "fwe",
    "in_chat",
    "niah",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "reasoning_trace",
    "score",
    "variable_tracking",
    "vt",
]

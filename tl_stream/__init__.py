"""tl_stream: attention in long contexts, traced sparsely inside TransformerLens (Stream, arXiv:2510.19875)."""

from importlib import import_module
from typing import Any

from tl_stream import analysis, budget, models, tasks
from tl_stream.cache import SparseActivationCache
from tl_stream.config import StreamConfig
from tl_stream.estimator import estimate_layout
from tl_stream.fidelity import distribute, fidelity, find_budget
from tl_stream.hosts import Support, supports
from tl_stream.layout import BlockLayout
from tl_stream.recheck import recheck
from tl_stream.tensors import BlockSparsePattern, BlockSparseScores
from tl_stream.tracing import register, run_with_sparse_cache, sparse

__version__ = "0.1.0"
__all__ = [
    "BlockLayout",
    "BlockSparsePattern",
    "BlockSparseScores",
    "SparseActivationCache",
    "StreamConfig",
    "Support",
    "analysis",
    "budget",
    "distribute",
    "estimate_layout",
    "fidelity",
    "find_budget",
    "models",
    "recheck",
    "run_with_sparse_cache",
    "sparse",
    "supports",
    "tasks",
    "viz",
]

register()


def __getattr__(name: str) -> Any:
    """`tl_stream.viz`, imported where it is asked for: it brings circuitsvis along."""
    if name == "viz":
        return import_module("tl_stream.viz")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

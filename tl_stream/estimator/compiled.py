"""The estimator's functions through `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """One compilation a kind of mask and a power of two of key blocks; torch's own limit of 8 is too low for that."""
    return torch._dynamo.config.patch(recompile_limit=64)(torch.compile(function, fullgraph=True))

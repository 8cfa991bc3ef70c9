"""This package's own arithmetic runs in the types that it chose, whatever `torch.autocast` says.

A log-sum-exp in bfloat16 beside scores in float32 makes rows that sum to more than 1. What goes back to the model is of the
type that autocast gives to such a product.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, run without autocast."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


def as_product(x: Tensor) -> Tensor:
    """`x` in the type that the product of two matrices has here: autocast's, but float64 stays."""
    kind = x.device.type
    if kind not in _DEVICES or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))

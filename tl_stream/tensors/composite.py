"""Functions that are put together from others, for every kind of sparse tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _equal(a: Any, b: Any) -> Any:
    return a.shape == b.shape and bool((a == b).all())


def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    return bool(torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan).all())


def _log_softmax(scores: Any, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    scores = scores if dtype is None else scores.to(dtype)
    return scores - scores.logsumexp(dim, keepdim=True)


HANDLERS: dict[str, Callable[..., Any]] = {"equal": _equal, "allclose": _allclose, "log_softmax": _log_softmax}

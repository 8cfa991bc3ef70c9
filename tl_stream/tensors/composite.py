"""Functions that are put together from others, for every kind of sparse tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _equal(a: Any, b: Any) -> Any:
    return a.shape == b.shape and bool((a == b).all())


def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    return bool(torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan).all())


def _log_softmax(scores: Any, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    scores = scores if dtype is None else scores.to(dtype)
    return scores - scores.logsumexp(dim, keepdim=True)


def _norm(tensor: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    tensor = tensor if dtype is None else tensor.to(dtype)
    if p in (None, 2, "fro"):
        return (tensor**2).sum(dim, keepdim=keepdim).sqrt()
    if p == 1:
        return tensor.abs().sum(dim, keepdim=keepdim)
    return tensor.abs().amax(() if dim is None else dim, keepdim=keepdim) if p == math.inf else NotImplemented


def _normalize(tensor: Any, p: Any = 2, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    return tensor / tensor.norm(p, dim, keepdim=True).clamp(min=eps)


def _cosine_similarity(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    return (a * b).sum(dim) / (a.norm(dim=dim).clamp(min=eps) * b.norm(dim=dim).clamp(min=eps))


def _loss(of: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A loss of two tensors of the same shape, from its entries."""

    def handler(a: Any, b: Any, *, reduction: str = "mean", **options: Any) -> Any:
        if any(value is not None for value in options.values()) or reduction not in ("none", "sum", "mean"):
            return NotImplemented
        entries = of(a, b)
        return entries if reduction == "none" else getattr(entries, reduction)()

    return handler


def _masked_select(tensor: Any, mask: Any) -> Any:
    return tensor[mask]


def _type(tensor: Any, dtype: Any = None) -> Any:
    return tensor.to(dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _type_as(tensor: Any, other: Tensor) -> Any:
    return tensor.to(other.device, other.dtype)


def _new(name: str) -> Callable[..., Any]:
    """Ordinary tensors of a given shape, with this one's dtype and device."""

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(torch.empty(0, dtype=tensor.dtype, device=tensor.device), name)(*args, **kwargs)

    return handler


def _only_on_the_pattern(name: str) -> Callable[..., Any]:
    """A hook on a dense copy would never fire."""

    def handler(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name}() is not known on a permuted, merged or stacked sparse tensor; call it on the pattern or the scores "
            "themselves, and rearrange the gradient."
        )

    return handler


HANDLERS: dict[str, Callable[..., Any]] = {
    "equal": _equal,
    "allclose": _allclose,
    "log_softmax": _log_softmax,
    "norm": _norm,
    "normalize": _normalize,
    "cosine_similarity": _cosine_similarity,
    "mse_loss": _loss(lambda a, b: (a - b) ** 2),
    "l1_loss": _loss(lambda a, b: (a - b).abs()),
    "masked_select": _masked_select,
    "type": _type,
    "type_as": _type_as,
    **{name: _only_on_the_pattern(name) for name in ("grad", "register_hook", "retain_grad", "requires_grad_")},
    **{name: _new(name) for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")},
}

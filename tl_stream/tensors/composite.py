"""Functions that are put together from others, for every kind of sparse tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors.wrapper import SparseTensor


def _equal(a: Any, b: Any) -> Any:
    return a.shape == b.shape and bool((a == b).all())


def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    return bool(torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan).all())


def _log_softmax(scores: Any, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    scores = scores if dtype is None else scores.to(dtype)
    return scores - scores.logsumexp(dim, keepdim=True)


def _norm(tensor: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None) -> Any:
    """Of all entries along `dim`, taken as one vector, as `torch.linalg.vector_norm`."""
    if out is not None or (isinstance(p, str) and p != "fro"):
        return NotImplemented
    tensor = tensor if dtype is None else tensor.to(dtype)
    if p in (None, 2, "fro"):
        return (tensor**2).sum(dim, keepdim=keepdim).sqrt()
    if abs(p) == math.inf:
        extreme = tensor.abs().amax if p > 0 else tensor.abs().amin
        return extreme(() if dim is None else dim, keepdim=keepdim)
    if p == 0:
        return (tensor != 0).sum(dim, keepdim=keepdim).to(tensor.dtype)
    return (tensor.abs() ** p).sum(dim, keepdim=keepdim) ** (1 / p)


def _matrix_norm(tensor: Any, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, **options: Any) -> Any:
    """Those that need no singular values."""
    rows, columns = (d % tensor.dim() for d in dim)
    if ord == "fro":
        return _norm(tensor, 2, dim, keepdim, **options)
    if ord not in (1, -1, math.inf, -math.inf):
        return NotImplemented
    added, left = (rows, columns) if abs(ord) == 1 else (columns, rows)
    sums = _norm(tensor, 1, added, True, **options)
    found = sums.amax(left, keepdim=True) if ord > 0 else sums.amin(left, keepdim=True)
    return found if keepdim else found.squeeze((rows, columns))


def _linalg_norm(tensor: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if ord is not None and dim is None and tensor.dim() == 2:
        dim = (0, 1)
    if ord is None or dim is None or isinstance(dim, int) or len(dim) == 1:
        return _norm(tensor, ord, dim, keepdim, **options)
    return _matrix_norm(tensor, ord, dim, keepdim, **options)


def _vecdot(a: Any, b: Any, *, dim: int = -1) -> Any:
    return (a * b).sum(dim)


def _count_nonzero(tensor: Any, dim: Any = None) -> Any:
    return (tensor != 0).sum(dim)


def _trace(tensor: Any) -> Any:
    if tensor.dim() != 2:
        raise RuntimeError(f"trace: expected a matrix, but the input has {tensor.dim()} dimensions.")
    return tensor.diagonal().sum()


def _dist(a: Any, b: Any, p: Any = 2) -> Any:
    return (a - b).norm(p)


def _pairwise_distance(a: Any, b: Any, p: Any = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return (a - b + eps).norm(p, -1, keepdim)


def _aminmax(tensor: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    dim = () if dim is None else dim
    return torch.return_types.aminmax((tensor.amin(dim, keepdim), tensor.amax(dim, keepdim)))


def _with_mean(name: str) -> Callable[..., Any]:
    """`torch.var_mean` and `torch.std_mean`."""

    def handler(tensor: Any, dim: Any = None, *args: Any, **options: Any) -> Any:
        keepdim = options.get("keepdim", args[1] if len(args) > 1 else False)
        spread = getattr(tensor, name)(dim, *args, **options)
        return spread, tensor.mean(None if isinstance(dim, bool) else dim, keepdim=keepdim)

    return handler


def _nanmean(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    total = tensor.nansum(dim, keepdim=keepdim)
    found = total / (~tensor.isnan()).sum(dim, keepdim=keepdim)
    return found if dtype is None else found.to(dtype)


def _add_product(product: Callable[[Any, Any], Any], factor: str) -> Callable[..., Any]:
    """`addcmul`, `addmm` and their kin: something, and a multiple of a product."""

    def handler(x: Any, a: Any, b: Any, *, beta: Any = 1, **options: Any) -> Any:
        return x * beta + product(a, b) * options.get(factor, 1)

    return handler


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, SparseTensor):
        return NotImplemented
    found = x @ weight.mT
    return found if bias is None else found + bias


def _inner(a: Any, b: Any) -> Any:
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
        return NotImplemented
    return a @ b if b.dim() == 1 or a.dim() == 1 else a @ b.mT if b.dim() == 2 else NotImplemented


def _normalize(tensor: Any, p: Any = 2, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    return tensor / tensor.norm(p, dim, keepdim=True).clamp(min=eps)


def _cosine_similarity(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    return (a * b).sum(dim) / (a.norm(dim=dim).clamp(min=eps) * b.norm(dim=dim).clamp(min=eps))


def _loss(of: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A loss of two tensors of the same shape, from its entries."""

    def handler(a: Any, b: Any, *, reduction: str = "mean", **options: Any) -> Any:
        if any(value not in (None, False) for value in options.values()) or reduction not in ("none", "sum", "mean"):
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
    "normalize": _normalize,
    "cosine_similarity": _cosine_similarity,
    "mse_loss": _loss(lambda a, b: (a - b) ** 2),
    "l1_loss": _loss(lambda a, b: (a - b).abs()),
    "kl_div": _loss(lambda a, b: torch.xlogy(b, b) - a * b),
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "linalg_matrix_norm": _matrix_norm,
    "linalg_norm": _linalg_norm,
    "linalg_vecdot": _vecdot,
    "count_nonzero": _count_nonzero,
    "trace": _trace,
    "dist": _dist,
    "pairwise_distance": _pairwise_distance,
    "aminmax": _aminmax,
    "var_mean": _with_mean("var"),
    "std_mean": _with_mean("std"),
    "nanmean": _nanmean,
    "addcmul": _add_product(torch.mul, "value"),
    **{name: _add_product(torch.matmul, "alpha") for name in ("addmm", "addmv", "baddbmm")},
    "linear": _linear,
    "inner": _inner,
    "masked_select": _masked_select,
    "type": _type,
    "type_as": _type_as,
    **{name: _only_on_the_pattern(name) for name in ("grad", "register_hook", "retain_grad", "requires_grad_")},
    **{name: _new(name) for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")},
}

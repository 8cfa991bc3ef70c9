"""The way out where the tensors are small: an operation that isn't known is carried out on dense copies, and counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_stream.tensors.names import is_in_place
from tl_stream.tensors.slice_view import SliceView, Source
from tl_stream.tensors.wrapper import TO_LOOK_AT, SparseTensor

_INSTEAD: dict[str, str] = {
    **dict.fromkeys(("tolist", "numpy", "array"), TO_LOOK_AT),
    **dict.fromkeys(
        ("matmul", "rmatmul", "bmm", "mm", "einsum"),
        "The product of two patterns is not sparse in blocks; take it times a vector or values, from the right: p @ (q @ v), "
        "or torch.einsum('hqj,hjk,kd->hqd', p, q, v).",
    ),
    **dict.fromkeys(
        ("flip", "fliplr", "flipud", "roll", "sort", "argsort", "msort", "cumsum", "cumprod", "cummax", "pad", "softmax"),
        "Do it to a row, a window or what was reduced or pooled: x.sum(-2).flip(-1), x[..., -1, :].cumsum(-1).",
    ),
}
_INSTEAD |= dict.fromkeys(
    ("topk", "kthvalue", "median", "quantile", "nanmedian", "nanquantile", "mode"),
    "Along the keys topk, median and quantile work; for others take the heads and keys that you mean (x[0, 1, :, 100:164]), or "
    "reduce first (x.sum(-2).topk(5), x.amax(-2)).",
)
_OTHERWISE = "Take a part first (a head and some rows, or a window), or work on .row_values()."


@dataclass(frozen=True, eq=False)
class Whole(Source):
    """All entries of a sparse tensor, as the source of a dense copy whose in-place changes go back to it."""

    tensor: Any

    @property
    def version(self) -> int:
        return self.tensor.version

    def read(self) -> Tensor:
        return self.tensor.to_dense()

    def write(self, value: Tensor) -> None:
        self.tensor[...] = value


def make_dense(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Carry `func` out on ordinary tensors, where they are small enough; in-place results are written back.

    Raises:
        NotImplementedError: A sparse tensor has more than `config.max_dense` entries.
    """
    sparse = [x for x in flatten((args, kwargs)) if isinstance(x, SparseTensor)]
    if not sparse:
        raise NotImplementedError(f"{name}() got sparse tensors in a place where they can't be found: {args!r}, {kwargs!r}.")
    for tensor in sparse:
        origin = tensor.origin
        if tensor.numel() > origin.config.max_dense:
            raise NotImplementedError(
                f"{name}() is not known to {type(tensor).__name__} of layer {origin.layer}, and making it dense would take "
                f"{tuple(tensor.shape)} = {tensor.numel():,} entries (config.max_dense is {origin.config.max_dense:,}). "
                f"{_INSTEAD.get(name, _OTHERWISE)} Or call .to_dense(), where that is meant."
            )
    sparse[0].origin.fallbacks[name] += 1
    copies: list[SliceView] = []
    dense_args, dense_kwargs = _map((args, kwargs), copies)
    result = func(*dense_args, **dense_kwargs)
    if is_in_place(name, kwargs) and isinstance(args[0], SparseTensor):
        args[0][...] = dense_args[0]
        return args[0]
    for copy in copies:
        result = copy.follow(result)
    return result


def flatten(x: Any) -> list[Any]:
    """What nested lists, tuples and dicts hold."""
    if isinstance(x, tuple | list):
        return [leaf for item in x for leaf in flatten(item)]
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in flatten(item)]
    return [x]


def _map(x: Any, copies: list[SliceView]) -> Any:
    """`x` with every sparse tensor made dense; `copies` notes them."""
    if isinstance(x, SparseTensor):
        copies.append(SliceView.of(Whole(x)))
        return copies[-1].as_subclass(Tensor)
    if isinstance(x, tuple | list):
        return type(x)(_map(item, copies) for item in x)
    if isinstance(x, dict):
        return {key: _map(value, copies) for key, value in x.items()}
    return x

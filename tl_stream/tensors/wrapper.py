"""`Wrapper`: what all tensors that stand for a query_pos x key_pos tensor without holding one have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.precision import as_product, outside_autocast
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.names import function_name
from tl_stream.tensors.products import Origin

_METADATA = {
    "shape", "ndim", "dtype", "device", "size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "layout",
    "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_leaf", "grad_fn",
    "requires_grad", "is_inference", "is_signed", "element_size", "itemsize", "stride", "ndimension", "names", "has_names",
    "len", "hash", "get_device", "is_mkldnn", "is_vulkan", "is_ipu", "is_xla", "is_mtia", "is_maia", "is_neg", "is_conj",
    "output_nr", "_version", "is_sparse_csr", "is_hpu",
}  # fmt: skip
TO_LOOK_AT = (
    "To look at it, take a window (x[..., 100:200, :100]), pool it (torch.nn.functional.avg_pool2d(x, 64), or einops.reduce(x, "
    "'... (q s) (k t) -> ... q k', 'mean', s=64, t=64)), take means by sentence (tl_stream.analysis.sentence_matrix(cache, "
    "layer, sentences)), or let tl_stream.viz.heads_view(cache, [(layer, head)], tokens) show it by block."
)


_PRODUCTS = {"matmul", "rmatmul", "bmm", "mm", "mv", "einsum"}


class Wrapper(Tensor):
    """A `torch.Tensor` of a shape, dtype and device, without data. What code does to it arrives in `carry_out`.

    Attributes:
        rank: Among several kinds of wrappers in one call, the one of the highest rank carries it out.
        what: What it is, for error messages.
        advice: How to go on, for error messages.
    """

    rank: ClassVar[int] = 0
    what: ClassVar[str]
    advice: ClassVar[str]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """An instance of that shape."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func`, which is called `name`; NotImplemented where it isn't known."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if any(issubclass(kind, Wrapper) and kind.rank > cls.rank for kind in types):
            return NotImplemented
        result = outside_autocast(cls.carry_out)(name, func, args, kwargs)
        if result is NotImplemented:
            raise NotImplementedError(f"{name}() is not known on {cls.what}; {cls.advice}.")
        is_product = name in _PRODUCTS and isinstance(result, Tensor) and not isinstance(result, Wrapper)
        return as_product(result) if is_product else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(
            f"{func} reached {cls.what} below torch's Python interface (as torch.tensor(x) and vmap do), where there is "
            f"nothing to compute with; {cls.advice}."
        )


class SparseTensor(Wrapper):
    """A wrapper around kept blocks, which can be made dense."""

    what = "a sparse tensor that holds only kept blocks"
    advice = "call .to_dense() first, or .detach()/.clone() where you used .data"

    @property
    def origin(self) -> Origin:
        """Where the blocks come from."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """Number of writes to what is shown, so far."""
        raise NotImplementedError

    def in_own_order(self, letters: str) -> tuple[Any, str] | None:
        """The tensor with query and key last, and the letters of its dimensions in that order; None where some are merged."""
        return self, letters

    def row_and_key_dims(self) -> set[int]:
        """The dimensions that show rows or keys, alone or merged with others."""
        return {self.dim() - 2, self.dim() - 1}

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape before dimensions were rearranged: rows and keys last."""
        return tuple(self.shape)

    def product(self, x: Tensor, transposed: bool) -> Any:
        """`self @ x`, or `self.mT @ x`, where x broadcasts over the dimensions before those; NotImplemented if unknown."""
        raise NotImplementedError

    def grouped(self, rows: Groups, keys: Groups, how: How) -> Any:
        """Sum, maximum or minimum over each group of rows x group of keys, an ordinary tensor; NotImplemented if unknown."""
        return NotImplemented

    def coarsen(self, segments: Any) -> Float[Tensor, "*lead segment segment"]:
        """Mean over each segment's rows and each segment's keys, an ordinary tensor; dropped entries count as what they hold.

        O(kept values) time, memory for the values and segments^2 numbers a head. `tl_stream.analysis.sentence_matrix` does it
        for one layer of a cache head by head, also where everything is kept.

        Args:
            segments: Stretches of the text in order: `analysis.sentences(...)`, spans, slices, or pairs (start, stop).

        Raises:
            TypeError, ValueError: As `Groups.of_spans`; also rows and keys that aren't the same tokens, or too many segments.
            NotImplementedError: Rows or keys are merged with other dimensions.
        """
        rows, keys = self.shape[-2:]
        if rows != keys:
            raise ValueError(f"coarsen() got {rows} rows and {keys} keys; expected those of a whole text.")
        groups = Groups.of_spans(segments, keys, self.device)
        total = self.grouped(groups, groups, "sum")
        if total is NotImplemented:
            raise NotImplementedError(
                "coarsen() is not known where rows or keys aren't the last two dimensions; call it first."
            )
        return total / (groups.counts[:, None] * groups.counts)

    def stored_tensors(self) -> list[Tensor]:
        """The ordinary tensors that hold this one's memory."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        from tl_stream.tensors.storage import reduced

        return reduced(self)

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """An ordinary tensor of all entries.

        Raises:
            ValueError: More entries than `tl_stream.layout.MAX_DENSE_ENTRIES`.
        """
        raise NotImplementedError

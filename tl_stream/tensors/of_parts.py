"""`TensorOfParts`, what stacked and joined tensors have in common; `TensorOfBase`, what arranged and split ones have."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

from tl_stream.tensors.arrangement import Arrangement
from tl_stream.tensors.products import Origin
from tl_stream.tensors.wrapper import SparseTensor


class TensorOfBase(SparseTensor):
    """Another sparse tensor, shown otherwise.

    Attributes:
        base: That tensor.
        arrangement: How its dimensions, or pieces of them, are shown.
    """

    base: SparseTensor
    arrangement: Arrangement

    @property
    def origin(self) -> Origin:
        return self.base.origin

    @property
    def version(self) -> int:
        return self.base.version

    def stored_tensors(self) -> list[Tensor]:
        return self.base.stored_tensors()


class TensorOfParts(SparseTensor):
    """A sparse tensor put together from others, to which writes go.

    Attributes:
        parts: Those tensors.
    """

    parts: tuple[SparseTensor, ...]

    @property
    def origin(self) -> Origin:
        return self.parts[0].origin

    @property
    def version(self) -> int:
        return sum(part.version for part in self.parts)

    def stored_tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.stored_tensors()]

    def __copy__(self) -> Any:
        return type(self)(tuple(copy(part) for part in self.parts))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        parts = "".join(f"\n  {part!r}," for part in self.parts)
        return f"{type(self).__name__}(shape={tuple(self.shape)},{parts}\n)"


def _clone(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return type(tensor)(tuple(part.clone() for part in tensor.parts))


def _same(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


HANDLERS: dict[str, Callable[..., Any]] = {"clone": _clone, "deepcopy": _clone, "contiguous": _same}

"""How the dimensions of a tensor are shown in another order, merged, or with dimensions of size 1 beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors.view import is_integer

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Arrangement:
    """Each shown dimension is a run of own dimensions that are merged in it; of none, where it is of size 1.

    Attributes:
        own: Shape of the tensor itself.
        groups: The own dimensions in each shown one. Own dimensions of size 1 need not be in any.
    """

    own: tuple[int, ...]
    groups: Groups

    @classmethod
    def plain(cls, shape: tuple[int, ...]) -> Arrangement:
        """Everything as it is."""
        return cls(tuple(shape), tuple((d,) for d in range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        """As shown."""
        return tuple(prod(self.own[d] for d in group) for group in self.groups)

    @property
    def is_plain(self) -> bool:
        """Whether everything is shown as it is."""
        order = [d for group in self.groups for d in group]
        return self.shape == self.own and order == sorted(order)

    @property
    def merges(self) -> bool:
        """Whether some shown dimension is several own ones."""
        return any(len(group) > 1 for group in self.groups)

    def change(self, view: Callable[[Tensor], Tensor]) -> Arrangement | None:
        """What a function that only rearranges dimensions (permute, reshape, ...) makes of this; None where it can't be said.

        The function is applied to a tensor without data, whose strides tell where each dimension went.
        """
        parts = [d for group in self.groups for d in group if self.own[d] != 1]
        sizes = [self.own[d] for d in parts]
        result = view(torch.empty(sizes, device="meta").reshape(self.shape))
        place = {prod(sizes[i + 1 :]): i for i in range(len(sizes))}
        groups = []
        for size, stride in zip(result.shape, result.stride(), strict=True):
            run = range(0) if size == 1 else _run_of_size(sizes, place.get(stride), size)
            if run is None:
                return None
            groups.append(tuple(parts[i] for i in run))
        if sorted(d for group in groups for d in group) != sorted(parts):
            return None
        # Dimensions of size 1 are all alike: those of the tensor itself stand for as many of those shown.
        ones = iter([(d,) for d, size in enumerate(self.own) if size == 1])
        return Arrangement(self.own, tuple(group or next(ones, ()) for group in groups))

    def apply(self, x: Tensor) -> Tensor:
        """`x` of the own number of dimensions (of the own sizes, or size 1) as shown."""
        order = [d for group in self.groups for d in group]
        rest = [d for d in range(len(self.own)) if d not in order]
        shape = [prod(x.shape[d] for d in group) for group in self.groups]
        return x.permute(order + rest).reshape(shape)

    def undo(self, x: Tensor) -> Tensor:
        """`x` that broadcasts against what is shown, so that it broadcasts against the tensor itself."""
        x = x[(None,) * (len(self.groups) - x.dim())]
        sizes = [self.own[d] if n != 1 else 1 for group, n in zip(self.groups, x.shape, strict=True) for d in group]
        order = [d for group in self.groups for d in group]
        rest = [d for d in range(len(self.own)) if d not in order]
        back = sorted(range(len(self.own)), key=(order + rest).__getitem__)
        return x.reshape(sizes + [1] * len(rest)).permute(back)

    def index(self, key: Any) -> tuple[tuple[Any, ...], Groups] | None:
        """The own index for a shown one of ints, slices, None and Ellipsis, and the groups of what it gives; else None."""
        items = list(key) if isinstance(key, tuple) else [key]
        if any(not (x is None or x is Ellipsis or isinstance(x, slice) or is_integer(x)) for x in items):
            return None
        given = sum(x is not None and x is not Ellipsis for x in items)
        if given > len(self.groups):
            raise IndexError(f"too many indices for a tensor of {len(self.groups)} dimensions: {key!r}")
        at = next((i for i, x in enumerate(items) if x is Ellipsis), len(items))
        items[at : at + 1] = [slice(None)] * (len(self.groups) - given)
        index: list[Any] = [slice(None)] * len(self.own)
        groups: list[tuple[int, ...]] = []
        left = iter(zip(self.groups, self.shape, strict=True))
        for item in items:
            group, size = ((), 1) if item is None else next(left)
            if item is None or (isinstance(item, slice) and range(size)[item] == range(size)):
                groups.append(group)
            elif isinstance(item, slice):
                if len(group) != 1:
                    return None
                index[group[0]] = item
                groups.append(group)
            else:
                place = torch.unravel_index(torch.tensor(range(size)[item]), [self.own[d] for d in group]) if group else ()
                for d, i in zip(group, place, strict=True):
                    index[d] = int(i)
        kept = [d for d, item in enumerate(index) if isinstance(item, slice)]
        return tuple(index), tuple(tuple(kept.index(d) for d in group) for group in groups)

    def own_dims(self, shown: list[int]) -> list[int]:
        """The own dimensions in some shown ones."""
        return sorted(d for i in shown for d in self.groups[i])


def _run_of_size(sizes: list[int], last: int | None, size: int) -> range | None:
    """The dimensions up to `last` that are of that size in all; None where there are none."""
    if last is None:
        return None
    products = list(accumulate(reversed(sizes[: last + 1]), mul))
    return range(last - products.index(size), last + 1) if size in products else None

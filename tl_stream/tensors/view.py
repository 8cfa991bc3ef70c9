"""Which batch elements, heads and query rows of its data a sparse tensor shows, and index arithmetic on that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Axis = int | range


@dataclass(frozen=True)
class View:
    """A product of choices: an int drops its dimension, a range keeps it. Keys are always all shown.

    Attributes:
        batch: Batch element(s).
        head: Head(s).
        rows: Query positions, contiguous.
        n_keys: Number of keys.
    """

    batch: Axis
    head: Axis
    rows: range
    n_keys: int

    @classmethod
    def whole(cls, shape: tuple[int, int, int, int]) -> View:
        """Everything."""
        return cls(range(shape[0]), range(shape[1]), range(shape[2]), shape[3])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that shows this."""
        return *(len(axis) for axis in (self.batch, self.head) if isinstance(axis, range)), len(self.rows), self.n_keys

    @property
    def axes(self) -> tuple[Axis, Axis, Axis, Axis]:
        """All four choices, keys last."""
        return self.batch, self.head, self.rows, range(self.n_keys)

    def on(self, batch: int, heads: int) -> View:
        """The same dimensions, rows and keys, on data of so many batch elements and heads, all of them shown."""
        texts: Axis = 0 if isinstance(self.batch, int) else range(batch)
        kept: Axis = 0 if isinstance(self.head, int) else range(heads)
        return View(texts, kept, self.rows, self.n_keys)

    def is_whole(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether this shows everything of data of that shape, with all four dimensions."""
        return self == View.whole(shape)

    def texts(self, device: torch.device) -> Int[Tensor, " batch"]:
        """The batch elements as an index tensor."""
        return _index(self.batch, device)

    def heads(self, device: torch.device) -> Int[Tensor, " head_index"]:
        """The heads as an index tensor."""
        return _index(self.head, device)

    def coordinates(self, device: torch.device) -> list[Int[Tensor, ...]]:
        """Batch, head, query and key index of every entry shown, each expanded to `shape` without taking memory."""
        shape = self.shape
        dim, grids = 0, []
        for axis in self.axes:
            if isinstance(axis, int):
                grids.append(torch.tensor(axis, device=device).expand(shape))
                continue
            ones = [1] * len(shape)
            ones[dim] = len(axis)
            grids.append(_index(axis, device).view(ones).expand(shape))
            dim += 1
        return grids

    def index(self, key: Any) -> Selection | None:
        """What plain indexing with ints, slices and Ellipsis selects; None for any other kind of index.

        Raises:
            IndexError: Too many indices, or one out of range.
        """
        expanded = _expand(key, len(self.shape))
        if expanded is None:
            return None
        items = iter(expanded)
        axes: list[Axis] = []
        for axis in self.axes:
            axes.append(axis if isinstance(axis, int) else _pick(axis, next(items)))
        return Selection(*axes)


@dataclass(frozen=True)
class Selection:
    """A product of choices on all four axes, keys included."""

    batch: Axis
    head: Axis
    query_pos: Axis
    key_pos: Axis

    def as_view(self, n_keys: int) -> View | None:
        """The same as a view, where it shows whole, contiguous rows in order; else None."""
        rows, keys = self.query_pos, self.key_pos
        if not isinstance(rows, range) or rows.step != 1 or keys != range(n_keys):
            return None
        return View(self.batch, self.head, rows, n_keys)

    def membership(self, shape: tuple[int, int, int, int], device: torch.device) -> list[Tensor]:
        """For each axis, which of its indices are selected, `[size]` bool."""
        members = []
        for axis, size in zip((self.batch, self.head, self.query_pos, self.key_pos), shape, strict=True):
            member = torch.zeros(size, dtype=torch.bool, device=device)
            member[_index(axis, device)] = True
            members.append(member)
        return members

    @property
    def numel(self) -> int:
        """Number of entries selected."""
        count = 1
        for axis in (self.batch, self.head, self.query_pos, self.key_pos):
            count *= len(axis) if isinstance(axis, range) else 1
        return count


def _index(axis: Axis, device: torch.device) -> Tensor:
    indices = range(axis, axis + 1) if isinstance(axis, int) else axis
    return torch.arange(indices.start, indices.start + len(indices) * indices.step, indices.step, device=device)


def _pick(axis: range, item: Any) -> Axis:
    try:
        return axis[item]
    except IndexError:
        raise IndexError(f"index {item} is out of range for a dimension of size {len(axis)}") from None


def _expand(key: Any, n_dims: int) -> list[int | slice] | None:
    """One int or slice a dimension; None if the index holds anything else."""
    items = list(key) if isinstance(key, tuple) else [key]
    items = [int(x) if is_integer(x) else x for x in items]
    if any(not (isinstance(x, int | slice) or x is Ellipsis) for x in items):
        return None
    given = sum(x is not Ellipsis for x in items)
    if given > n_dims or len(items) - given > 1:
        raise IndexError(f"too many indices for a tensor of {n_dims} dimensions: {key!r}")
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    return items[:at] + [slice(None)] * (n_dims - given) + items[at + 1 :]


def is_integer(x: Any) -> bool:
    """Whether an index item is one integer (and no bool)."""
    if isinstance(x, bool):
        return False
    if isinstance(x, Tensor):
        return x.dim() == 0 and x.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    return hasattr(x, "__index__") and not getattr(x, "shape", ())

"""Single entries of a `JoinedTensor`, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.indexing import Picked, check_window
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.slice_view import SliceView, Source


@dataclass(frozen=True, eq=False)
class JoinedEntries(Source):
    """As `indexing.Picked`, of a joined tensor.

    Attributes:
        tensor: The tensor.
        pick: What takes the entries out of an ordinary tensor.
    """

    tensor: JoinedTensor
    pick: Callable[[Tensor], Tensor]

    @property
    def version(self) -> int:
        return self.tensor.version

    def read(self) -> Tensor:
        coordinates = self._coordinates()
        found, places = [], []
        for part, place, at in self._by_part(coordinates):
            found.append(part[at])
            places.append(place)
        return torch.cat(found)[torch.cat(places).argsort()].view(coordinates[0].shape)

    def write(self, value: Any) -> None:
        coordinates = self._coordinates()
        source = torch.as_tensor(value, device=self.tensor.device).as_subclass(Tensor).expand(coordinates[0].shape).reshape(-1)
        extend = isinstance(value, SliceView) and value.is_sparse_part
        for part, place, at in self._by_part(coordinates):
            Picked(part, partial(_take, at)).write(source[place], extend)

    def _coordinates(self) -> list[Tensor]:
        """Index of each entry along each dimension."""
        shape = self.tensor.shape
        ranges = (torch.arange(n, device=self.tensor.device) for n in shape)
        grids = [self.pick(x.view(-1, *[1] * (len(shape) - d - 1)).expand(shape)) for d, x in enumerate(ranges)]
        check_window(self.tensor.block_layout.shape, grids[0])
        return grids

    def _by_part(self, coordinates: list[Tensor]) -> Iterator[tuple[BlockSparseTensor, Tensor, tuple[Tensor, ...]]]:
        """Each part, which of the entries lie in it, and where."""
        *lead, query, key = (x.reshape(-1) for x in coordinates)
        for part, rows in self.tensor.shown:
            place = ((query >= rows.start) & (query < rows.stop)).nonzero()[:, 0]
            yield part, place, (*(x[place] for x in lead), query[place] - rows.start, key[place])


def _take(at: tuple[Tensor, ...], grid: Tensor) -> Tensor:
    return grid[at]

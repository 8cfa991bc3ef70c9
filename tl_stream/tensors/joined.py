"""`JoinedTensor`: rows of one sparse tensor above rows of another, as `torch.cat` along the queries.

Under `StreamConfig.dense_queries` scores and patterns are such: rows that keep some blocks, then rows that keep everything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.joined_layout import JoinedLayout
from tl_stream.tensors.of_parts import TensorOfParts
from tl_stream.tensors.wrapper import SparseTensor


class JoinedTensor(TensorOfParts):
    """See the module. `parts` are the tensors, of equal shape but for their query rows; one may show none of its rows."""

    rank = 1
    parts: tuple[BlockSparseTensor, ...]

    @staticmethod
    def __new__(cls, parts: tuple[BlockSparseTensor, ...]) -> JoinedTensor:
        """Join the parts; writes go to them."""
        *lead, _, n_keys = parts[0].shape
        self = cls.empty((*lead, sum(part.shape[-2] for part in parts), n_keys), parts[0].dtype, parts[0].device)
        self.parts = parts
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from tl_stream.tensors.joined_ops import run

        return run(name, func, args, kwargs)

    @property
    def placed(self) -> list[tuple[BlockSparseTensor, range]]:
        """All parts, and which of this tensor's rows each shows."""
        ends = torch.tensor([part.shape[-2] for part in self.parts]).cumsum(0).tolist()
        return [(part, range(end - part.shape[-2], end)) for part, end in zip(self.parts, ends, strict=True)]

    @property
    def shown(self) -> list[tuple[BlockSparseTensor, range]]:
        """The parts that show any rows, likewise; the first where none does."""
        return [(part, rows) for part, rows in self.placed if rows] or self.placed[:1]

    @property
    def block_layout(self) -> JoinedLayout:
        """Kept blocks of the batch elements and heads shown (all query rows)."""
        return JoinedLayout(tuple(part.block_layout for part in self.parts))

    @property
    def fill(self) -> float | bool:
        """Value of every entry outside the kept blocks."""
        return self.parts[0].fill

    def to_dense(self) -> Tensor:  # type: ignore[override]
        return torch.cat([part.to_dense() for part, _ in self.shown], -2)

    def retained_mass(self) -> Float[Tensor, "*batch_and_head query_pos"]:
        """As `BlockSparseTensor.retained_mass`."""
        return torch.cat([part.retained_mass() for part, _ in self.shown], -1)

    def product(self, x: Tensor, transposed: bool) -> Any:
        if transposed and x.shape[-2] != self.shape[-2]:
            return NotImplemented
        results = [
            part.product(x[..., rows.start : rows.stop, :] if transposed else x, transposed) for part, rows in self.shown
        ]
        if any(result is NotImplemented for result in results):
            return NotImplemented
        return sum(results[1:], results[0]) if transposed else torch.cat(results, -2)

    def grouped(self, rows: Groups, keys: Groups, how: How) -> Any:
        results = [part.grouped(rows.part(own), keys, how) for part, own in self.shown]
        both: dict[str, Callable[..., Any]] = {"sum": torch.add, "amax": torch.maximum, "amin": torch.minimum}
        return reduce(both[how], results)


def parts_of(tensor: Any) -> tuple[Any, ...]:
    """The parts of a tensor, sparse or plain; itself where it has none."""
    return tensor.parts if isinstance(tensor, JoinedTensor) else (tensor,)


def join(results: list[Any], dim: int = -2) -> Any:
    """What was computed of consecutive rows, as one: sparse or plain, or such tuples as `max` gives.

    `dim`: where the rows are in what is plain.
    """
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], tuple):
        return type(results[0])([join(list(column), dim) for column in zip(*results, strict=True)])
    if all(isinstance(x, BlockSparseTensor) for x in results):
        return JoinedTensor(tuple(results))
    return torch.cat([x.to_dense() if isinstance(x, SparseTensor) else x for x in results], dim)

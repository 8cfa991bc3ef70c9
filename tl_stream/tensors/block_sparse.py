"""`BlockSparseTensor`: a `torch.Tensor` of shape [batch, head_index, query_pos, key_pos] that holds only kept blocks.

It is a wrapper without dense data. What code does to it arrives in `__torch_function__` and is carried out on the
ordinary tensors inside, so that autograd sees those. An operation that is not known raises, or is made dense where
the tensor has at most `config.max_dense` entries; that is counted.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.groups import Groups, How
from tl_stream.tensors.lazy_data import LazyData
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.view import View
from tl_stream.tensors.wrapper import TO_LOOK_AT, SparseTensor


class BlockSparseTensor(SparseTensor):
    """Entries on kept blocks, and one value (`fill`) everywhere else."""

    _data: BlockData
    _view: View
    _detached: bool
    _graph: Products | None  # keeps the products' graph alive, unless detached

    @staticmethod
    def __new__(
        cls, data: BlockData, view: View | None = None, dtype: torch.dtype | None = None, detached: bool = False
    ) -> BlockSparseTensor:
        """Show `data`, or the part of it that `view` says, as a tensor."""
        view = View.whole(data.layout.shape) if view is None else view
        if dtype is None:
            dtype = data.values.dtype if data.values is not None else torch.get_default_dtype()
        self = cls.empty(view.shape, dtype, data.layout.device)
        self._data, self._view, self._detached = data, view, detached
        self._graph = None if detached or not isinstance(data, LazyData) else data.products
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from tl_stream.tensors.dispatch import run

        return run(name, func, args, kwargs)

    @property
    def block_layout(self) -> BlockLayout:
        """Kept blocks of the batch elements and heads shown (all query rows)."""
        return self._narrow_layout()

    @property
    def origin(self) -> Origin:
        """Layer and run that this comes from."""
        return self._data.origin

    @property
    def version(self) -> int:
        """Number of writes to the data so far."""
        return self._data.version

    @property
    def fill(self) -> float | bool:
        """Value of every entry outside the kept blocks."""
        return self._data.fill

    @property
    def block_values(self) -> Shaped[Tensor, "batch head_index q_block slot block_q block_k"]:
        """Values on the kept blocks, block padding included; batch and head have size 1 where an index dropped them."""
        return self.shown_values().unflatten(-1, (-1, self._data.layout.block_k)).movedim(-2, -3)

    def row_values(self) -> Shaped[Tensor, "*batch_and_head query_pos key"]:
        """Values on the kept blocks by query row, `key = slot * block_k + offset in the block`."""
        values = self.shown_values().flatten(2, 3)
        return self.drop_indexed(values[:, :, self._view.rows.start : self._view.rows.stop])

    def to_dense(  # type: ignore[override]
        self,
    ) -> Shaped[Tensor, "*batch_and_head query_pos key_pos"]:
        """An ordinary tensor. Makes every entry: batch x head x query_pos x key_pos of them.

        Raises:
            ValueError: More entries than `tl_stream.layout.MAX_DENSE_ENTRIES`.
        """
        layout = self._narrow_layout()
        self.check_dense()
        values = self.shown_values()
        indices, used = layout.rows()
        # Slots that are not used go to one more key block, which is cut off.
        columns = indices.masked_fill(~used, layout.n_kv_blocks)
        offsets = torch.arange(layout.block_k, device=values.device)
        columns = (columns[..., None] * layout.block_k + offsets).flatten(-2)[:, :, :, None].expand(values.shape)
        width = (layout.n_kv_blocks + 1) * layout.block_k
        dense = values.new_full((*values.shape[:4], width), self.fill).scatter(-1, columns, values)
        rows = self._view.rows
        dense = dense.flatten(2, 3)[:, :, rows.start : rows.stop, : layout.mask.key_length]
        return self.drop_indexed(dense)

    def check_dense(self) -> None:
        """Raise ValueError where `to_dense` would make more entries than it may."""
        try:
            self._narrow_layout().check_dense()
        except ValueError as error:
            raise ValueError(f"{error} {TO_LOOK_AT}") from None

    def stored_tensors(self) -> list[Tensor]:
        return self._data.stored_tensors()

    def retained_mass(self) -> Float[Tensor, "*batch_and_head query_pos"]:
        """Share of each row's full softmax (over all keys that the mask allows) that the kept keys hold, exactly.

        O(T^2) time over all rows, O(T) memory; take a range of rows first where that is too much. Under `forward="exact"` it
        is the sum of each row (a sink's share is not in it), in O(T) time.

        Raises:
            TypeError: Not a pattern that can still be recomputed from q and k.
        """
        raise TypeError(f"retained_mass() needs a pattern that was not written to; this is a {type(self).__name__}.")

    def drop_indexed(self, x: Tensor) -> Tensor:
        """`x` `[batch, head_index, ...]` without the dimensions that an index dropped."""
        if isinstance(self._view.head, int):
            x = x.squeeze(1)
        return x.squeeze(0) if isinstance(self._view.batch, int) else x

    def alias(self, view: View | None = None, dtype: torch.dtype | None = None, detached: bool | None = None) -> Any:
        """Another tensor on the same data: writes to one are seen by the other."""
        detached = self._detached if detached is None else detached
        return type(self)(self._data, view or self._view, dtype or self.dtype, detached)

    def with_data(self, data: BlockData, detached: bool = False) -> Any:
        """`data`, which holds nothing but the batch elements and heads to show, with this tensor's dimensions."""
        dtype = self.dtype if data.values is None else data.values.dtype
        kind = type(self) if dtype.is_floating_point else BlockSparseTensor
        return kind(data, self._view.on(data.layout.batch, data.layout.n_heads), dtype, detached)

    def product(self, x: Tensor, transposed: bool) -> Any:
        from tl_stream.tensors.attention_ops import product

        return product(self, x, transposed)

    def grouped(self, rows: Groups, keys: Groups, how: How) -> Any:
        from tl_stream.tensors.grouping import grouped

        return grouped(self, rows, keys, how)

    def __copy__(self) -> Any:
        return self.alias(detached=True)  # as torch: the same memory, and no gradient

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "lazy" if self._data.is_lazy else "values"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self._data.origin.layer}, "
            f"{state}, fill={self.fill}, forward={self.origin.config.forward!r}, {self._narrow_layout()!r})"
        )

    def _selected(self) -> BlockData:
        """The data of the batch elements and heads shown."""
        data, device = self._data, self._data.layout.device
        if View.whole(data.layout.shape).axes[:2] == self._view.axes[:2]:
            return data
        if data.is_complete:
            raise NotImplementedError("The model takes its attention apart by head or text; it can't run with forward='exact'.")
        return data.select(self._view.texts(device), self._view.heads(device))

    def _narrow_layout(self) -> BlockLayout:
        layout = self._data.layout
        if View.whole(layout.shape).axes[:2] == self._view.axes[:2]:
            return layout
        return layout.select(self._view.texts(layout.device), self._view.heads(layout.device))

    def shown_values(self, layout: BlockLayout | None = None) -> Shaped[Tensor, "batch head_index q_block block_q key"]:
        """Values on the kept blocks of the batch elements and heads shown, in this tensor's dtype; all query rows.

        `layout`: another layout of those, which holds the kept blocks; None: theirs.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
            data = self._selected()
            values = (data.block_values() if layout is None else data.values_on(layout)).to(self.dtype)
        return values.detach() if self._detached else values


class BlockSparseScores(BlockSparseTensor):
    """Attention scores on the kept blocks, -inf elsewhere: what `hook_attn_scores` shows."""


class BlockSparsePattern(BlockSparseTensor):
    """Attention probabilities on the kept blocks, 0 elsewhere: what `hook_pattern` shows.

    They are the sparse model's, whose rows sum to 1; under `forward="exact"` the real model's, whose rows sum to the share of
    them that was kept.
    """

    def retained_mass(self) -> Float[Tensor, "*batch_and_head query_pos"]:
        from tl_stream.tensors.retained import retained_mass

        return retained_mass(self)

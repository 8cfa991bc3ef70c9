"""What a sparse tensor holds: a layout, and values on the kept blocks, made only when somebody asks."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.outside import Outside
from tl_stream.tensors.products import Origin
from tl_stream.tensors.relayout import relayout
from tl_stream.tensors.rest import Rest

MAX_VALUES = 2**31
Data = TypeVar("Data", bound="BlockData")


@dataclass(eq=False)
class BlockData:
    """Mutable content shared by a sparse tensor and its aliases.

    Attributes:
        layout: Kept blocks.
        fill: Value of every entry outside them.
        origin: Where it comes from.
        values: Values on the kept blocks, `[batch, head_index, q_block, block_q, key]`; None: not made (yet).
        version: Number of writes so far.
        watches: Backward hooks that are told the gradient of the values at their next use (`backward_hooks.Watch`).
        taps: Where the gradient of a lazy pattern can be had while the graph lives (`gradients.Tap`), one a use.
        read_late: Whether values were made with a graph after the first use, so that taps don't tell everything.
        is_complete: Whether this goes on into the model, under `forward="exact"`: then it stands for all of its rows, what
            lies outside the kept blocks included.
        rest: What lies there, where it can't be had from q and k.
        outside: What edits did to what lies there; None: nothing.
        is_expanded: Whether this is a copy that stands for a view of one text or head shown several times.
    """

    layout: BlockLayout
    fill: float | bool
    origin: Origin
    values: Tensor | None = None
    version: int = 0
    watches: tuple[Any, ...] = ()
    taps: tuple[weakref.ref[Any], ...] = ()
    read_late: bool = False
    is_complete: bool = False
    rest: Rest | None = None
    outside: Outside | None = None
    is_expanded: bool = False

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through the values."""
        return self.values is not None and self.values.requires_grad

    @property
    def in_graph(self) -> bool:
        """Whether gradients flow through the values, whether or not gradients are enabled right now."""
        return self.values is not None and self.values.requires_grad

    @property
    def is_used(self) -> bool:
        """Whether the model (or somebody) has used this without making its values."""
        return bool(self.taps)

    def find_rest(self) -> Rest | None:
        """What lies outside the kept blocks under `forward="exact"`; None where that is not known."""
        return self.model_rest() if self.outside is None else self.outside.rest()

    @property
    def edits(self) -> Outside:
        """What edits did outside the kept blocks, so far."""
        if self.outside is not None:
            return self.outside
        before = copy.copy(self)  # not this very data, which will hold what comes of the edits
        before.values = None
        return Outside(before if self.knows_outside else None)

    def model_rest(self) -> Rest | None:
        """The same before any edit of this data."""
        return self.rest

    @property
    def knows_outside(self) -> bool:
        """Whether `find_rest` knows what lies outside the kept blocks."""
        return self.rest is not None if self.outside is None else self.outside.of is not None

    def make(self) -> Tensor:
        """The values of what has not been written to."""
        raise NotImplementedError

    def block_values(self) -> Shaped[Tensor, "batch head_index q_block block_q key"]:
        """Values on the kept blocks.

        Raises:
            ValueError: More than `MAX_VALUES` of them.
        """
        if self.values is not None:
            return self.values
        self.check_size()
        made = self.make()
        if made.requires_grad and not self.is_used:
            self.values = made  # it is what the graph will use: a gradient must find this very tensor
        self.read_late = self.read_late or (made.requires_grad and self.is_used)
        return made

    def entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Shaped[Tensor, " entry"]:
        """Values at single entries, given as four index tensors `[entry]`."""
        layout = self.layout
        slot, kept = layout.find(batch, head, query_pos // layout.block_q, key_pos // layout.block_k)
        if self.is_lazy and not self.lazy_requires_grad:
            kept = kept & layout.mask.allows(batch, query_pos, key_pos)
            found = self.make_entries(batch, head, query_pos, key_pos)
        else:
            found = self.block_values()[self.locate(batch, head, query_pos, key_pos, slot)]
        return torch.where(kept, found, torch.full((), self.fill, dtype=found.dtype, device=found.device))

    @property
    def lazy_requires_grad(self) -> bool:
        """Whether values, if made now, would be part of a graph."""
        return False

    def make_entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """Values at single entries of what has not been written to, mask not applied."""
        raise NotImplementedError

    def locate(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor, slot: Tensor) -> tuple[Tensor, ...]:
        """Indices into the values of single entries."""
        block_q, block_k = self.layout.block_q, self.layout.block_k
        return batch, head, query_pos // block_q, query_pos % block_q, slot * block_k + key_pos % block_k

    def values_on(self, layout: BlockLayout) -> Tensor:
        """Values on the blocks of `layout`, which holds the present one; what is new holds `fill`.

        Raises:
            ValueError: What is new was not recorded, and can't be recomputed.
        """
        if layout.kv_indices is self.layout.kv_indices:
            return self.block_values()
        self.check_size(layout)
        if self.hides_entries and self.layout.n_slots and bool((layout.rows()[1] & ~self._have(layout)).any()):
            raise ValueError(
                f"This tensor was computed from the recorded blocks of layer {self.origin.layer}; with forward='exact' its "
                "values on further ones are not known. Record the same blocks in both runs (layout_from=cache), or write to "
                "the pattern or the scores themselves before computing with them."
            )
        return relayout(self.block_values(), self.layout, layout, self.fill)

    def _have(self, layout: BlockLayout) -> Bool[Tensor, "batch head_index q_block slot"]:
        """Which blocks of another layout are kept here."""
        batch = torch.arange(layout.batch, device=layout.device)[:, None, None, None]
        head = torch.arange(layout.n_heads, device=layout.device)[:, None, None]
        q_block = torch.arange(layout.n_q_blocks, device=layout.device)[:, None]
        return self.layout.find(batch, head, q_block, layout.rows()[0])[1]

    def extend(self, layout: BlockLayout) -> None:
        """Keep the blocks of `layout`, which holds the present one, too."""
        if layout is not self.layout:
            self.values = self.values_on(layout)
            self.layout = layout

    def to(self: Data, device: torch.device) -> Data:
        """A copy on another device."""
        other = self.fork()
        other.layout = self.layout.to(device)
        other.values = None if self.values is None else self.values.to(device)
        return other

    def fork(self: Data) -> Data:
        """An independent copy."""
        other = copy.copy(self)
        other.values = None if self.values is None else self.values.clone()
        other.is_expanded = False
        return other

    def check_writable(self) -> None:
        """Raise RuntimeError where a write would be one to several entries at once."""
        if self.is_expanded:
            raise RuntimeError(
                "This is an expanded sparse tensor, whose heads or texts are one: clone() it before writing to it."
            )

    def select(self, texts: Int[Tensor, " batch"], heads: Int[Tensor, " head_index"]) -> BlockData:
        """The content of some batch elements and heads, as a copy."""
        layout = self.layout.select(texts, heads)
        return BlockData(layout, self.fill, self.origin, self.block_values()[texts][:, heads], watches=self.watches)

    def stored_tensors(self) -> list[Tensor]:
        """What holds the memory: indices and values."""
        layout = self.layout
        return [x for x in (layout.kv_indices, layout.kv_num_blocks, self.values) if x is not None]

    @property
    def hides_entries(self) -> bool:
        """Whether entries outside the kept blocks are not `fill` in the model, but were not recorded."""
        return self.origin.is_exact and not self.layout.is_full

    @property
    def is_lazy(self) -> bool:
        """Whether the values are recomputed when asked for."""
        return False

    def check_size(self, layout: BlockLayout | None = None) -> None:
        """Raise ValueError where there would be more than `MAX_VALUES` values, on the kept blocks or those of `layout`."""
        layout = self.layout if layout is None else layout
        numel = layout.batch * layout.n_heads * layout.n_q_blocks * layout.block_q * layout.n_slots * layout.block_k
        if numel > MAX_VALUES:
            raise ValueError(
                f"The values of layer {self.origin.layer}'s kept blocks would be {numel:,} numbers; at most "
                f"{MAX_VALUES:,} are made. Take fewer heads, or a smaller k (now {layout})."
            )

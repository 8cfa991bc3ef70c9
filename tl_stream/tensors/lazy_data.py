"""`LazyData`: values on the kept blocks that are recomputed from q and k."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.products import Products
from tl_stream.tensors.relayout import relayout

Lazy = TypeVar("Lazy", bound="LazyData")


@dataclass(eq=False)
class LazyData(BlockData):
    """Values that are recomputed from q and k until somebody writes to them.

    Only `plain` is kept; the products that are part of a graph live as long as a tensor that is not detached, or the
    graph itself, needs them. So a cached pattern doesn't keep the graph of its run alive.

    Attributes:
        plain: Products without gradients.
        live: The same with gradients, while somebody holds them.
        source: What this is an unchanged copy of (in another dtype, say): a gradient of it counts the uses of its copies.
    """

    plain: Products | None = None
    live: weakref.ref[Products] | None = None
    source: Any = None

    def of(self: Lazy, products: Products) -> Lazy:
        """Set the products; the caller keeps those alive for as long as gradients matter."""
        self.plain, self.live = products.detach(), weakref.ref(products)
        return self

    @property
    def products(self) -> Products:
        """The products, with gradients where those still live."""
        live = None if self.live is None else self.live()
        found = self.plain if live is None else live
        assert found is not None
        return found

    def fork(self: Lazy) -> Lazy:
        other = BlockData.fork(self)
        other.source = self if self.is_lazy else None
        return other

    @property
    def lineage(self: Lazy) -> list[Lazy]:
        """This, and what it is an unchanged copy of."""
        before = [] if self.source is None or self.source.version else self.source.lineage
        return [self, *before]

    def follow(self) -> None:
        """Before a use: go by the values that the source has got in the graph since, so that its gradient counts this use."""
        source = self.lineage[-1]
        if self.is_lazy and source.values is not None and source.values.requires_grad:
            self.values = source.values.clone()

    def block_values(self) -> Tensor:
        source = self.lineage[-1]
        if self.is_lazy and source is not self and torch.is_grad_enabled() and self.lazy_requires_grad:
            made = source.block_values()  # the source's, so that its gradient counts what is done with these
            self.values = self.values if self.is_used else made.clone()
        return super().block_values()

    @property
    def is_lazy(self) -> bool:
        return self.values is None

    @property
    def lazy_requires_grad(self) -> bool:
        return self.products.requires_grad

    @property
    def requires_grad(self) -> bool:
        return super().requires_grad or self.lazy_requires_grad

    @property
    def in_graph(self) -> bool:
        products = self.products
        inputs = (products.q, products.k, *(() if products.sink is None else (products.sink,)))
        return super().in_graph or any(x.requires_grad for x in inputs)

    def values_on(self, layout: BlockLayout) -> Tensor:
        if not self.hides_entries or layout.kv_indices is self.layout.kv_indices:
            return super().values_on(layout)
        self.check_size(layout)
        known = relayout(self.block_values(), self.layout, layout, self.fill)
        have = self._have(layout).repeat_interleave(layout.block_k, -1)[:, :, :, None]
        new = self.make_on(layout).to(known.dtype)
        return torch.where(have, known, new if self.outside is None else self.outside.edit(new))

    def make_on(self, layout: BlockLayout) -> Tensor:
        """What `make` would give on the blocks of another layout, as the model had them."""
        raise NotImplementedError

    def to(self: Lazy, device: torch.device) -> Lazy:
        return BlockData.to(self, device).of(self.products.to(device))

    def stored_tensors(self) -> list[Tensor]:
        return super().stored_tensors() + self.products.stored_tensors()

"""What a sparse tensor holds: a layout, and values on the kept blocks, made only when somebody asks."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.masking import NEVER
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.rest import Rest, block_softmax

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
        return self.rest

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
        return other

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
        return torch.where(have, known, self.make_on(layout).to(known.dtype))

    def make_on(self, layout: BlockLayout) -> Tensor:
        """What `make` would give on the blocks of another layout, as the model had them."""
        raise NotImplementedError

    def to(self: Lazy, device: torch.device) -> Lazy:
        return BlockData.to(self, device).of(self.products.to(device))

    def stored_tensors(self) -> list[Tensor]:
        return super().stored_tensors() + self.products.stored_tensors()


@dataclass(eq=False)
class ScoresData(LazyData):
    """Scores that are recomputed from q and k.

    Attributes:
        patterns: What their softmax gave, each time it was taken.
    """

    patterns: tuple[PatternData, ...] = ()

    @property
    def is_used(self) -> bool:
        return bool(self.patterns)

    def find_rest(self) -> Rest | None:
        return Rest(self.products, self.origin.config.backend) if self.origin.is_exact else self.rest

    def make(self) -> Tensor:
        return self.make_on(self.layout)

    def make_on(self, layout: BlockLayout) -> Tensor:
        return self.products.block_scores(layout)

    def make_entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.products.scores_at(batch, head, query_pos, key_pos)

    def select(self, texts: Tensor, heads: Tensor) -> BlockData:
        if not self.is_lazy or self.lazy_requires_grad:
            return super().select(texts, heads)
        data = ScoresData(self.layout.select(texts, heads), self.fill, self.origin)
        return data.of(self.products.select(texts, heads))


@dataclass(eq=False)
class PatternData(LazyData):
    """Probabilities that are recomputed from q, k and each row's log-sum-exp.

    Attributes:
        lse: Log-sum-exp of each row (natural log, sink included), once it is known.
        is_exact: Whether that is over all keys that the mask allows (`forward="exact"`), not over the kept ones alone.
        lse_in_graph: The same as part of the graph, where values were made in it.
        scores_in_graph: The scores from which they were made there.
    """

    lse: Float[Tensor, "batch head_index query_pos"] | None = None
    is_exact: bool = False
    lse_in_graph: Tensor | None = None
    scores_in_graph: Tensor | None = None

    @property
    def _normalising(self) -> BlockLayout:
        return self.layout.to_full() if self.is_exact else self.layout

    def row_lse(self) -> Float[Tensor, "batch head_index query_pos"]:
        """Log-sum-exp of each row (natural log, sink included), over its kept keys or all that the mask allows."""
        if self.lse is None:
            with torch.no_grad():
                self.lse = self._lse_over(self._normalising)
        return self.lse

    def _lse_over(self, layout: BlockLayout) -> Tensor:
        return self.products.attend(self.products.k[..., :0], layout, "gather")[1]

    def find_rest(self) -> Rest | None:
        if not self.is_exact:
            return self.rest
        lse = next((each.lse_in_graph for each in self.lineage if each.lse_in_graph is not None), None)
        if lse is None:
            lse = self._lse_over(self._normalising) if self.lazy_requires_grad else self.row_lse()
        return Rest(self.products, self.origin.config.backend, lse)

    def make(self) -> Tensor:
        scores = self.products.block_scores(self.layout)
        if not self.is_exact:
            return block_softmax(scores, self.layout, self.products.sink)[0]
        if not scores.requires_grad:
            return self._normalised(scores, self.layout)
        self.scores_in_graph = scores
        outside = Rest(self.products, self.origin.config.backend).logit(self.layout)
        values, self.lse_in_graph = block_softmax(scores, self.layout, outside)
        return values

    def make_on(self, layout: BlockLayout) -> Tensor:
        return self._normalised(self.products.block_scores(layout), layout)

    def _normalised(self, scores: Tensor, layout: BlockLayout) -> Tensor:
        lse = self.row_lse() if self.lse_in_graph is None else self.lse_in_graph
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % layout.block_q)).unflatten(-1, (-1, layout.block_q))
        return (scores - lse[..., None].clamp(min=torch.finfo(scores.dtype).min)).exp()

    def make_entries(self, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        scores = self.products.scores_at(batch, head, query_pos, key_pos)
        return (scores - self.row_lse()[batch, head, query_pos]).exp()

    def weigh(self, v: Tensor, detached: bool) -> Tensor:
        """`pattern @ v` by the fused kernel, which makes no values; remembers the log-sum-exp.

        Of a record of full attention that is the part of its kept entries; all of it where this goes on into the model.
        """
        products = self.products.detach() if detached else self.products
        backend = self.origin.config.backend
        if self.is_complete or not self.is_exact:
            z, lse = products.attend(v, self._normalising, backend)
            for each in self.lineage:
                each.lse = lse.detach()
            return z
        z, kept = products.attend(v, self.layout, backend)
        everything = products.attend(products.k[..., :0], self._normalising, backend)[1]
        return (kept - everything.clamp(min=torch.finfo(kept.dtype).min)).exp()[..., None] * z

    def select(self, texts: Tensor, heads: Tensor) -> BlockData:
        if not self.is_lazy or self.lazy_requires_grad:
            return super().select(texts, heads)
        lse = self.row_lse()[texts][:, heads]
        layout = self.layout.select(texts, heads)
        data = PatternData(layout, self.fill, self.origin, lse=lse, is_exact=self.is_exact)
        return data.of(self.products.select(texts, heads))

    def to(self, device: torch.device) -> PatternData:
        other = LazyData.to(self, device)
        other.lse = None if self.lse is None else self.lse.to(device)
        return other

    def stored_tensors(self) -> list[Tensor]:
        return super().stored_tensors() + ([] if self.lse is None else [self.lse])


def relayout(values: Tensor, old: BlockLayout, new: BlockLayout, fill: float | bool) -> Tensor:
    """Values on the blocks of `new`: those of `old` where it keeps a block, else `fill`."""
    return move_blocks(values, old.rows(), new.rows(), fill, old.block_k)


Rows = tuple[Int[Tensor, "batch head_index q_block _"], Bool[Tensor, "batch head_index q_block _"]]  # as `BlockLayout.rows`


def move_blocks(
    values: Shaped[Tensor, "batch head_index q_block block_q key"], old: Rows, new: Rows, fill: float | bool, block_k: int
) -> Shaped[Tensor, "batch head_index q_block block_q new_key"]:
    """Values on the key blocks `new`: those on the blocks `old` where it has one, else `fill`.

    Blocks are ascending. Indexes blocks, never entries.
    """
    (have, had), (want, used) = old, new
    if not have.shape[-1]:
        return values.new_full((*values.shape[:-1], want.shape[-1] * block_k), fill)
    have, want = have.masked_fill(~had, NEVER), want.contiguous()
    slot = torch.searchsorted(have, want).clamp(max=have.shape[-1] - 1)
    known = used & (have.gather(-1, slot) == want)
    blocks = values.unflatten(-1, (-1, block_k))
    index = slot[:, :, :, None, :, None].expand(*values.shape[:4], -1, block_k)
    found = torch.where(known[:, :, :, None, :, None], blocks.gather(-2, index), torch.as_tensor(fill, dtype=values.dtype))
    return found.flatten(-2)

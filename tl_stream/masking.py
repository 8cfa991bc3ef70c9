"""Structured attention masks: which (query, key) pairs may attend, never as a query_pos x key_pos tensor.

Every mask here is, for each query, an interval of keys, less the keys that are padding. That covers causal,
sliding-window, chunked and KV-cached attention in memory linear in the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NEVER = 2**31 - 1  # a key position that no query may read


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Query i may read key j where `start[i] <= j < stop[i]` and j is no padding.

    Args:
        start: First key of each query, `[query_pos]`, int32; None: the first key of all.
        stop: One past the last key of each query, `[query_pos]`, int32.
        key_length: Number of keys.
        key_valid: False where a key is padding that no query may read, `[batch, key_pos]`; None where there is none.
        real: False where a token is padding, whether or not the model lets it be read, `[batch, key_pos]`: it weighs in no
            choice and in no average. None: as `key_valid`.
    """

    start: Int[Tensor, " query_pos"] | None
    stop: Int[Tensor, " query_pos"]
    key_length: int
    key_valid: Bool[Tensor, "batch key_pos"] | None = None
    real: Bool[Tensor, "batch key_pos"] | None = None

    @classmethod
    def causal(
        cls,
        query_length: int,
        key_length: int | None = None,
        *,
        window: int | None = None,
        key_valid: Bool[Tensor, "batch key_pos"] | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionMask:
        """Each query reads itself and what came before; the queries are the last `query_length` of the keys.

        Args:
            query_length: Number of queries.
            key_length: Number of keys, earlier (KV-cached) ones included; None: as many as queries.
            window: Number of most recent keys that a query may read, itself included (sliding-window attention).
            key_valid: False where a key is padding, `[batch, key_pos]`.
            device: Where the index tensors live.

        Raises:
            ValueError: Fewer keys than queries, or a window below 1.
        """
        key_length = query_length if key_length is None else key_length
        if key_length < query_length:
            raise ValueError(
                f"key_length was {key_length}, below query_length {query_length}; expected all keys, cached ones included."
            )
        if window is not None and window < 1:
            raise ValueError(f"window was {window}; expected at least 1 (a query always reads itself), or None.")
        stop = torch.arange(key_length - query_length + 1, key_length + 1, device=device, dtype=torch.int32)
        start = None if window is None or window >= key_length else (stop - window).clamp(min=0)
        return cls(start, stop, key_length, key_valid)

    @property
    def query_length(self) -> int:
        """Number of queries."""
        return self.stop.shape[0]

    @property
    def window(self) -> int | None:
        """The most keys that a query may read, where some query may not read from the first key on; None: all may."""
        if self.start is None or not bool((self.start > 0).any()):
            return None
        return int((self.stop - self.start).max())

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.stop.device

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""
        start = None if self.start is None else self.start.to(device)
        valid, real = (None if x is None else x.to(device) for x in (self.key_valid, self.real))
        return AttentionMask(start, self.stop.to(device), self.key_length, valid, real)

    def intersect(self, other: AttentionMask) -> AttentionMask:
        """The pairs that both masks allow.

        Raises:
            ValueError: The masks are of different sizes.
        """
        sizes = (self.query_length, self.key_length), (other.query_length, other.key_length)
        if sizes[0] != sizes[1]:
            raise ValueError(f"other was a mask of {sizes[1]} queries and keys; expected {sizes[0]}, as this one has.")
        starts = [x for x in (self.start, other.start) if x is not None]
        start = torch.maximum(*starts) if len(starts) == 2 else next(iter(starts), None)
        stop = torch.minimum(self.stop, other.stop)
        valid, real = (_both(getattr(self, name), getattr(other, name)) for name in ("key_valid", "real"))
        return AttentionMask(start, stop, self.key_length, valid, real)

    def part(self, rows: range, keys: range) -> AttentionMask:
        """The mask of some queries and keys (ranges of step 1), counted from the first of each."""
        start = None if self.start is None else (self.start[rows.start : rows.stop] - keys.start).clamp(0, len(keys))
        stop = (self.stop[rows.start : rows.stop] - keys.start).clamp(0, len(keys))
        valid, real = (None if x is None else x[:, keys.start : keys.stop] for x in (self.key_valid, self.real))
        return AttentionMask(start, stop, len(keys), valid, real)

    def with_padding(self, key_valid: Bool[Tensor, "batch key_pos"]) -> AttentionMask:
        """The same mask, less the keys that `key_valid` calls padding."""
        return replace(self, key_valid=_both(self.key_valid, key_valid))

    def of_texts(self, texts: Int[Tensor, " batch"]) -> AttentionMask:
        """The mask of some texts of the batch."""
        valid, real = (None if x is None else x[texts] for x in (self.key_valid, self.real))
        return replace(self, key_valid=valid, real=real)

    @property
    def tokens(self) -> Bool[Tensor, "batch key_pos"] | None:
        """False where a token is padding; None where there is none."""
        return self.key_valid if self.real is None else _both(self.key_valid, self.real)

    @property
    def own(self) -> Int[Tensor, " query_pos"]:
        """Each query's own position among the keys: the last that it may read."""
        return (self.stop - 1).clamp(min=0).long()

    def queries(self) -> Bool[Tensor, "batch query_pos"] | None:
        """False where a query is padding; None where there is none."""
        return None if self.tokens is None else self.tokens[:, self.own]

    def padding_behind(self) -> int:
        """How many queries of padding stand behind a text, at most."""
        queries = self.queries()
        if queries is None:
            return 0
        return int(queries.int().flip(-1).argmax(-1).masked_fill(~queries.any(-1), 0).max())

    def bounds(self, query_pos: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"] | None, Int[Tensor, "*shape"]]:
        """First key and one past the last key of each query; a query past the end may read nothing."""
        row = query_pos.clamp(max=self.query_length - 1)
        stop = self.stop[row].masked_fill(query_pos >= self.query_length, 0)
        return None if self.start is None else self.start[row], stop

    def place(self, batch: Int[Tensor, ...], key_pos: Int[Tensor, ...]) -> Int[Tensor, ...]:
        """`key_pos` as int32, with `NEVER` for padding and past the end; the index tensors broadcast."""
        hidden = key_pos >= self.key_length
        if self.key_valid is not None:
            hidden = hidden | ~self.key_valid[batch, key_pos.clamp(max=self.key_length - 1)]
        return torch.where(hidden, NEVER, key_pos.int())

    def allows(self, batch: Int[Tensor, ...], query_pos: Int[Tensor, ...], key_pos: Int[Tensor, ...]) -> Bool[Tensor, ...]:
        """Whether each pair may attend; the index tensors broadcast. Indices past either end are not allowed."""
        return within(self.place(batch, key_pos), *self.bounds(query_pos))

    def counts(
        self,
        batch: Int[Tensor, ...],
        query_pos: Int[Tensor, ...],
        first_key: Int[Tensor, ...],
        last_key: Int[Tensor, ...],
    ) -> Int[Tensor, ...]:
        """How many keys of `first_key <= j < last_key` each query may read; the index tensors broadcast."""
        start, stop = self.bounds(query_pos)
        low = first_key if start is None else torch.maximum(first_key, start)
        high = torch.minimum(last_key, stop)
        if self.key_valid is None:
            return (high - low).clamp(min=0)
        before = torch.nn.functional.pad(self.key_valid.long().cumsum(-1), (1, 0))
        low = low.clamp(max=self.key_length)
        return before[batch, torch.maximum(high, low)] - before[batch, low]

    def n_pairs(self, batch: int) -> int:
        """Number of (query, key) pairs that may attend, over a batch of `batch` texts; one head."""
        rows = torch.arange(self.query_length, device=self.device)
        texts = torch.arange(batch, device=self.device)[:, None]
        everything = self.counts(texts, rows, torch.zeros_like(rows), torch.full_like(rows, self.key_length))
        return int(everything.expand(batch, -1).sum())


def within(placed: Int[Tensor, ...], start: Int[Tensor, ...] | None, stop: Int[Tensor, ...]) -> Bool[Tensor, ...]:
    """`start <= placed < stop`, on what `AttentionMask.place` and `AttentionMask.bounds` give."""
    return placed < stop if start is None else (placed < stop) & (placed >= start)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where both are True; None is True everywhere."""
    return one if other is None else other if one is None else one & other

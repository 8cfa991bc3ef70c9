"""The kept entries of a cached pattern, a run of query blocks at a time: what every streamed analysis loops over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream import score_mod
from tl_stream.fidelity.runs import wide
from tl_stream.layout import BlockLayout
from tl_stream.masking import NEVER
from tl_stream.precision import outside_autocast
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.joined import JoinedTensor, parts_of
from tl_stream.tensors.pattern_data import PatternData

CHUNK_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The kept entries of some query blocks of one text.

    Attributes:
        query_pos: Position of each query; `masking.NEVER` for the padding of a block.
        key_pos: Position of each kept key, padding of the last block included.
        kept: Which entries there are: those that the mask allows and the layout keeps.
        weight: Their probabilities; 0 where there is no entry.
    """

    query_pos: Int[Tensor, "q_block block_q"]
    key_pos: Int[Tensor, "head_index q_block key"]
    kept: Bool[Tensor, "head_index q_block block_q key"]
    weight: Float[Tensor, "head_index q_block block_q key"]

    @property
    def last_query(self) -> Int[Tensor, " q_block"]:
        """Position of the last query of each block."""
        return self.query_pos.masked_fill(self.query_pos == NEVER, -1).amax(-1)


@dataclass(frozen=True, eq=False)
class KeptEntries:
    """A pattern's entries on its kept blocks, for one text.

    Attributes:
        parts: Its consecutive rows: all of them, or (under `dense_queries`) the sparse ones and those that read everything.
    """

    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, pattern: BlockSparseTensor | JoinedTensor, text: int) -> KeptEntries:
        """One text of a cached pattern.

        Raises:
            IndexError: No such text.
            ValueError: The pattern doesn't show all queries and keys of a text (`pos_slice`, or a KV cache, was in use).
        """
        parts: list[_Part] = []
        for part in parts_of(pattern):
            texts = part._view.texts(part.device).tolist()
            if not 0 <= text < len(texts):
                raise IndexError(f"text was {text}; expected the index of one of the {len(texts)} texts in the cache.")
            parts.append(_Part(part._data, texts[text], sum(each.layout.shape[2] for each in parts)))
        n_queries, n_keys = pattern.block_layout.seq_lengths
        if pattern.shape[-2] != n_keys or n_queries != n_keys:
            raise ValueError(
                f"The pattern of layer {pattern.origin.layer} shows {pattern.shape[-2]} queries of {n_keys} keys; "
                "expected that of a whole text. Run the text without pos_slice and past_kv_cache."
            )
        return cls(tuple(parts))

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.parts[0].layout.mask.key_length

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.parts[0].layout.n_heads

    @property
    def most_entries(self) -> int:
        """Entries of a row over all heads, at most."""
        return self.n_heads * max(part.layout.n_slots * part.layout.block_k for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the entries are computed."""
        return self.parts[0].layout.device

    def real_tokens(self) -> Bool[Tensor, " pos"]:
        """False where a token is padding."""
        real = self.parts[0].layout.mask.tokens
        return torch.ones(self.length, dtype=torch.bool, device=self.device) if real is None else real[self.parts[0].text]

    def runs(self, positions: Int[Tensor, " pos"] | None = None) -> Iterator[KeptRows]:
        """The entries of the query blocks of some positions (None: of all), in runs of about `CHUNK_ENTRIES` entries.

        O(T) memory a run.
        """
        for part in self.parts:
            yield from part.runs(positions)


@dataclass(frozen=True, eq=False)
class _Part:
    """Consecutive rows of a pattern.

    Attributes:
        data: What they hold; its rows count from 0.
        text: Index of the text in `data`.
        first: Position of the first row.
    """

    data: BlockData
    text: int
    first: int

    @property
    def layout(self) -> BlockLayout:
        """Kept blocks."""
        return self.data.layout

    def runs(self, positions: Int[Tensor, " pos"] | None) -> Iterator[KeptRows]:
        """As `KeptEntries.runs`."""
        layout = self.layout
        if positions is None:
            blocks = torch.arange(layout.n_q_blocks, device=layout.device)
        else:
            rows = positions - self.first
            blocks = (rows[(rows >= 0) & (rows < layout.shape[2])] // layout.block_q).unique()
        entries = layout.n_heads * layout.block_q * max(layout.n_slots * layout.block_k, 1)
        for part in blocks.split(max(1, CHUNK_ENTRIES // entries)) if len(blocks) else ():
            yield self._run(part)

    def _run(self, blocks: Tensor) -> KeptRows:
        layout = self.layout
        rows = blocks[:, None] * layout.block_q + torch.arange(layout.block_q, device=layout.device)
        indices, used = self._key_blocks(blocks, rows)
        key_pos = (indices[..., None] * layout.block_k + torch.arange(layout.block_k, device=layout.device)).flatten(-2)
        text = torch.tensor(self.text, device=layout.device)
        allowed = layout.mask.allows(text, rows[:, :, None], key_pos[:, :, None])
        kept = allowed & used.repeat_interleave(layout.block_k, -1)[:, :, None]
        weight = self._computed(rows, key_pos) if self.data.values is None else self._stored(blocks, kept.shape[-1])
        query_pos = torch.where(rows < layout.shape[2], rows + self.first, NEVER)
        return KeptRows(query_pos, key_pos, kept, torch.where(kept, weight, 0.0))

    def _key_blocks(self, blocks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Kept key blocks of each query block, `[head_index, q_block, slot]`, and which of them count."""
        layout = self.layout
        if layout.kv_indices is None or layout.kv_num_blocks is None:
            seen = -(-int(layout.mask.bounds(rows)[1].max()) // layout.block_k)
            indices = torch.arange(seen, device=layout.device).expand(layout.n_heads, len(blocks), -1)
            return indices, torch.ones_like(indices, dtype=torch.bool)
        slots = torch.arange(layout.n_slots, device=layout.device)
        used = slots < layout.kv_num_blocks[self.text][:, blocks, None]
        return layout.kv_indices[self.text][:, blocks].long(), used

    @outside_autocast
    def _computed(self, rows: Tensor, key_pos: Tensor) -> Tensor:
        """`exp(score - lse)`, from q and k."""
        data = self.data
        assert isinstance(data, PatternData)
        products = data.products.detach()
        products.check_unchanged()
        device, (_, n_heads, n_rows, n_keys) = rows.device, self.layout.shape
        head = torch.arange(n_heads, device=device)
        row, keys = rows.clamp(max=n_rows - 1), key_pos.clamp(max=n_keys - 1)
        kv_head = head // (n_heads // products.k.shape[1])
        q = wide(products.q[self.text, :, row])
        k = wide(products.k[self.text, kv_head[:, None, None], keys])
        scores = q @ k.transpose(-1, -2) * products.scale
        text = torch.tensor(self.text, device=device)
        indices = (text, head[:, None, None, None], rows[:, :, None], key_pos[:, :, None])
        scores = score_mod.apply(products.score_mods, scores, *indices)
        return (scores - data.row_lse()[self.text][:, row][..., None]).exp()

    def _stored(self, blocks: Tensor, n_keys: int) -> Tensor:
        """Values that were made or written."""
        return wide(self.data.block_values()[self.text, :, blocks, :, :n_keys].detach())


def patterns_of(cache: Any) -> dict[int, BlockSparseTensor | JoinedTensor]:
    """The patterns of a cache by layer, in order.

    Raises:
        TypeError: Not a SparseActivationCache.
        ValueError: No pattern is in it.
    """
    if not isinstance(getattr(cache, "patterns", None), dict):
        raise TypeError(f"cache was a {type(cache).__name__}; expected a SparseActivationCache, of run_with_sparse_cache.")
    if not cache.patterns:
        raise ValueError("The cache holds no pattern; expected hook_pattern among names_filter.")
    return dict(sorted(cache.patterns.items()))


def exact_for(forward: str) -> str:
    """What the numbers of an analysis are exact for, given the forward of the run."""
    return "the sparse model" if forward == "sparse" else "the real model, its recorded entries alone"

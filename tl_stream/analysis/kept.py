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
from tl_stream.precision import outside_autocast
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.pattern_data import PatternData

CHUNK_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The kept entries of some query blocks of one text.

    Attributes:
        query_pos: Position of each query; those of the last block may lie past the end.
        key_pos: Position of each kept key, padding of the last block included.
        kept: Which entries there are: those that the mask allows and the layout keeps.
        weight: Their probabilities; 0 where there is no entry.
    """

    query_pos: Int[Tensor, "q_block block_q"]
    key_pos: Int[Tensor, "head_index q_block key"]
    kept: Bool[Tensor, "head_index q_block block_q key"]
    weight: Float[Tensor, "head_index q_block block_q key"]


@dataclass(frozen=True, eq=False)
class KeptEntries:
    """A pattern's entries on its kept blocks, for one text.

    Attributes:
        data: What the pattern shows.
        text: Index of the text in `data`.
    """

    data: BlockData
    text: int

    @classmethod
    def of(cls, pattern: BlockSparseTensor, text: int) -> KeptEntries:
        """One text of a cached pattern.

        Raises:
            IndexError: No such text.
            ValueError: The pattern doesn't show all queries and keys of a text (`pos_slice`, or a KV cache, was in use).
        """
        texts = pattern._view.texts(pattern.device).tolist()
        if not 0 <= text < len(texts):
            raise IndexError(f"text was {text}; expected the index of one of the {len(texts)} texts in the cache.")
        n_queries, n_keys = pattern._data.layout.seq_lengths
        if len(pattern._view.rows) != n_keys or n_queries != n_keys:
            raise ValueError(
                f"The pattern of layer {pattern.origin.layer} shows {len(pattern._view.rows)} queries of {n_keys} keys; "
                "expected that of a whole text. Run the text without pos_slice and past_kv_cache."
            )
        return cls(pattern._data, texts[text])

    @property
    def layout(self) -> BlockLayout:
        """Kept blocks."""
        return self.data.layout

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layout.mask.key_length

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.layout.n_heads

    def real_tokens(self) -> Bool[Tensor, " pos"]:
        """False where a token is padding."""
        valid = self.layout.mask.key_valid
        return torch.ones(self.length, dtype=torch.bool, device=self.layout.device) if valid is None else valid[self.text]

    def runs(self, blocks: Int[Tensor, " q_block"] | None = None) -> Iterator[KeptRows]:
        """The entries of some query blocks (None: of all), in runs of about `CHUNK_ENTRIES` entries. O(T) memory a run."""
        layout = self.layout
        blocks = torch.arange(layout.n_q_blocks, device=layout.device) if blocks is None else blocks
        step = max(1, CHUNK_ENTRIES // (self.n_heads * layout.block_q * max(layout.n_slots * layout.block_k, 1)))
        for part in blocks.split(step) if len(blocks) else ():
            yield self._run(part)

    def _run(self, blocks: Tensor) -> KeptRows:
        layout = self.layout
        query_pos = blocks[:, None] * layout.block_q + torch.arange(layout.block_q, device=layout.device)
        indices, used = self._key_blocks(blocks, query_pos)
        key_pos = (indices[..., None] * layout.block_k + torch.arange(layout.block_k, device=layout.device)).flatten(-2)
        text = torch.tensor(self.text, device=layout.device)
        allowed = layout.mask.allows(text, query_pos[:, :, None], key_pos[:, :, None])
        kept = allowed & used.repeat_interleave(layout.block_k, -1)[:, :, None]
        weight = self._computed(query_pos, key_pos) if self.data.values is None else self._stored(blocks, kept.shape[-1])
        return KeptRows(query_pos, key_pos, kept, torch.where(kept, weight, 0.0))

    def _key_blocks(self, blocks: Tensor, query_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Kept key blocks of each query block, `[head_index, q_block, slot]`, and which of them count."""
        layout = self.layout
        if layout.kv_indices is None or layout.kv_num_blocks is None:
            seen = -(-int(layout.mask.bounds(query_pos)[1].max()) // layout.block_k)
            indices = torch.arange(seen, device=layout.device).expand(layout.n_heads, len(blocks), -1)
            return indices, torch.ones_like(indices, dtype=torch.bool)
        slots = torch.arange(layout.n_slots, device=layout.device)
        used = slots < layout.kv_num_blocks[self.text][:, blocks, None]
        return layout.kv_indices[self.text][:, blocks].long(), used

    @outside_autocast
    def _computed(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """`exp(score - lse)`, from q and k."""
        data = self.data
        assert isinstance(data, PatternData)
        products = data.products.detach()
        products.check_unchanged()
        device = query_pos.device
        head = torch.arange(self.n_heads, device=device)
        rows, keys = query_pos.clamp(max=self.length - 1), key_pos.clamp(max=self.length - 1)
        kv_head = head // (self.n_heads // products.k.shape[1])
        q = wide(products.q[self.text, :, rows])
        k = wide(products.k[self.text, kv_head[:, None, None], keys])
        scores = q @ k.transpose(-1, -2) * products.scale
        text = torch.tensor(self.text, device=device)
        indices = (text, head[:, None, None, None], query_pos[:, :, None], key_pos[:, :, None])
        scores = score_mod.apply(products.score_mods, scores, *indices)
        return (scores - data.row_lse()[self.text][:, rows][..., None]).exp()

    def _stored(self, blocks: Tensor, n_keys: int) -> Tensor:
        """Values that were made or written."""
        return wide(self.data.block_values()[self.text, :, blocks, :, :n_keys].detach())


def patterns_of(cache: Any) -> dict[int, BlockSparseTensor]:
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

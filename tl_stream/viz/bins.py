"""`Bins`: a text cut into stretches of equal length, and a pattern's probability mass on them.

All sums go through `pattern @ membership`, which the sparse kernel computes from the kept blocks: a row of T keys
becomes a row of at most a few hundred bins, and no T x T tensor is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot, pad

from tl_stream.layout import BlockLayout
from tl_stream.tensors.joined_layout import JoinedLayout

MAX_BINS = 256
OverQueries = Literal["mean", "max"]
_LABEL_LETTERS = 16


@dataclass(frozen=True)
class Bins:
    """Tokens `i * size <= pos < (i + 1) * size` are bin i; the last bin may be shorter.

    Args:
        n_tokens: Length of the text.
        size: Tokens a bin.

    Raises:
        ValueError: Either is below 1.
    """

    n_tokens: int
    size: int

    def __post_init__(self) -> None:
        for name in ("n_tokens", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} was {getattr(self, name)}; expected an int >= 1.")

    @classmethod
    def of(cls, layout: BlockLayout | JoinedLayout, max_bins: int = MAX_BINS) -> Bins:
        """A bin a block (the larger of block_q and block_k), or as many blocks a bin as `max_bins` asks for.

        Raises:
            ValueError: Queries and keys are not the same tokens (a KV cache was in use), or `max_bins` is below 1.
        """
        n_queries, n_keys = layout.seq_lengths
        if n_queries != n_keys:
            raise ValueError(f"The pattern has {n_queries} queries and {n_keys} keys; expected that of a whole text.")
        if max_bins < 1:
            raise ValueError(f"max_bins was {max_bins}; expected an int >= 1.")
        block = max(layout.block_q, layout.block_k)
        return cls(n_keys, block * -(-n_keys // (block * max_bins)))

    def __len__(self) -> int:
        return -(-self.n_tokens // self.size)

    def tokens(self, index: int) -> range:
        """Token positions of a bin."""
        return range(index * self.size, min((index + 1) * self.size, self.n_tokens))

    def touched(self, part: slice) -> range:
        """The bins that hold any of the tokens `part.start <= pos < part.stop`."""
        return range(part.start // self.size, -(-part.stop // self.size))

    def mass(self, rows: Float[Tensor, "*head query_pos key_pos"]) -> Float[Tensor, "*head query_pos bin"]:
        """Sum over each bin's keys. Whole rows of a `BlockSparsePattern`, or of a plain tensor; a row keeps its sum."""
        bin_of_key = torch.arange(self.n_tokens, device=rows.device) // self.size
        membership = one_hot(bin_of_key, len(self)).to(rows.dtype)
        return rows @ membership

    def square(
        self, pattern: Float[Tensor, "*head query_pos key_pos"], over_queries: OverQueries
    ) -> Float[Tensor, "*head q_bin kv_bin"]:
        """Mass on each bin of keys, reduced over the queries of each bin.

        `"mean"` conserves mass: rows sum to what the pattern's rows sum to on average. `"max"` shows what the one query
        of the bin that reads there most gives, so that a single token's reading is not thinned by its neighbours'.

        Raises:
            ValueError: Neither of the two, or a pattern that isn't of the whole text.
        """
        if tuple(pattern.shape[-2:]) != (self.n_tokens, self.n_tokens):
            raise ValueError(
                f"pattern was of {pattern.shape[-2]} queries and {pattern.shape[-1]} keys; expected that of a whole text, of "
                f"{self.n_tokens} tokens. Run the text without pos_slice and past_kv_cache."
            )
        if over_queries not in get_args(OverQueries):
            raise ValueError(f"over_queries was {over_queries!r}; expected one of {get_args(OverQueries)}.")
        mass = self.mass(pattern)
        missing = len(self) * self.size - self.n_tokens
        by_bin = pad(mass, (0, 0, 0, missing)).unflatten(-2, (len(self), self.size))
        if over_queries == "max":
            return by_bin.amax(-2)
        counts = torch.tensor([len(self.tokens(i)) for i in range(len(self))], dtype=mass.dtype, device=mass.device)
        return by_bin.sum(-2) / counts[:, None]

    def labels(self, tokens: Sequence[str], marks: Mapping[str, slice]) -> list[str]:
        """A name for each bin: positions, the marks that touch it, and how its (or the mark's) text begins.

        Spaces become dots, since circuitsvis drops them from axes; `<` becomes `[`, since labels go into a script.

        Raises:
            ValueError: The number of tokens isn't that of the bins.
        """
        if len(tokens) != self.n_tokens:
            raise ValueError(f"tokens were {len(tokens)}; expected {self.n_tokens}, one for each position.")
        return [self._label(tokens, marks, self.tokens(i)) for i in range(len(self))]

    def _label(self, tokens: Sequence[str], marks: Mapping[str, slice], here: range) -> str:
        inside = {name: part for name, part in marks.items() if part.start < here.stop and part.stop > here.start}
        begin = max([here.start, *(part.start for part in inside.values())])
        text = "".join(tokens[begin : here.stop]).strip(" .,:;!?\n")[:_LABEL_LETTERS]
        label = f"{here.start}-{here.stop - 1}{''.join(f' {name.upper()}' for name in inside)}: {text}"
        return "·".join(label.replace("<", "[").split())

"""circuitsvis's view of attention heads, at the level of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from circuitsvis.attention import attention_heads
from circuitsvis.utils.render import RenderedHTML
from jaxtyping import Float
from torch import Tensor

from tl_stream.cache import SparseActivationCache
from tl_stream.viz.bins import MAX_BINS, Bins, OverQueries

Head = tuple[int, int]
_DECIMALS = 4


def head_name(head: Head) -> str:
    """`L1H2` for head 2 of layer 1."""
    return f"L{head[0]}H{head[1]}"


def head_pattern(cache: SparseActivationCache, head: Head, text: int = 0) -> Float[Tensor, "query_pos key_pos"]:
    """The (sparse) pattern of one head on one text of the batch.

    Raises:
        KeyError: The layer's pattern isn't in the cache.
        IndexError: No such head or text.
    """
    layer, index = head
    pattern = cache["pattern", layer]
    return pattern[text, index] if pattern.ndim == 4 else pattern[index]


@torch.no_grad()
def heads_view(
    cache: SparseActivationCache,
    heads: Sequence[Head],
    tokens: Sequence[str],
    *,
    marks: Mapping[str, slice] | None = None,
    over_queries: OverQueries = "mean",
    max_bins: int = MAX_BINS,
    text: int = 0,
) -> RenderedHTML:
    """Which blocks of a text each block of it reads, for some heads, in circuitsvis's `attention_heads`.

    Values are probability mass, 0 to 1. Computed from the kept blocks, in O(T) memory; the page takes up to
    `14 * max_bins ** 2` bytes a head.

    Args:
        cache: A run's cache, with the patterns of the layers shown.
        heads: `(layer, head)` pairs.
        tokens: The text's tokens as strings, their spaces included; their beginnings name the blocks.
        marks: Parts of the text to name in the labels: name -> slice of token positions.
        over_queries: How the queries of a block are put together: `Bins.square` explains "mean" and "max".
        max_bins: Most blocks on an axis; in longer texts neighbouring blocks share one.
        text: Which text of the batch.

    Raises:
        ValueError: No heads, a number of tokens other than the pattern's, or an unknown `over_queries`.
        KeyError, IndexError: A layer whose pattern isn't in the cache, a head or text that doesn't exist.
    """
    if not heads:
        raise ValueError("heads was empty; expected at least one (layer, head) pair.")
    bins = Bins.of(cache.block_layout(heads[0][0]), max_bins)
    squares = [bins.square(head_pattern(cache, head, text), over_queries) for head in heads]
    return attention_heads(
        attention=torch.stack(squares).double().round(decimals=_DECIMALS),
        tokens=bins.labels(tokens, marks or {}),
        attention_head_names=[head_name(head) for head in heads],
        max_value=1.0,
        min_value=0.0,
    )

"""Attention between sentences, from the kept entries of a cached pattern: a head at a time, a few rows at a time.

O(T) memory for constant k, and no T x T tensor for layers that are kept whole either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.segments import Segments
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.cache import SparseActivationCache
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor, parts_of
from tl_stream.tensors.reductions import row_keys

SparsePattern = BlockSparseTensor | JoinedTensor
MAX_MATRIX = 2**28
_ENTRIES_AT_ONCE = 2**20


@torch.no_grad()
def sentence_matrix(
    cache: SparseActivationCache, layer: int, sentences: Sequence[Any], *, text: int = 0
) -> Float[Tensor, "head_index sentence sentence"]:
    """`A[h, i, j]`: mean of the pattern of head h over the rows of sentence i and the columns of sentence j, in float64.

    Entries that weren't kept count as 0, as they are in the sparse model. (Bogdan et al. 2025, arXiv:2506.19143, section 4.)

    Args:
        cache: A run's cache, with the pattern of the layer.
        layer: Layer index.
        sentences: Ascending sentences or spans (see `Segments.of`).
        text: Which text of the batch.

    Raises:
        KeyError, IndexError: No pattern of that layer, no such text.
        ValueError: Sentences as in `Segments.of`; so many that the matrix would hold more than 2^28 numbers; a pattern whose
            rows are not the whole text.
    """
    pattern = whole_pattern(cache, layer, text)
    heads, _, n_tokens = pattern.shape
    segments = Segments.of(sentences, n_tokens)
    count = len(segments)
    if heads * count * count > MAX_MATRIX:
        raise ValueError(
            f"sentences were {count}, which make {heads} x {count} x {count} numbers; expected at most {MAX_MATRIX:,}. Take "
            "some of them, or vertical_scores(), which makes no matrix."
        )
    total = torch.zeros(heads, (count + 1) ** 2, dtype=torch.float64, device=pattern.device)
    for head in range(heads):
        for row, key, value in _entries(pattern, head, segments):
            total[head].index_add_(0, (row * (count + 1) + key).flatten(), value.flatten())
    lengths = segments.lengths(pattern.device)
    return total.unflatten(1, (count + 1, count + 1))[:, :-1, :-1] / (lengths[:, None] * lengths)


@torch.no_grad()
def distant_means(pattern: SparsePattern, segments: Segments, proximity: int) -> Float[Tensor, "head_index sentence"]:
    """Mean of each column j of the sentence matrix over the sentences i >= j + proximity; NaN where none are."""
    count, lengths = len(segments), segments.lengths(pattern.device)
    weight = torch.cat([1.0 / lengths.double(), lengths.new_zeros(1)])
    total = torch.zeros(pattern.shape[0], count + 1, dtype=torch.float64, device=pattern.device)
    for head in range(pattern.shape[0]):
        for row, key, value in _entries(pattern, head, segments):
            distant = (row < count) & (row - key >= proximity)
            total[head].index_add_(0, key.flatten(), (value * weight[row] * distant).flatten())
    later = (count - proximity - torch.arange(count, device=pattern.device)).clamp(min=0)
    return total[:, :-1] / lengths / torch.where(later > 0, later, torch.nan)


def whole_pattern(cache: SparseActivationCache, layer: int, text: int = 0) -> SparsePattern:
    """The pattern of one text, `[head_index, query_pos, key_pos]`.

    Raises:
        KeyError, IndexError: It isn't there.
        ValueError: Its queries are not the whole text (`pos_slice`, or a KV cache).
    """
    if layer not in cache.patterns:
        raise KeyError(f"layer was {layer}; expected one whose pattern is in the cache: {sorted(cache.patterns)}.")
    pattern: Any = cache.patterns[layer]
    if pattern.ndim == 3 and text != 0:
        raise IndexError(f"text was {text}; the cache holds one text, without a batch dimension.")
    pattern = pattern[text] if pattern.ndim == 4 else pattern
    if pattern.shape[-1] != pattern.shape[-2]:
        rows, keys = pattern.shape[-2:]
        raise ValueError(f"cache had patterns of {rows} rows and {keys} keys; expected those of a whole text.")
    return pattern


def _entries(
    pattern: SparsePattern, head: int, segments: Segments
) -> Iterator[tuple[Int[Tensor, "row key"], Int[Tensor, "row key"], Float[Tensor, "row key"]]]:
    """The sentences of query and key of every kept entry of one head, and its value; `len(segments)`: of no sentence."""
    owner = torch.cat([segments.owners(pattern.device), torch.tensor([len(segments)], device=pattern.device)])
    one: Any = pattern[head]
    for rows, keys, values in _rows(one):
        key = owner[keys].expand(values.shape)
        yield owner[rows][:, None].expand(key.shape), key, values.double()


def _rows(pattern: SparsePattern) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query positions `[row]`, key positions `[row or 1, key]` (the number of keys for none) and values `[row, key]`."""
    first = 0
    for part in parts_of(pattern):
        for rows, keys, values in _rows_of_part(part):
            yield rows + first, keys, values
        first += part.shape[-2]


def _rows_of_part(pattern: BlockSparseTensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    n_rows, n_keys = pattern.shape
    every = torch.arange(n_rows, device=pattern.device)
    if pattern.block_layout.is_full and pattern._data.is_lazy:
        full = SoftmaxRows.of(pattern)
        for rows in full.runs(every):
            yield rows, torch.arange(n_keys, device=pattern.device)[None], full.softmax(full.scores(rows), rows)[0, 0]
        return
    values = pattern.row_values()
    keys, real = row_keys(pattern)
    keys = keys.masked_fill(~real, n_keys)
    step = max(1, _ENTRIES_AT_ONCE // max(1, values.shape[-1]))
    yield from zip(every.split(step), keys.split(step), values.split(step), strict=True)

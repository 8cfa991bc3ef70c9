"""From a predicate that says which (query, key) pairs may attend to an `AttentionMask`, in O(T log T) time and O(T) memory.

Hugging Face describes masks by functions `allows(batch, head, query_pos, key_pos) -> bool` that broadcast over index
tensors. For each query the keys that such a function allows around the query itself are found by bisection; that they
are all there is, is then checked on sampled pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_stream.masking import AttentionMask

Allows = Callable[[Int[Tensor, " query_pos"], Int[Tensor, " query_pos"]], Bool[Tensor, "*batch query_pos"]]
"""`allows(query_pos, key_pos)`: both `[query_pos]` counted from 0; gives a bool for each text and query, or for each query."""

_SAMPLES = 16


def mask_from_predicate(
    allows: Allows, query_length: int, key_length: int, own: int, device: torch.device | str | None = None
) -> AttentionMask:
    """The interval of keys that `allows` gives to each query.

    Args:
        allows: The predicate.
        query_length: Number of queries.
        key_length: Number of keys.
        own: Position of the first query among the keys; that of query i is `own + i`.
        device: Where the index tensors live.

    Raises:
        NotImplementedError: The predicate is not one interval around each query's own position, looks ahead, or differs
            between the texts of the batch.
    """
    rows = torch.arange(query_length, device=device)
    diagonal = rows + own

    def every_text(keys: Tensor) -> Tensor:
        allowed = allows(rows, keys)
        flat = allowed.expand(torch.broadcast_shapes(allowed.shape, rows.shape)).reshape(-1, query_length)
        if not bool((flat == flat[0]).all()):
            raise NotImplementedError(
                "The attention mask differs between the texts of the batch by more than padding (packed texts, or chunks of "
                "attention that begin at different positions because of padding on the left); run them one by one."
            )
        return flat[0]

    start = _first_allowed(every_text, diagonal)
    mask = AttentionMask(start.int(), (diagonal + 1).int(), key_length)
    _check(every_text, mask, diagonal)
    return AttentionMask(None, mask.stop, key_length) if not bool(start.any()) else mask


def _first_allowed(allowed: Callable[[Tensor], Tensor], diagonal: Tensor) -> Tensor:
    """Bisection: the lowest key from which on every key up to the diagonal is allowed."""
    low, high = torch.zeros_like(diagonal), diagonal.clone()
    for _ in range(int(diagonal.max()).bit_length() + 1 if len(diagonal) else 0):
        middle = (low + high) // 2
        here = allowed(middle)
        high = torch.where(here, middle, high)
        low = torch.where(here, low, (middle + 1).clamp(max=diagonal))
    return high


def _check(allowed: Callable[[Tensor], Tensor], mask: AttentionMask, diagonal: Tensor) -> None:
    """Compare the mask with the predicate at each query's own key, at the ends of its interval, and at sampled keys."""
    generator = torch.Generator().manual_seed(0)
    assert mask.start is not None
    rows = torch.arange(mask.query_length, device=mask.device)
    sampled = torch.rand(_SAMPLES, mask.query_length, generator=generator).to(mask.device) * mask.key_length
    ends = [diagonal, diagonal + 1, mask.start, mask.start - 1, torch.zeros_like(diagonal)]
    for keys in [*ends, *sampled.long()]:
        keys = keys.long().clamp(0, mask.key_length - 1)
        expected = mask.allows(torch.zeros_like(rows), rows, keys)
        if not bool((allowed(keys) == expected).all()):
            raise NotImplementedError(
                "The model's attention mask is not, for each query, one range of keys that ends with the query's own; "
                "tl_stream traces causal, sliding-window, chunked and padded attention."
            )

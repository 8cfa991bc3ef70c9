"""From a query_pos x key_pos mask that a model makes itself to an `AttentionMask`: every entry is read, in chunks of rows.

The model holds that T x T tensor anyway; reading it takes O(T^2) time in each layer that applies it, and O(T) memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_stream.masking import AttentionMask

HIDDEN = -1e4
"""A score of this, or this added to one, weighs nothing beside any other: exp of it is 0."""
_ENTRIES_AT_ONCE = 2**20


def mask_of(dense: Tensor, visible: Callable[[Tensor], Tensor]) -> AttentionMask:
    """The mask that a dense tensor stands for.

    Args:
        dense: Broadcasts to `[batch, head_index, query_pos, key_pos]`.
        visible: Where an entry of (some rows of) it lets a query read a key.

    Raises:
        NotImplementedError: It is not, for each query, one range of keys, less padding, in all heads alike.
    """
    dense = dense[(None,) * (4 - dense.dim())]
    n_queries, n_keys = dense.shape[-2:]
    own = torch.arange(n_keys - n_queries + 1, n_keys + 1, device=dense.device)  # where an empty range is put
    first, last, read = [], [], torch.zeros(len(dense), n_keys, dtype=torch.bool, device=dense.device)
    for rows, shown in _chunks(dense, visible):
        read |= shown.any(1)
        seen = shown.any(0)
        first.append(torch.where(seen.any(-1), seen.int().argmax(-1), own[rows]))
        last.append(torch.where(seen.any(-1), n_keys - seen.flip(-1).int().argmax(-1), own[rows]))
    start, stop = torch.cat(first).int(), torch.cat(last).int()
    for valid in (None, read):
        mask = AttentionMask(start if bool(start.any()) else None, stop, n_keys, valid)
        if all(torch.equal(shown, _part(mask, rows, len(dense))) for rows, shown in _chunks(dense, visible)):
            return mask
    raise NotImplementedError(
        f"The model's attention mask, a dense tensor of shape {tuple(dense.shape)}, is not, for each query, one range of keys; "
        "tl_stream traces causal, sliding-window, chunked and padded attention. Knock other entries out in hook_attn_scores."
    )


def _chunks(
    dense: Tensor, visible: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Int[Tensor, " row"], Bool[Tensor, "batch row key_pos"]]]:
    """Some rows and what they see, in all heads alike."""
    at_once = max(1, _ENTRIES_AT_ONCE // dense[:, :, 0].numel())
    for rows in torch.arange(dense.shape[2], device=dense.device).split(at_once):
        shown = visible(dense[:, :, rows[0] : rows[-1] + 1])
        if not bool((shown == shown[:, :1]).all()):
            raise NotImplementedError("The model's attention mask, a dense tensor, differs between heads; it can't be traced.")
        yield rows, shown[:, 0]


def _part(mask: AttentionMask, rows: Int[Tensor, " row"], batch: int) -> Bool[Tensor, "batch row key_pos"]:
    texts, keys = torch.arange(batch, device=rows.device), torch.arange(mask.key_length, device=rows.device)
    return mask.allows(texts[:, None, None], rows[:, None], keys).expand(batch, -1, -1)

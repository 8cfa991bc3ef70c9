"""A pyramid of key statistics: per block of keys, then per pair of blocks, and so on up (Stream, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


class Level(NamedTuple):
    """One level: node i of level l covers the key blocks `i * 2^l <= block < (i + 1) * 2^l`.

    Attributes:
        mean: Mean of the valid keys of each node, `[batch, kv_head_index, node, d_head]`; 0 where a node has none.
        bounds: The elementwise greatest of them, then the elementwise least, `[batch, kv_head_index, node, 2 * d_head]`.
        n_keys: Number of valid keys, `[batch, node]`.
    """

    mean: Float[Tensor, "batch kv_head_index node d_head"]
    bounds: Float[Tensor, "batch kv_head_index node two_d_head"]
    n_keys: Int[Tensor, "batch node"]


def to_blocks(x: Float[Tensor, "batch heads pos d_head"], block: int) -> Float[Tensor, "batch heads n block d_head"]:
    """Cut positions into blocks, the last one padded with zeros. Contiguous: what is cut out of it later is no copy of all."""
    return pad(x, (0, 0, 0, -x.shape[2] % block)).contiguous().unflatten(2, (-1, block))


def build_pyramid(
    keys: Float[Tensor, "batch kv_head_index block block_k d_head"], valid: Bool[Tensor, "batch block block_k"]
) -> list[Level]:
    """Levels from single key blocks (index 0) to one root. O(T d_head) time, 2 T / block_k nodes.

    Args:
        keys: Keys after the rotary embedding, in blocks, in float32 or better.
        valid: False for padding.
    """
    inside = valid[:, None, :, :, None]
    count = valid.sum(-1)
    total = (keys * inside).sum(3)
    low = keys.masked_fill(~inside, torch.inf).amin(3)
    high = keys.masked_fill(~inside, -torch.inf).amax(3)
    n_leaves = 1 << (keys.shape[2] - 1).bit_length()
    missing = n_leaves - keys.shape[2]
    total, count = pad(total, (0, 0, 0, missing)), pad(count, (0, missing))
    low, high = pad(low, (0, 0, 0, missing), value=torch.inf), pad(high, (0, 0, 0, missing), value=-torch.inf)
    levels = []
    while True:
        empty = (count == 0)[:, None, :, None]
        mean = total / count.clamp(min=1)[:, None, :, None]
        levels.append(Level(mean, torch.cat([high, low], -1).masked_fill(empty, 0), count))
        if total.shape[2] == 1:
            return levels
        total, count = total.unflatten(2, (-1, 2)).sum(3), count.unflatten(1, (-1, 2)).sum(2)
        low, high = low.unflatten(2, (-1, 2)).amin(3), high.unflatten(2, (-1, 2)).amax(3)


def build_prefixes(
    keys: Float[Tensor, "batch kv_head_index block block_k d_head"], valid: Bool[Tensor, "batch block block_k"]
) -> Level:
    """What is known of a key block by those of its keys that come no later than position i, as node i. O(T d_head) time.

    Args:
        keys, valid: As `build_pyramid` takes them.
    """
    inside = valid[:, None, :, :, None]
    count = valid.cumsum(-1).flatten(1)
    empty = (count == 0)[:, None, :, None]
    total = (keys * inside).cumsum(3).flatten(2, 3)
    high = keys.masked_fill(~inside, -torch.inf).cummax(3).values.flatten(2, 3)
    low = keys.masked_fill(~inside, torch.inf).cummin(3).values.flatten(2, 3)
    mean = total / count.clamp(min=1)[:, None, :, None]
    return Level(mean, torch.cat([high, low], -1).masked_fill(empty, 0), count)

"""Writes to entries that were not recorded (`forward="exact"`): the model reads those too, so the record has to grow."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.layout import BlockLayout
from tl_stream.tensors.data import BlockData


def record(
    data: BlockData,
    batch: Bool[Tensor, " batch"],
    head: Bool[Tensor, " head_index"],
    rows: Bool[Tensor, " query_pos"],
    keys: Bool[Tensor, " key_pos"],
) -> None:
    """Keep the blocks that hold any entry of a product of choices that the mask allows, with what the model has there.

    Raises:
        ValueError: More values than are ever made, or of a tensor that can't be recomputed from q and k.
    """
    layout = data.layout
    q_blocks, kv_blocks = _readable(layout, _blocks(rows, layout.block_q), _blocks(keys, layout.block_k))
    place = torch.arange(len(q_blocks), device=layout.device)
    text, number, place = torch.meshgrid(batch.nonzero()[:, 0], head.nonzero()[:, 0], place, indexing="ij")
    found = [x.flatten() for x in (text, number, q_blocks[place], kv_blocks[place])]
    _, kept = layout.find(*found)
    if not bool(kept.all()):
        data.extend(layout.with_blocks(*(x[~kept] for x in found)))


def not_recorded(data: BlockData, number: int) -> ValueError:
    """The error for values whose place was not recorded."""
    return ValueError(
        f"{number:,} of the entries written to were not recorded in layer {data.origin.layer}; with forward='exact' the model "
        f"reads them, but what is read from here shows them as {data.fill}. Write a single number, or record them: raise k, "
        "take layout_from=cache, or put the layer into dense_layers."
    )


def _blocks(members: Bool[Tensor, " pos"], size: int) -> Int[Tensor, " block"]:
    """The blocks that hold any member."""
    return pad(members, (0, -len(members) % size)).view(-1, size).any(-1).nonzero()[:, 0]


def _readable(layout: BlockLayout, q_blocks: Tensor, kv_blocks: Tensor) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """The pairs of some query and key blocks that hold a pair of tokens that may attend, padding aside."""
    start, stop = layout.mask.bounds(layout.query_positions()[q_blocks])
    first = kv_blocks * layout.block_k
    readable = first < stop.amax(-1)[:, None]
    if start is not None:
        readable = readable & (first + layout.block_k > start.amin(-1)[:, None])
    row, column = readable.nonzero().unbind(-1)
    return q_blocks[row], kv_blocks[column]

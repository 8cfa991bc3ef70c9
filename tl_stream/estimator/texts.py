"""Texts that are padded: each chooses its blocks by itself, as if it stood alone, so that padding weighs in nothing.

Padding is cut off in whole blocks, on both sides. What is left of it, within the first block or between two tokens, asks
nothing (`Problem.real`) and is no key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.estimator.problem import Problem
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import OfPart, ScoreMod


class Part(NamedTuple):
    """A text without its padding, or a whole batch that has none.

    Attributes:
        problem: Its queries and keys.
        text: Which text it is.
        q_block: Its first query block.
        kv_block: Its first key block.
    """

    problem: Problem
    text: int = 0
    q_block: int = 0
    kv_block: int = 0


def cut_padding(
    q: Tensor, k: Tensor, mask: AttentionMask, block_q: int, block_k: int, scale: float, mods: Sequence[ScoreMod]
) -> Iterator[Part]:
    """One problem for all texts where none is padded; else one for each text that has tokens among the queries.

    Args:
        q, k, mask, block_q, block_k, scale, mods: As `Problem.of` takes them.
    """
    tokens, queries = mask.tokens, mask.queries()
    if tokens is None or queries is None:
        yield Part(Problem.of(q, k, mask, block_q, block_k, scale, mods))
        return
    for text in range(q.shape[0]):
        asking = queries[text].nonzero().flatten().tolist()
        if not asking:
            continue
        rows = range(asking[0] // block_q * block_q, asking[-1] + 1)
        first_key = int(tokens[text].int().argmax())
        keys = range(first_key // block_k * block_k, int(mask.own[asking[-1]]) + 1)
        index = torch.tensor([text], device=q.device)
        alone = mask.of_texts(index).part(rows, keys)
        if alone.tokens is not None and bool(alone.tokens.all()):
            alone = AttentionMask(alone.start, alone.stop, alone.key_length)
        of_part = tuple(OfPart(mod, text, rows.start, keys.start) for mod in mods)
        q_part, k_part = (x[text : text + 1, :, part.start : part.stop] for x, part in ((q, rows), (k, keys)))
        problem = Problem.of(q_part, k_part, alone, block_q, block_k, scale, of_part)
        yield Part(problem, text, rows.start // block_q, keys.start // block_k)


def put_back(
    parts: list[tuple[Part, Int[Tensor, "_ _ _ _"], Int[Tensor, "_ _ _"]]], full: BlockLayout
) -> tuple[Int[Tensor, "batch head_index q_block slot"], Int[Tensor, "batch head_index q_block"]]:
    """The kept blocks of all texts, of `full`'s size; blocks of padding keep their own key blocks."""
    rows = full.query_positions().clamp(max=full.mask.query_length - 1)
    own = full.mask.own[rows] // full.block_k
    first, last = own[:, 0], own[:, -1]
    most = int((last - first).max()) + 1
    width = max([most, *(indices.shape[-1] for _, indices, _ in parts)])
    shape = (full.batch, full.n_heads, full.n_q_blocks)
    blocks = first[:, None] + torch.arange(width, device=own.device)
    number = (last - first + 1).int().expand(shape).clone()
    all_blocks = blocks.where(blocks <= last[:, None], 0).int().expand(*shape, width).clone()
    for part, indices, count in parts:
        placed = slice(part.q_block, part.q_block + indices.shape[2])
        slots = torch.arange(indices.shape[-1], device=own.device) < count[..., None]
        all_blocks[part.text, :, placed] = 0
        all_blocks[part.text, :, placed, : indices.shape[-1]] = (indices + part.kv_block).where(slots, 0)[0]
        number[part.text, :, placed] = count[0]
    return all_blocks, number

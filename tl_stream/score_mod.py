"""What a model does to q . k before the softmax, as functions of a score and its indices (FlexAttention's score_mod)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

# (score, batch, head, query_pos, key_pos) -> score; the index tensors broadcast to the shape of the scores.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scale:
    """`score * factor`."""

    factor: float

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return score * self.factor


@dataclass(frozen=True, eq=False)
class Tanh:
    """`tanh(score)`; soft-capping (Gemma 2) is this between two scales."""

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return score.tanh()


@dataclass(frozen=True, eq=False)
class Alibi:
    """`score + slope[head] * min(key_pos - (query_pos + offset), 0)` (ALiBi, arXiv:2108.12409).

    Args:
        slopes: One slope a head, `[head_index]`.
        offset: Absolute position of the first query.
    """

    slopes: Float[Tensor, " head_index"]
    offset: int

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        distance = (key_pos - query_pos - self.offset).clamp(max=0)
        return score + self.slopes[head].to(score) * distance


@dataclass(frozen=True, eq=False)
class Bias:
    """`score + bias`, for a bias that does not vary over both query and key.

    Args:
        bias: `[batch or 1, head_index or 1, query_pos or 1, key_pos or 1]`, with at least one of the last two of size 1.
    """

    bias: Float[Tensor, "_ _ _ _"]

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        indices = (batch, head, query_pos, key_pos)
        # Indices past the end belong to the padding of the last block, which the mask drops; queries of earlier runs, of which
        # no bias is known, are negative: a bias that varies over queries is the same for all keys, and changes no share.
        inside = [index.clamp(0, size - 1) for index, size in zip(indices, self.bias.shape, strict=True)]
        return score + self.bias[tuple(inside)].to(score)


def apply(mods: Sequence[ScoreMod], score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
    """All of `mods` in turn."""
    for mod in mods:
        score = mod(score, batch, head, query_pos, key_pos)
    return score


@dataclass(frozen=True, eq=False)
class OnSubset:
    """Another mod, for scores of some batch elements and heads only.

    Args:
        mod: The mod, which knows all batch elements and heads.
        texts: The batch elements that are left, `[batch]`.
        heads: The heads that are left, `[head_index]`.
    """

    mod: ScoreMod
    texts: Int[Tensor, " batch"]
    heads: Int[Tensor, " head_index"]

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.mod(score, self.texts[batch], self.heads[head], query_pos, key_pos)


@dataclass(frozen=True, eq=False)
class FromRow:
    """Another mod, for scores of which only the queries from `first` on are left.

    Args:
        mod: The mod, which knows all queries.
        first: Position that the first query left had.
    """

    mod: ScoreMod
    first: int

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.mod(score, batch, head, query_pos + self.first, key_pos)


@dataclass(frozen=True, eq=False)
class AtRows:
    """Another mod, for scores of some queries only.

    Args:
        mod: The mod, which knows all queries.
        rows: Position that each query had, `[query_pos]`; negative: in a run before.
    """

    mod: ScoreMod
    rows: Int[Tensor, " query_pos"]

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.mod(score, batch, head, self.rows[query_pos], key_pos)


@dataclass(frozen=True, eq=False)
class OfPart:
    """Another mod, for scores of one text, of which only the queries and keys from some positions on are left.

    Args:
        mod: The mod, which knows all texts, queries and keys.
        text: The text.
        first_query: Position that the first query left had.
        first_key: Likewise, of the first key.
    """

    mod: ScoreMod
    text: int
    first_query: int
    first_key: int

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return self.mod(score, batch + self.text, head, query_pos + self.first_query, key_pos + self.first_key)


@dataclass(frozen=True, eq=False)
class RowAffine:
    """`score * factor + shift`, constant along the keys.

    Args:
        factor: A number, or `[batch, head_index, query_pos, 1]`.
        shift: Likewise.
    """

    factor: float | Float[Tensor, "batch head_index query_pos 1"]
    shift: float | Float[Tensor, "batch head_index query_pos 1"]

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        def at(x: float | Tensor) -> float | Tensor:
            if not isinstance(x, Tensor):
                return x
            # Indices past the end belong to the padding of the last block, which the mask drops.
            return x[batch, head, query_pos.clamp(max=x.shape[2] - 1), 0].to(score)

        return score * at(self.factor) + at(self.shift)

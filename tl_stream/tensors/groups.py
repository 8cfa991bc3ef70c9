"""`Groups`: which group each position of an axis belongs to, for sums over groups of query rows x groups of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

How = Literal["sum", "amax", "amin"]


@dataclass(frozen=True, eq=False)
class Groups:
    """See the module.

    Attributes:
        owner: The group of each position; `n` for positions of none.
        n: Number of groups.
    """

    owner: Int[Tensor, " pos"]
    n: int

    @classmethod
    def single(cls, n: int, device: torch.device) -> Groups:
        """Each position for itself."""
        return cls(torch.arange(n, device=device), n)

    @classmethod
    def of_spans(cls, segments: Any, n_positions: int, device: torch.device) -> Groups:
        """A group a segment: sentences with a `span`, spans, slices, ranges or pairs (start, stop), in order.

        Raises:
            TypeError: Something else among them.
            ValueError: None at all, an empty one, one outside the positions, or two that overlap or are out of order.
        """
        bounds = [_bounds(each) for each in getattr(segments, "spans", segments)]
        if not bounds:
            raise ValueError("segments were none; expected at least one stretch of tokens.")
        owner, before = torch.full((n_positions,), len(bounds), device=device), 0
        for i, (start, stop) in enumerate(bounds):
            if not before <= start < stop <= n_positions:
                raise ValueError(
                    f"segments[{i}] was {start}:{stop}, behind one that ends at {before}; expected ascending stretches of the "
                    f"{n_positions} tokens, none empty, none overlapping."
                )
            owner[start:stop], before = i, stop
        return cls(owner, len(bounds))

    @property
    def counts(self) -> Int[Tensor, " group"]:
        """Positions in each group."""
        return torch.bincount(self.owner, minlength=self.n + 1)[: self.n]

    def part(self, positions: range) -> Groups:
        """The groups of some of the positions."""
        return Groups(self.owner[positions.start : positions.stop], self.n)


def _bounds(segment: Any) -> tuple[int, int]:
    span = getattr(segment, "span", segment)
    bounds = span if isinstance(span, tuple) else (getattr(span, "start", None), getattr(span, "stop", None))
    if len(bounds) != 2 or not all(isinstance(x, int) for x in bounds) or getattr(span, "step", None) not in (None, 1):
        raise TypeError(f"segments held {segment!r}; expected sentences with a span, spans, slices, or pairs (start, stop).")
    return bounds[0], bounds[1]

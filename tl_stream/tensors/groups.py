"""`Groups`: which group each position of an axis belongs to, for sums over groups of query rows x groups of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    @property
    def counts(self) -> Int[Tensor, " group"]:
        """Positions in each group."""
        return torch.bincount(self.owner, minlength=self.n + 1)[: self.n]

    def part(self, positions: range) -> Groups:
        """The groups of some of the positions."""
        return Groups(self.owner[positions.start : positions.stop], self.n)

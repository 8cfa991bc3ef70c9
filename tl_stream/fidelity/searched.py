"""What `find_budget` searches over: budgets of one kind, numbered so that larger ones keep more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tl_stream.budget import TopP
from tl_stream.config import StreamConfig, check_shares
from tl_stream.fidelity.distribute import HeadShares

Choose = Callable[[int], StreamConfig]
OVER = ("k", "total", "top_p")


@dataclass(frozen=True, eq=False)
class Searched:
    """The budgets from `low` to `high`.

    Attributes:
        name: What they are numbers of.
        low: The smallest.
        high: The largest.
        config: The config for one of them.
        bounded: Whether there is nothing beyond `high`.
        shares: What has to be measured in a dense run before `config` is asked.
    """

    name: str
    low: int
    high: int
    config: Choose
    bounded: bool = False
    shares: HeadShares | None = None

    @classmethod
    def of(cls, over: Any, model: Any, config: StreamConfig, n_blocks: int) -> Searched:
        """All budgets of a kind, for a text of so many key blocks. See `find_budget`.

        Raises:
            TypeError: Neither a name nor a function.
            ValueError: An unknown name, or a `config` that leaves no total to distribute or no shares to reckon.
        """
        match over:
            case "k":
                return cls("k", 1, n_blocks, lambda k: replace(config, k=k))
            case "total":
                shares = HeadShares(model, config, n_blocks)
                low, high = shares.n_heads, n_blocks * shares.n_heads
                return cls("total", low, high, lambda total: replace(config, k=shares.budget(total)), True, shares)
            case "top_p":
                check_shares(config, "to search over")
                return cls("top_p", 1, 100, lambda p: replace(config, k=TopP(p / 100, at_most=n_blocks)), bounded=True)
            case str():
                raise ValueError(f"over was {over!r}; expected one of {', '.join(map(repr, OVER))}, or a function.")
        if not callable(over):
            raise TypeError(f"over was {over!r}; expected one of {', '.join(map(repr, OVER))}, or a function of an int.")
        return cls("budget", 1, n_blocks, over)

    def within(self, low: int | None, high: int | None) -> Searched:
        """From `low` to `high`, where these are given.

        Raises:
            ValueError: No budget lies there, or there are no such budgets.
        """
        low, high = self.low if low is None else low, self.high if high is None else high
        if not self.low <= low <= high or (self.bounded and high > self.high):
            limit = f" <= {self.high}" if self.bounded else ""
            raise ValueError(
                f"low was {low} and high {high}; expected {self.low} <= low <= high{limit}, a range with a budget in it."
            )
        return replace(self, low=low, high=high)

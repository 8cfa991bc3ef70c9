"""How many key blocks a query block may keep: by its absolute position, never by the length of the text.

A query block that can read n key blocks (all before it, or those of its window) keeps `budget.blocks(n)` of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Budget:
    """A rule for the number of key blocks; the classes below are the ones there are."""

    @property
    def share(self) -> float | None:
        """Estimated share of attention at which a row has enough blocks; None: it takes as many as it may."""
        return None

    @property
    def needs_shares(self) -> bool:
        """Whether the estimator must reckon shares of attention."""
        return self.share is not None

    def blocks(self, readable: int) -> int:
        """Most key blocks kept by a query block that can read so many."""
        raise NotImplementedError

    def of_head(self, layer: int, head: int) -> Budget:
        """The budget of one head."""
        return self

    def doubled(self) -> Budget:
        """The same rule with twice as many blocks; of a share of attention, with half as much left out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Budget):
    """`k` blocks everywhere, as in the paper: O(T log T). Late rows, which have more to choose from, lose more."""

    k: int

    def __post_init__(self) -> None:
        _check_count("k", self.k)

    def blocks(self, readable: int) -> int:
        return min(self.k, readable)

    def doubled(self) -> Constant:
        return Constant(2 * self.k)


@dataclass(frozen=True)
class Sqrt(Budget):
    """`scale * sqrt(n)` blocks of n, rounded up."""

    scale: float

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, None)

    def blocks(self, readable: int) -> int:
        return min(math.ceil(self.scale * math.sqrt(readable)), readable)

    def doubled(self) -> Sqrt:
        return Sqrt(2 * self.scale)


@dataclass(frozen=True)
class Linear(Budget):
    """A share of the n blocks, rounded up, but not fewer than `at_least`: O(T^2), with a small factor."""

    fraction: float
    at_least: int = 1

    def __post_init__(self) -> None:
        _check_number("fraction", self.fraction, 1.0)
        _check_count("at_least", self.at_least)

    def blocks(self, readable: int) -> int:
        wanted = math.ceil(self.fraction * readable - 1e-6)  # 0.1 of 30 is 3
        return min(max(wanted, self.at_least), readable)

    def doubled(self) -> Linear:
        return Linear(min(2 * self.fraction, 1.0), 2 * self.at_least)


@dataclass(frozen=True)
class TopP(Budget):
    """As few blocks as hold the share `p` of the row's attention by the estimator's reckoning, at most `at_most`."""

    p: float
    at_most: int = 64

    def __post_init__(self) -> None:
        _check_number("p", self.p, 1.0)
        _check_count("at_most", self.at_most)

    @property
    def share(self) -> float | None:
        return None if self.p == 1.0 else self.p

    def blocks(self, readable: int) -> int:
        return min(self.at_most, readable)

    def doubled(self) -> TopP:
        return TopP((1 + self.p) / 2, 2 * self.at_most)


@dataclass(frozen=True)
class PerHead(Budget):
    """Budgets by layer or by head: `PerHead({0: 32, (2, 1): TopP(0.9)}, otherwise=8)`.

    Args:
        budgets: A budget (or a number of blocks) for each layer index or `(layer, head_index)`; the head's comes first.
        otherwise: That of every other head.
    """

    budgets: Mapping[int | tuple[int, int], Budget | int] = field(hash=False)
    otherwise: Budget | int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.budgets, Mapping):
            raise TypeError(
                f"budgets was a {type(self.budgets).__name__}; expected a dict from layers or (layer, head) to budgets."
            )
        for key, value in self.budgets.items():
            indices = key if isinstance(key, tuple) and len(key) == 2 else (key,)
            if not all(isinstance(i, int) and i >= 0 for i in indices):
                raise ValueError(f"budgets had the key {key!r}; expected a layer index or (layer, head_index).")
            as_budget(value, f"budgets[{key!r}]")
        as_budget(self.otherwise, "otherwise")

    @property
    def needs_shares(self) -> bool:
        return any(as_budget(each).needs_shares for each in (*self.budgets.values(), self.otherwise))

    def of_head(self, layer: int, head: int) -> Budget:
        found = self.budgets.get((layer, head), self.budgets.get(layer, self.otherwise))
        return as_budget(found, "budgets").of_head(layer, head)

    def doubled(self) -> PerHead:
        budgets = {key: as_budget(each).doubled() for key, each in self.budgets.items()}
        return PerHead(budgets, as_budget(self.otherwise).doubled())

    def blocks(self, readable: int) -> int:
        raise TypeError("A PerHead budget has no number of blocks by itself; ask of_head(layer, head) first.")


def as_budget(value: Any, name: str = "k") -> Budget:
    """A number of blocks as a `Constant` budget; a budget as it is.

    Raises:
        TypeError: Neither.
        ValueError: A number below 1.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} was {value!r} of type {type(value).__name__}; expected an int >= 1 or a tl_stream.budget.Budget."
        )
    _check_count(name, value)
    return Constant(value)


def to_json(value: Budget | int) -> Any:
    """A budget as numbers, strings, lists and dicts; `from_json` is its inverse."""
    if isinstance(value, PerHead):
        pairs = [[list(key) if isinstance(key, tuple) else key, to_json(each)] for key, each in value.budgets.items()]
        return {"budget": "PerHead", "budgets": pairs, "otherwise": to_json(value.otherwise)}
    return {"budget": type(value).__name__, **asdict(value)} if isinstance(value, Budget) else value


def from_json(value: Any) -> Budget | int:
    """The budget that `to_json` described."""
    if not isinstance(value, dict):
        return value
    kinds: dict[str, type[Budget]] = {kind.__name__: kind for kind in (Constant, Sqrt, Linear, TopP)}
    if value["budget"] in kinds:
        return kinds[value["budget"]](**{name: each for name, each in value.items() if name != "budget"})
    budgets = {tuple(key) if isinstance(key, list) else key: from_json(each) for key, each in value["budgets"]}
    return PerHead(budgets, from_json(value["otherwise"]))


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} was {value!r} of type {type(value).__name__}; expected an int >= 1.")
    if value < 1:
        raise ValueError(f"{name} was {value}; expected an int >= 1: a budget must keep something.")


def _check_number(name: str, value: Any, most: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} was {value!r} of type {type(value).__name__}; expected a number.")
    if not value > 0 or (most is not None and value > most):
        limit = "above 0" if most is None else f"above 0 and at most {most:g}"
        raise ValueError(f"{name} was {value}; expected a number {limit}: a budget must keep something.")

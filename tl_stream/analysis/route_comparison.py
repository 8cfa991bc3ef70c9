"""Successful retrievals beside failed ones: which heads carry the needle in the one and not in the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas
from rich.table import Table

from tl_stream.analysis.route_result import NeedleRoutes
from tl_stream.audit import records


@dataclass(frozen=True)
class HeadDifference:
    """What one head carries from the needle to the output, mean over the texts.

    Attributes:
        layer: Layer index.
        head: Head index.
        successful: Share of the output's stream, where the retrieval succeeded.
        failed: Where it failed.
        difference: The first less the second.
    """

    layer: int
    head: int
    successful: float
    failed: float
    difference: float


@dataclass(frozen=True)
class RouteComparison:
    """What `compare_routes` found.

    Attributes:
        heads: Each head that carries anything, the greatest difference first.
        n_successful: Number of successful retrievals.
        n_failed: Number of failed ones.
        found_successful: Mean share of the output's stream that comes from the needle, where the retrieval succeeded.
        found_failed: Where it failed.
    """

    heads: tuple[HeadDifference, ...]
    n_successful: int
    n_failed: int
    found_successful: float
    found_failed: float

    def table(self) -> Table:
        """A rich table, one row a head."""
        header = ("layer", "head", "successful", "failed", "difference")
        return records.table(
            "Needle to output", header, [[getattr(x, name) for name in header] for x in self.heads], repr(self)
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head."""
        return records.dataframe(self.heads)

    def __repr__(self) -> str:
        return (
            f"RouteComparison(from the needle: {self.found_successful:.1%} of the output's stream in {self.n_successful} "
            f"successful retrievals, {self.found_failed:.1%} in {self.n_failed} failed ones)"
        )


def compare_routes(successful: Sequence[NeedleRoutes], failed: Sequence[NeedleRoutes]) -> RouteComparison:
    """Compare the routes of successful and failed retrievals, head by head.

    Args:
        successful: `needle_routes` of texts whose answer was right.
        failed: Of texts whose answer was wrong.

    Raises:
        ValueError: None of the one or the other, or runs with different forwards or numbers of layers.
    """
    if not successful or not failed:
        raise ValueError(f"There were {len(successful)} successful and {len(failed)} failed retrievals; expected some of each.")
    if len({(routes.forward, routes.n_layers) for routes in (*successful, *failed)}) > 1:
        raise ValueError("successful and failed came from different forwards or models; expected runs of one model in one way.")
    heads = sorted({head for routes in (*successful, *failed) for head in routes.flow_by_head})
    means = [(*head, _mean(successful, head), _mean(failed, head)) for head in heads]
    rows = [HeadDifference(layer, head, a, b, a - b) for layer, head, a, b in means]
    return RouteComparison(
        heads=tuple(sorted(rows, key=lambda row: -abs(row.difference))),
        n_successful=len(successful),
        n_failed=len(failed),
        found_successful=sum(routes.found for routes in successful) / len(successful),
        found_failed=sum(routes.found for routes in failed) / len(failed),
    )


def _mean(group: Sequence[NeedleRoutes], head: tuple[int, int]) -> float:
    return sum(routes.flow_by_head.get(head, 0.0) for routes in group) / len(group)

"""What `needle_routes` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas
from rich.table import Table

from tl_stream.analysis.kept import exact_for
from tl_stream.audit import records


class Edge(NamedTuple):
    """One head's attention from a query to a key.

    Attributes:
        layer: Layer index.
        head: Head index.
        query_pos: Position that reads.
        key_pos: Position that is read.
        weight: Share of the reader's residual stream that this brought about.
    """

    layer: int
    head: int
    query_pos: int
    key_pos: int
    weight: float

    @property
    def entry(self) -> tuple[int, int, int, int]:
        """Where it is in the patterns: layer, head, query_pos, key_pos."""
        return self[:4]

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head} {self.key_pos} -> {self.query_pos}"


@dataclass(frozen=True)
class Route:
    """A path through the layers.

    Attributes:
        score: Share of the target's residual stream that it carries: the product of its weights.
        source_pos: Where it begins.
        edges: The attention that it takes, from the first layer on; between them it stays where it is.
    """

    score: float
    source_pos: int
    edges: tuple[Edge, ...]

    def __str__(self) -> str:
        return f"{self.score:.2%} from {self.source_pos}: {', '.join(map(str, self.edges)) or 'stays'}"


@dataclass(frozen=True)
class NeedleRoutes:
    """The routes from a source to a target.

    Attributes:
        routes: Those that carry the most, the first most.
        source: Token positions of the source.
        target_pos: Position of the target.
        found: Share of the target's stream that all found paths from the source carry (those not among `routes` included).
        followed: Share that was followed down to the first layer, wherever to. What isn't in it might come from the source too.
        flow_by_head: What the found paths through each (layer, head) carry together.
        n_layers: Number of layers.
        forward: The forward of the run.
    """

    routes: tuple[Route, ...]
    source: range
    target_pos: int
    found: float
    followed: float
    flow_by_head: dict[tuple[int, int], float]
    n_layers: int
    forward: str

    @property
    def exact_for(self) -> str:
        """The model whose numbers these are, exactly."""
        return exact_for(self.forward)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges of all routes, each once."""
        return tuple(dict.fromkeys(edge for route in self.routes for edge in route.edges))

    def table(self) -> Table:
        """A rich table, one row a route."""
        cells = [(route.score, route.source_pos, ", ".join(map(str, route.edges))) for route in self.routes]
        return records.table(f"Routes to {self.target_pos}", ("score", "from", "edges"), cells, repr(self))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row an edge of a route."""
        rows = [
            {"route": i, "score": route.score, "source_pos": route.source_pos, **edge._asdict()}
            for i, route in enumerate(self.routes)
            for edge in route.edges
        ]
        return pandas.DataFrame(rows, columns=["route", "score", "source_pos", *Edge._fields])

    def plot(self, tokens: Sequence[str] | None = None) -> Any:
        """A plotly figure: positions and layers, a line a route; `tokens` to show on hovering.

        Raises:
            ValueError: No routes to plot.
        """
        from tl_stream.analysis.route_plot import plot

        return plot(self, tokens)

    def __repr__(self) -> str:
        unknown = 1 - self.followed
        return (
            f"NeedleRoutes({len(self.routes)} routes from {self.source.start}-{self.source.stop - 1} to {self.target_pos}: "
            f"{self.found:.2%} of its stream, {unknown:.2%} not followed; exact for {self.exact_for})"
        )

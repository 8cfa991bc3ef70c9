"""What `information_flow` found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx
import pandas

from tl_stream.analysis.kept import exact_for

Node = tuple[str, int, int]  # activation name, layer, position


class FlowEdge(NamedTuple):
    """An edge of the graph.

    Attributes:
        kind: `"attention"` (a head's read), `"past_attention"`, `"mlp"` or `"past_mlp"` (the residual stream).
        layer: Layer index.
        head: Head index, of attention.
        query_pos: Position that it goes to.
        key_pos: Position that it comes from; the same but for attention.
        weight: Share of the residual stream there that it brought about.
        flow: Share of the targets' streams that came along it, on all followed paths together.
    """

    kind: str
    layer: int
    head: int | None
    query_pos: int
    key_pos: int
    weight: float
    flow: float


@dataclass(frozen=True)
class FlowGraph:
    """Where the residual stream of some positions came from.

    Attributes:
        edges: All edges that were followed, from the last layer down.
        targets: The positions that are explained.
        threshold: The least weight of an edge; None where edges were followed by what they carry.
        followed: Share of the targets' streams that the edges carry from the embeddings on, all paths together.
        n_layers: Number of layers. ("resid_pre", n_layers, pos) is what goes into the unembedding.
        later_mlp: Whether MLPs come after attention, so that there is a stream between the two.
        forward: The forward of the run.
    """

    edges: tuple[FlowEdge, ...]
    targets: tuple[int, ...]
    threshold: float | None
    followed: float
    n_layers: int
    later_mlp: bool
    forward: str

    @property
    def exact_for(self) -> str:
        """The model whose numbers these are, exactly."""
        return exact_for(self.forward)

    def nodes(self, edge: FlowEdge) -> tuple[Node, Node]:
        """The residual streams that an edge goes between."""
        before, after = ("resid_pre", edge.layer, edge.key_pos), ("resid_pre", edge.layer + 1, edge.query_pos)
        if not self.later_mlp:
            return before, after
        if edge.kind in ("attention", "past_attention"):
            return before, ("resid_mid", edge.layer, edge.query_pos)
        return ("resid_mid", edge.layer, edge.key_pos), after

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Nodes are `(activation, layer, pos)`; edges have `kind`, `head`, `weight` and `flow`."""
        graph = networkx.MultiDiGraph(exact_for=self.exact_for, threshold=self.threshold, followed=self.followed)
        graph.add_nodes_from(("resid_pre", self.n_layers, target) for target in self.targets)
        for edge in self.edges:
            about = {"kind": edge.kind, "head": edge.head, "weight": edge.weight, "flow": edge.flow}
            graph.add_edge(*self.nodes(edge), key=(edge.kind, edge.head), **about)
        return graph

    def to_dataframe(self) -> pandas.DataFrame:
        """One row an edge."""
        return pandas.DataFrame(self.edges, columns=FlowEdge._fields)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        settings = {"targets": list(self.targets), "threshold": self.threshold, "n_layers": self.n_layers}
        return {
            **settings,
            "followed": self.followed,
            "exact_for": self.exact_for,
            "edges": [edge._asdict() for edge in self.edges],
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        targets = f"position {self.targets[0]}" if len(self.targets) == 1 else f"{len(self.targets)} positions"
        weight = "" if self.threshold is None else f" of weight >= {self.threshold:g}"
        return (
            f"FlowGraph({len(self.edges)} edges{weight} into {targets}: {self.followed:.2%} of the stream, "
            f"{1 - self.followed:.2%} not followed; exact for {self.exact_for})"
        )

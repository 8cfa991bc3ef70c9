"""Routes from a needle to an output: the paths of attention that carry the most, layer by layer, in a sparse pattern.

1. Every edge into a position has the weight of its part of the residual stream there (`attention_flow`); weights into a
   position sum to 1. MLPs move nothing between positions.
2. Walk back from the target, layer by layer. The score of a path is the product of its weights: the share of the target's
   stream that it carries. At each layer the scores of all paths sum to 1, so that at most 1 / least of them reach `least`; a
   path only loses by going on. So all paths that carry at least `least` are found, and no others are followed.
3. Those that end in the source are its routes.

Time: the kept keys of the positions that are reached, times d_model. Memory: O(T), and O(1 / least) a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.attention_flow import AttentionFlow, RowShares
from tl_stream.analysis.checks import checked_layers, checked_model
from tl_stream.analysis.kept import KeptEntries, patterns_of
from tl_stream.analysis.route_result import Edge, NeedleRoutes, Route
from tl_stream.analysis.spans import Span, checked_position, checked_span

STAYED = -1


@torch.no_grad()
def needle_routes(
    cache: Any,
    source_span: Span,
    target_pos: int = -1,
    *,
    model: Any = None,
    text: int = 0,
    top: int = 20,
    least: float = 1e-4,
) -> NeedleRoutes:
    """The paths that carry the most from some tokens to the residual stream at the end of the model at another.

    Args:
        cache: A SparseActivationCache with `tl_stream.analysis.flow_names`.
        source_span: Token positions of the needle.
        target_pos: The position whose output is explained: the one that generates the answer's (next) token. Negative ones
            count from the end.
        model: The model of the run, for W_O; None: `cache.model`.
        text: Index in the batch.
        top: How many routes to give.
        least: The least share of the target's stream that a path must carry to be followed.

    Raises:
        IndexError: The target isn't in the text.
        KeyError: An activation that is needed isn't in the cache.
        TypeError: Not a sparse cache, or not a span.
        ValueError: The source isn't in the text, or doesn't come before the target; no pattern of some layer; a model whose
            parts can't be weighed; `top` or `least` out of range.
    """
    layers = checked_layers(cache, model := checked_model(cache, model))
    length = KeptEntries.of(patterns_of(cache)[0], text).length
    target, source = checked_position("target_pos", target_pos, length), checked_span("source_span", source_span, length)
    if target < source.start:
        raise ValueError(
            f"target_pos was {target}, before the source at {source.start}; a token reads only what came before it."
        )
    if top < 1 or not 0 < least < 1:
        raise ValueError(f"top was {top} and least {least}; expected an int >= 1, and a share between 0 and 1.")
    steps = [Paths.at(target)]
    for layer in reversed(layers):
        steps.append(steps[-1].back(AttentionFlow.of(cache, model, layer, text), least))
    return _collected(steps, source, target, top, cache.config.forward)


@dataclass(frozen=True, eq=False)
class Paths:
    """All followed paths from the target back to one layer.

    Attributes:
        position: Where each has got to.
        score: What it carries.
        parent: Which path of the layer above it goes on from.
        head: The head whose edge it took, or `STAYED`.
        weight: Weight of that edge.
    """

    position: Int[Tensor, " path"]
    score: Float[Tensor, " path"]
    parent: Int[Tensor, " path"]
    head: Int[Tensor, " path"]
    weight: Float[Tensor, " path"]

    @classmethod
    def at(cls, target: int) -> Paths:
        """The path that has gone nowhere."""
        zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
        return cls(zero + target, one, zero, zero + STAYED, one)

    def back(self, flow: AttentionFlow, least: float) -> Paths:
        """All of them one layer further down, less those that carry too little."""
        found = [self._none()]
        for shares in flow.shares(self.position.unique().to(flow.before.device)):
            found += [self._from_row(shares, i, int(row), least) for i, row in enumerate(shares.rows)]
        fields = zip(*((x.position, x.score, x.parent, x.head, x.weight) for x in found), strict=True)
        return Paths(*(torch.cat(parts) for parts in fields))

    def _none(self) -> Paths:
        return Paths(self.position[:0], self.score[:0], self.parent[:0], self.head[:0], self.weight[:0])

    def _from_row(self, shares: RowShares, i: int, row: int, least: float) -> Paths:
        """Those that are at one position, along each of the edges into it."""
        here = (self.position == row).nonzero().flatten()
        score = self.score[here]
        heads, keys = (shares.share[:, i] * float(score.max()) >= least).nonzero().unbind(-1)
        weight = torch.cat([shares.stay[i : i + 1] + shares.mlp[i : i + 1], shares.share[heads, i, keys]]).cpu().double()
        head = torch.cat([torch.tensor([STAYED]), heads.cpu()])
        position = torch.cat([torch.tensor([row]), shares.key_pos[heads, keys].cpu()])
        further = score[:, None] * weight
        path, edge = (further >= least).nonzero().unbind(-1)
        return Paths(position[edge], further[path, edge], here[path], head[edge], weight[edge])


def _collected(steps: list[Paths], source: range, target: int, top: int, forward: str) -> NeedleRoutes:
    """The paths that ended in the source, read forwards."""
    last = steps[-1]
    inside = ((last.position >= source.start) & (last.position < source.stop)).nonzero().flatten()
    ranked = inside[last.score[inside].argsort(descending=True, stable=True)]
    flow = _flow_by_head(steps, ranked)
    return NeedleRoutes(
        routes=tuple(_route(steps, int(path)) for path in ranked[:top]),
        source=source,
        target_pos=target,
        found=float(last.score[inside].sum()),
        followed=float(last.score.sum()),
        flow_by_head=flow,
        n_layers=len(steps) - 1,
        forward=forward,
    )


def _route(steps: list[Paths], path: int) -> Route:
    edges, score, start = [], float(steps[-1].score[path]), int(steps[-1].position[path])
    for layer, step in enumerate(reversed(steps[1:])):
        above = steps[len(steps) - 2 - layer]
        head, parent = int(step.head[path]), int(step.parent[path])
        if head != STAYED:
            key, query = int(step.position[path]), int(above.position[parent])
            edges.append(Edge(layer, head, query, key, float(step.weight[path])))
        path = parent
    return Route(score, start, tuple(edges))


def _flow_by_head(steps: list[Paths], paths: Tensor) -> dict[tuple[int, int], float]:
    """What the paths that go through each head carry together."""
    flow: dict[tuple[int, int], float] = {}
    score = steps[-1].score[paths]
    for layer, step in enumerate(reversed(steps[1:])):
        for head in step.head[paths].unique().tolist():
            if head != STAYED:
                flow[layer, head] = float(score[step.head[paths] == head].sum())
        paths = step.parent[paths]
    return flow

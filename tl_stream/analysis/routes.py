"""Routes from a needle to an output: the paths of attention that carry the most, layer by layer, in a sparse pattern.

1. Every edge into a position has the weight of its part of the residual stream there (`attention_flow`); weights into a
   position sum to 1. MLPs move nothing between positions.
2. Walk back from the target, layer by layer, along as few edges as carry the share `follow` of its stream (`followed`).
3. The score of a path is the product of its weights: the share of the target's stream that it carries. Forwards, along what is
   followed: the share of each position's stream that comes from the source, all paths together, and the most that one carries.
4. Knowing the most that can still come of a path, the best ones are completed first: the routes, the first most.

Time: the kept keys of the positions that are reached, times d_model. Memory: O(T) a layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.analysis.attention_flow import AttentionFlow
from tl_stream.analysis.checks import check_count, checked_layers, checked_model
from tl_stream.analysis.followed import FOLLOW, STAYED, Edges, Rule, attention_edges, check_follow
from tl_stream.analysis.kept import KeptEntries, patterns_of
from tl_stream.analysis.route_result import Edge, NeedleRoutes, Route
from tl_stream.analysis.spans import Span, checked_position, checked_span


@torch.no_grad()
def needle_routes(
    cache: Any,
    source_span: Span,
    target_pos: int = -1,
    *,
    model: Any = None,
    text: int = 0,
    top: int = 20,
    follow: float = FOLLOW,
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
        follow: The share of the target's stream to follow down to the embeddings: the sum of `prod_l w_l` over all paths of
            edges that are followed, with w_l the weight of the edge that a path takes in layer l. Over all paths it is 1.

    Raises:
        IndexError: The target isn't in the text.
        KeyError: An activation that is needed isn't in the cache.
        TypeError: Not a sparse cache, or not a span.
        ValueError: The source isn't in the text, or doesn't come before the target; no pattern of some layer; a model whose
            parts can't be weighed; `top` or `follow` out of range.
    """
    layers = checked_layers(cache, model := checked_model(cache, model))
    length = KeptEntries.of(patterns_of(cache)[0], text).length
    target, source = checked_position("target_pos", target_pos, length), checked_span("source_span", source_span, length)
    if target < source.start:
        raise ValueError(
            f"target_pos was {target}, before the source at {source.start}; a token reads only what came before it."
        )
    check_count("top", top)
    check_follow(follow)
    rule, stream = Rule(len(layers), follow=follow), torch.zeros(length, dtype=torch.float64)
    stream[target] = 1.0
    followed: list[Edges] = []
    for step, layer in enumerate(reversed(layers), 1):
        followed.append(attention_edges(AttentionFlow.of(cache, model, layer, text), stream, rule, step, mlp_apart=False))
        stream = followed[-1].below(length)
    return _collected(followed[::-1], stream, source, target, top, cache.config.forward)


def _collected(
    followed: list[Edges], stream: Float[Tensor, " pos"], source: range, target: int, top: int, forward: str
) -> NeedleRoutes:
    """What comes from the source, along the followed edges of all layers."""
    comes = torch.zeros_like(stream)
    comes[source.start : source.stop] = 1.0
    most, by_head = [comes], dict[tuple[int, int], float]()
    for layer, edges in enumerate(followed):
        through = edges.flow * comes[edges.key_pos]
        for head in edges.head[through > 0].unique().tolist():
            if head != STAYED:
                by_head[layer, head] = float(through[edges.head == head].sum())
        zero = torch.zeros_like(stream)
        most.append(zero.scatter_reduce(0, edges.query_pos, edges.weight * most[-1][edges.key_pos], "amax"))
        comes = zero.index_add(0, edges.query_pos, edges.weight * comes[edges.key_pos])
    return NeedleRoutes(
        routes=tuple(islice(_routes(followed, most, target), top)),
        source=source,
        target_pos=target,
        found=float(comes[target]),
        followed=float(stream.sum()),
        flow_by_head=by_head,
        n_layers=len(followed),
        forward=forward,
    )


def _routes(followed: list[Edges], most: list[Float[Tensor, " pos"]], target: int) -> Iterator[Route]:
    """Paths from the source, the one that carries the most first.

    Best first: of all paths that go on from the target so far, the one that can still carry the most is taken a layer down.

    Args:
        followed: The edges of each layer.
        most: Before each layer and at the end, the most that one path carries from the source to a position, as a share of its
            stream.
        target: Where they end.
    """
    order = count()
    begun: tuple[Edge, ...] = ()
    open_paths = [(-float(most[-1][target]), next(order), len(followed), target, 1.0, begun)]
    while open_paths:
        bound, _, layer, position, score, path = heapq.heappop(open_paths)
        if bound == 0:
            return
        if layer == 0:
            yield Route(score, position, path)
            continue
        layer -= 1
        edges = followed[layer].into(position)
        bounds = score * edges.weight * most[layer][edges.key_pos]
        columns = (bounds, edges.head, edges.key_pos, edges.weight)
        for can, head, key, weight in zip(*(column.tolist() for column in columns), strict=True):
            taken = path if head == STAYED else (Edge(layer, head, position, key, weight), *path)
            heapq.heappush(open_paths, (-can, next(order), layer, key, score * weight, taken))

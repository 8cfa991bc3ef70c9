"""The information-flow-routes graph of a text, over the kept entries (Ferrando & Voita 2024, arXiv:2403.00824).

1. From the target's residual stream at the end, backwards: the MLP's output and the stream before it are the parts of the
   stream after it; each key's vector from each head, and the stream before them, those of the stream after attention. Each
   part's edge has its importance as weight (`attention_flow`); weights into a node sum to 1.
2. Edges are followed that carry a given share of the target's stream (`followed`), or those of a weight of at least a threshold
   (the paper's section 2.3); and from where they come, on.

Only positions that are reached are computed: O(kept keys x d_model) time each, O(T) memory, a block of queries and a head at
a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.analysis.attention_flow import AttentionFlow, activation, has_later_mlp, importance
from tl_stream.analysis.checks import checked_layers, checked_model
from tl_stream.analysis.flow_graph import FlowEdge, FlowGraph
from tl_stream.analysis.followed import FOLLOW, MLP, STAYED, Edges, Rule, attention_edges, check_follow
from tl_stream.analysis.kept import KeptEntries, patterns_of
from tl_stream.analysis.spans import checked_position

LITTLE = 0.5


@torch.no_grad()
def information_flow(
    cache: Any,
    model: Any = None,
    target_pos: int | None = -1,
    *,
    follow: float | None = None,
    threshold: float | None = None,
    text: int = 0,
) -> FlowGraph:
    """The edges that brought about the residual stream at the end of the model, down to the embeddings.

    Under `forward="exact"` the parts are the recorded entries; weights are normalised over those.

    Args:
        cache: A SparseActivationCache with `tl_stream.analysis.flow_names`.
        model: The model of the run, for W_O; None: `cache.model`.
        target_pos: Position to explain (negative ones count from the end); None: all of them, each as much as the others.
        follow: The share of the target's stream to follow down to the embeddings: the sum of `prod_i w_i` over all paths of
            edges that are followed, with w_i the weight of a path's i-th edge. Over all paths it is 1. The least flow of
            an edge follows from that, step by step (`tl_stream.analysis.followed`). None, and no threshold: 0.9.
        threshold: In place of that, the least weight of an edge, as in the paper: a position has at most 1 / threshold of them.
            What share they carry shrinks with depth; `FlowGraph.followed` says how much it is.
        text: Index in the batch.

    Raises:
        IndexError: The target isn't in the text.
        KeyError: An activation that is needed isn't in the cache.
        TypeError: Not a sparse cache, or no model.
        ValueError: No pattern of some layer; a model whose parts can't be weighed; `follow` or `threshold` out of range, or
            both.
    """
    layers = checked_layers(cache, model := checked_model(cache, model))
    entries = KeptEntries.of(patterns_of(cache)[0], text)
    rule = _rule(follow, threshold, n_steps=len(layers) * (2 if has_later_mlp(model) else 1))
    if target_pos is None:
        targets = entries.real_tokens().nonzero().flatten().tolist()
    else:
        targets = [checked_position("target_pos", target_pos, entries.length)]
    stream = torch.zeros(entries.length, dtype=torch.float64)
    stream[targets] = 1.0 / len(targets)
    edges: list[FlowEdge] = []
    step = 0
    for layer in reversed(layers):
        flow = AttentionFlow.of(cache, model, layer, text)
        if has_later_mlp(model):
            step += 1
            after = activation(cache, "resid_post", layer, text)
            found = rule.chosen(step, iter([_mlp_edges(flow.after, after, stream)]), stream, 2 * entries.length)
            edges += _named(found, layer, "past_mlp")
            stream = found.below(entries.length)
        step += 1
        found = attention_edges(flow, stream, rule, step)
        edges += _named(found, layer, "past_attention")
        stream = found.below(entries.length)
    graph = FlowGraph(
        tuple(edges), tuple(targets), threshold, float(stream.sum()), len(layers), has_later_mlp(model), cache.config.forward
    )
    if rule.follow is None and graph.followed < LITTLE:
        warnings.warn(
            f"{graph}: edges below the threshold carry most of the stream, as they do in deep models. Lower it, or give "
            f"follow={FOLLOW:g} instead.",
            stacklevel=3,
        )
    return graph


def _rule(follow: float | None, threshold: float | None, n_steps: int) -> Rule:
    if follow is not None and threshold is not None:
        raise ValueError(
            f"follow was {follow} and threshold {threshold}; expected one of them, for each follows from the other."
        )
    if threshold is not None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold was {threshold}; expected a weight between 0 and 1.")
        return Rule(n_steps, threshold=threshold)
    follow = FOLLOW if follow is None else follow
    check_follow(follow)
    return Rule(n_steps, follow=follow)


def _mlp_edges(
    before: Float[Tensor, "pos d_model"], after: Float[Tensor, "pos d_model"], stream: Float[Tensor, " pos"]
) -> Edges:
    """The MLP and the stream past it, as parts of what is behind it."""
    rows = stream.nonzero().flatten()
    whole, passed = after[rows.to(after.device)], before[rows.to(after.device)]
    parts = torch.stack([importance(whole, whole - passed), importance(whole, passed)])
    weight = (parts / parts.sum(0)).cpu().double().flatten()
    twice, head = rows.repeat(2), torch.tensor([MLP, STAYED]).repeat_interleave(len(rows))
    return Edges(head, twice, twice, weight, weight * stream[twice])


def _named(edges: Edges, layer: int, stayed: str) -> Iterator[FlowEdge]:
    """As the graph has them."""
    kinds = {STAYED: stayed, MLP: "mlp"}
    columns = (edges.head, edges.query_pos, edges.key_pos, edges.weight, edges.flow)
    for head, query, key, weight, flow in zip(*(column.tolist() for column in columns), strict=True):
        yield FlowEdge(kinds.get(head, "attention"), layer, head if head >= 0 else None, query, key, weight, flow)

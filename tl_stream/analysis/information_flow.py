"""The information-flow-routes graph of a text, over the kept entries (Ferrando & Voita 2024, arXiv:2403.00824).

1. From the target's residual stream at the end, backwards: the MLP's output and the stream before it are the parts of the
   stream after it; each key's vector from each head, and the stream before them, those of the stream after attention. Each
   part's edge has its importance as weight (`attention_flow`); weights into a node sum to 1.
2. Edges below the threshold are dropped, and where the others come from is followed on (the paper's section 2.3).

Only positions that are reached are computed: O(kept keys x d_model) time each, O(T) memory, a block of queries and a head at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.analysis.attention_flow import AttentionFlow, activation, has_later_mlp, importance
from tl_stream.analysis.checks import checked_layers, checked_model
from tl_stream.analysis.flow_graph import FlowEdge, FlowGraph
from tl_stream.analysis.kept import KeptEntries, patterns_of
from tl_stream.analysis.spans import checked_position


@torch.no_grad()
def information_flow(
    cache: Any, model: Any = None, target_pos: int | None = -1, *, threshold: float = 0.01, text: int = 0
) -> FlowGraph:
    """The edges that brought about the residual stream at the end of the model, down to the embeddings.

    Under `forward="exact"` the parts are the recorded entries; weights are normalised over those.

    Args:
        cache: A SparseActivationCache with `tl_stream.analysis.flow_names`.
        model: The model of the run, for W_O; None: `cache.model`.
        target_pos: Position to explain (negative ones count from the end); None: all of them.
        threshold: The least weight of an edge that is kept. A position has at most 1 / threshold of them.
        text: Index in the batch.

    Raises:
        IndexError: The target isn't in the text.
        KeyError: An activation that is needed isn't in the cache.
        TypeError: Not a sparse cache, or no model.
        ValueError: No pattern of some layer; a model whose parts can't be weighed; a threshold out of range.
    """
    layers = checked_layers(cache, model := checked_model(cache, model))
    entries = KeptEntries.of(patterns_of(cache)[0], text)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold was {threshold}; expected a weight between 0 and 1.")
    if target_pos is None:
        reached = entries.real_tokens().nonzero().flatten()
    else:
        reached = torch.tensor([checked_position("target_pos", target_pos, entries.length)], device=entries.device)
    targets, edges = tuple(reached.tolist()), []
    for layer in reversed(layers):
        flow = AttentionFlow.of(cache, model, layer, text)
        if has_later_mlp(model):
            edges += list(_mlp_edges(flow.after, activation(cache, "resid_post", layer, text), reached, layer, threshold))
        edges += (found := list(_attention_edges(flow, reached, layer, threshold)))
        sources = sorted({edge.key_pos for edge in found})
        reached = torch.tensor(sources, dtype=torch.long, device=reached.device)
    return FlowGraph(tuple(edges), targets, threshold, len(layers), has_later_mlp(model), cache.config.forward)


def _mlp_edges(
    before: Tensor, after: Tensor, positions: Int[Tensor, " row"], layer: int, threshold: float
) -> Iterator[FlowEdge]:
    """The MLP and the stream past it, as parts of what is behind it."""
    whole, passed = after[positions], before[positions]
    parts = torch.stack([importance(whole, whole - passed), importance(whole, passed)])
    weights = (parts / parts.sum(0)).tolist()
    for kind, row in zip(("mlp", "past_mlp"), weights, strict=True):
        for position, weight in zip(positions.tolist(), row, strict=True):
            if weight >= threshold:
                yield FlowEdge(kind, layer, None, position, position, weight)


def _attention_edges(flow: AttentionFlow, positions: Int[Tensor, " row"], layer: int, threshold: float) -> Iterator[FlowEdge]:
    """Heads' reads and the stream past attention (and an MLP beside it), as parts of what is behind it."""
    for shares in flow.shares(positions):
        rows = shares.rows.tolist()
        for kind, weights in (("past_attention", shares.stay), ("mlp", shares.mlp)):
            for row, weight in zip(rows, weights.tolist(), strict=True):
                if weight >= threshold:
                    yield FlowEdge(kind, layer, None, row, row, weight)
        heads, at, keys = (shares.share >= threshold).nonzero().unbind(-1)
        columns = (heads, at, shares.key_pos[heads, keys], shares.share[heads, at, keys])
        for head, i, key_pos, weight in zip(*(column.tolist() for column in columns), strict=True):
            yield FlowEdge("attention", layer, head, rows[i], key_pos, weight)

"""Which edges of information flow are followed, going back from some targets, and what share of their streams that is.

1. Flow: the targets' streams are 1 together. Going back a step, the flow of an edge is the flow of the position it goes into
   times its weight (`attention_flow`), and the flow of a position is the sum over the edges that come from it. It is the share
   of the targets' streams that came that way, all paths together; weights into a position sum to 1, so that a step's flows
   sum to what the step above it followed.
2. In step i of n, of the flow that the step above followed, the fewest edges are followed that hold at least the share

       r(i) / r(i - 1),    r(i) = 1 - (1 - follow) i / n:

   those of the largest flow. After i steps at least r(i) of the targets' streams is left, after the last one `follow`.

Paths are never enumerated, as their number grows exponentially with depth: time and memory are those of the kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from tl_stream.analysis.attention_flow import AttentionFlow, RowShares

STAYED, MLP = -1, -2
FOLLOW = 0.9


def check_follow(follow: float) -> None:
    """Raise ValueError where a share isn't above 0, and up to 1."""
    if not 0 < follow <= 1:
        raise ValueError(f"follow was {follow}; expected the share of the stream to follow, above 0 and up to 1.")


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges of one step, on the CPU, by the position that they go into.

    Attributes:
        head: Head index of attention's; `STAYED` of the residual stream past it, `MLP` of an MLP's.
        query_pos: Position that each goes into.
        key_pos: Position that it comes from.
        weight: Share of the stream that it goes into.
        flow: Share of the targets' streams.
    """

    head: Int[Tensor, " edge"]
    query_pos: Int[Tensor, " edge"]
    key_pos: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    flow: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return len(self.head)

    def where(self, chosen: Tensor | slice) -> Edges:
        """Some of them."""
        return Edges(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def joined(parts: list[Edges]) -> Edges:
        """All of them; there must be some parts."""
        every = Edges(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Edges)))
        return every.where(every.query_pos.argsort(stable=True))

    def into(self, position: int) -> Edges:
        """Those into one position."""
        start = int(torch.searchsorted(self.query_pos, position))
        return self.where(slice(start, int(torch.searchsorted(self.query_pos, position, right=True))))

    def below(self, length: int) -> Float[Tensor, " pos"]:
        """The flow of each position that they come from."""
        return torch.zeros(length, dtype=torch.float64).index_add_(0, self.key_pos, self.flow)


@dataclass(frozen=True)
class Rule:
    """Which edges are followed: as many as carry a share, or those of a weight.

    Attributes:
        n_steps: Number of steps.
        follow: The share of the targets' streams to follow; None: by weight.
        threshold: The least weight of an edge; None: by share.
    """

    n_steps: int
    follow: float | None = None
    threshold: float | None = None

    def chosen(self, step: int, parts: Iterator[Edges], stream: Float[Tensor, " pos"], n_edges: int) -> Edges:
        """Those of one step that are followed.

        Args:
            step: Which step it is, from 1 on.
            parts: Its edges, some at a time.
            stream: The flow of the positions they go into.
            n_edges: How many there are, at most.
        """
        if self.follow is None:
            return Edges.joined([part.where(part.weight >= cast(float, self.threshold)) for part in parts])
        before, after = (1 - (1 - self.follow) * i / self.n_steps for i in (step - 1, step))
        loss, large = float(stream.sum()) * (1 - after / before), []
        floor = loss / n_edges
        for part in parts:  # what is below the floor is within the loss, and the first to go: it needn't be held for the choice
            small = part.flow <= floor
            loss -= float(part.flow[small].sum())
            large.append(part.where(~small))
        edges = Edges.joined(large)
        return edges.where(largest(edges.flow, loss))


def largest(flow: Float[Tensor, " edge"], loss: float) -> Bool[Tensor, " edge"]:
    """The fewest that hold all but at most `loss` of their sum."""
    order = flow.argsort(stable=True)
    dropped = order[flow[order].cumsum(0) <= loss]
    return torch.ones_like(flow, dtype=torch.bool).index_fill_(0, dropped, False)


def attention_edges(
    flow: AttentionFlow, stream: Float[Tensor, " pos"], rule: Rule, step: int, *, mlp_apart: bool = True
) -> Edges:
    """The edges of a layer's attention, and of an MLP beside it, that are followed from the positions that have a flow.

    Args:
        flow: The layer's attention.
        stream: The flow of each position after it.
        rule: Which edges are followed.
        step: Which step this is.
        mlp_apart: Whether an MLP beside attention has edges of its own, or is a part of what stayed.
    """
    rows = stream.nonzero().flatten()
    n_edges = len(rows) * (flow.entries.most_entries + 2)
    every = flow.shares(rows.to(flow.before.device))
    parts = (_edges(shares if mlp_apart else shares.with_mlp_stayed(), stream) for shares in every)
    return rule.chosen(step, parts, stream, max(n_edges, 1))


def _edges(shares: RowShares, stream: Float[Tensor, " pos"]) -> Edges:
    """All edges into some positions of one query block."""
    rows, heads = shares.rows, torch.arange(len(shares.key_pos), device=shares.rows.device)
    shape = shares.share.shape
    same = torch.zeros_like(rows)
    head = torch.cat([same + STAYED, same + MLP, heads[:, None, None].expand(shape).flatten()])
    query = torch.cat([rows, rows, rows[:, None].expand(shape).flatten()])
    key = torch.cat([rows, rows, shares.key_pos[:, None].expand(shape).flatten()])
    weight = torch.cat([shares.stay, shares.mlp, shares.share.flatten()])
    present = weight > 0
    head, query, key = (x[present].cpu() for x in (head, query, key))
    weight = weight[present].cpu().double()
    return Edges(head, query, key, weight, stream[query] * weight)

"""Does what an analysis says is a route carry anything? Cut it in the model and see; and cut as much at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_stream.analysis.kept import KeptEntries, KeptRows, patterns_of

Entry = Sequence[Any]  # begins with layer, head, query_pos, key_pos


def cut_edges(edges: Iterable[Entry]) -> list[tuple[Callable[[str], bool], Callable[..., Tensor]]]:
    """Hooks that take single entries out of the patterns: their scores become -inf, and the rest of each row makes up for it.

    For `fwd_hooks=` of `model.run_with_hooks` and `model.hooks`, also within `tl_stream.sparse`; in all texts of a batch.
    Entries that a sparse run doesn't keep are none of its model's, and stay so.

    Args:
        edges: The entries: `(layer, head, query_pos, key_pos)`, or `Edge`s.

    Raises:
        ValueError: An entry of a later key, or negative numbers. While the model runs: one outside its patterns.
    """
    by_layer: dict[int, list[tuple[int, int, int]]] = {}
    for edge in edges:
        layer, head, query, key = (int(x) for x in edge[:4])
        if min(layer, head, key) < 0 or key > query:
            raise ValueError(
                f"edges held (layer, head, query_pos, key_pos) = {(layer, head, query, key)}; expected counts from 0, "
                "and a key no later than the query."
            )
        by_layer.setdefault(layer, []).append((head, query, key))
    return [_hook(layer, torch.tensor(entries)) for layer, entries in by_layer.items()]


def _hook(layer: int, entries: Tensor) -> tuple[Callable[[str], bool], Callable[..., Tensor]]:
    most = entries.amax(0).tolist()

    def cut(scores: Tensor, hook: Any) -> Tensor:
        if any(index >= size for index, size in zip(most, scores.shape[1:], strict=True)):
            raise ValueError(
                f"edges held entries up to (head, query_pos, key_pos) = {tuple(most)} of layer {layer}; its scores are of "
                f"shape {tuple(scores.shape)}. Give all tokens of the text at once, without a KV cache."
            )
        head, query, key = entries.to(scores.device).unbind(-1)
        scores[:, head, query, key] = -torch.inf
        return scores

    return lambda name: name == f"blocks.{layer}.attn.hook_attn_scores", cut


@torch.no_grad()
def random_edges(
    cache: Any, n: int, *, rows: Iterable[Entry] | None = None, text: int = 0, seed: int = 0
) -> list[tuple[int, int, int, int]]:
    """Kept entries drawn without replacement from all patterns of a text, as `(layer, head, query_pos, key_pos)`.

    Args:
        cache: A SparseActivationCache with patterns.
        n: How many.
        rows: Draw from the rows (layer, head, query_pos) of these edges only, and none of the edges themselves; None: from all.
        text: Index in the batch.
        seed: Of the draw.

    Raises:
        ValueError: Fewer kept entries than `n`, or a negative `n`.
    """
    keys: list[Tensor] = []
    entries: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    edges = None if rows is None else [tuple(edge[:4]) for edge in rows]
    for layer, pattern in patterns_of(cache).items():
        for found in _kept(KeptEntries.of(pattern, text), layer, edges):
            entries.append(found)
            keys.append(torch.rand(len(found), generator=generator, dtype=torch.float64))
            entries, keys = _least(entries, keys, max(n, 0))
    drawn = torch.cat(entries) if entries else torch.zeros(0, 4)
    if n < 0 or len(drawn) < n:
        raise ValueError(f"n was {n}; expected 0 to {len(drawn)}, the number of kept entries to draw from.")
    return [tuple(entry) for entry in drawn.tolist()]


def _least(entries: list[Tensor], keys: list[Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """The `n` with the least random keys: a uniform draw from all that have been seen, in memory for `n`."""
    every, key = torch.cat(entries), torch.cat(keys)
    chosen = key.topk(min(n, len(key)), largest=False).indices
    return [every[chosen]], [key[chosen]]


def _kept(entries: KeptEntries, layer: int, edges: list[tuple[Any, ...]] | None) -> Iterable[Tensor]:
    """Kept entries of one layer, `[entry, 4]`."""
    if edges is None:
        yield from (_coordinates(run, run.kept, layer) for run in entries.runs())
        return
    own = [edge for edge in edges if edge[0] == layer]
    wanted = {edge[:3] for edge in own}
    for run in entries.runs(torch.tensor([edge[2] for edge in own], dtype=torch.long, device=entries.device)):
        chosen = torch.zeros_like(run.kept)
        for _, head, query in wanted:
            chosen[head] |= (run.query_pos == query)[..., None] & run.kept[head]
        found = _coordinates(run, chosen, layer)
        taken = torch.tensor([tuple(row) in set(own) for row in found.tolist()], dtype=torch.bool)
        yield found[~taken]


def _coordinates(run: KeptRows, chosen: Tensor, layer: int) -> Tensor:
    head, block, row, key = chosen.nonzero().unbind(-1)
    columns = (torch.full_like(head, layer), head, run.query_pos[block, row], run.key_pos[head, block, key])
    return torch.stack(columns, -1).cpu()

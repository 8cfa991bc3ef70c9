"""What kind of head each head is, from one pass over the kept entries: O(T) time and memory for a constant k.

For each text, layer and head, with A the pattern and t the tokens:

- previous token, duplicate token, induction: the share of all attention on pairs (i, j) with j = i - 1; with t_j = t_i and
  j < i; with t_{j-1} = t_i and j <= i. (`transformer_lens.head_detector`, error measure "mul".)
- sink: mean over the rows of the attention to the first token.
- entropy: mean over the rows of -sum_j A_ij log A_ij, in nats.
- retrieval (Wu et al. 2024, arXiv:2404.15574, section 2): the number of generated tokens t_{i+1} for which the key that row i
  reads most lies in the needle and holds that token, over the number of the needle's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.head_result import HeadScore, HeadScores
from tl_stream.analysis.kept import KeptEntries, KeptRows, patterns_of
from tl_stream.analysis.spans import Span, checked_span, checked_tokens

_SUMS = ("attention", "previous_token", "duplicate_token", "induction", "sink", "entropy")


@torch.no_grad()
def head_scores(
    cache: Any, tokens: Int[Tensor, "*batch pos"], *, needle: Span | None = None, answer: Span | None = None
) -> HeadScores:
    """Score every head of a cached run. Rows and keys that are padding count nothing.

    Under `forward="exact"` the sums run over the recorded entries of the real pattern, which don't sum to 1.

    Args:
        cache: A SparseActivationCache with patterns.
        tokens: The run's token ids.
        needle: Token positions of what is to be retrieved, for `retrieval`; the same in all texts.
        answer: Token positions of the generated answer, which the text goes on to hold, likewise.

    Raises:
        TypeError, ValueError: No patterns; tokens or spans that aren't those of the run; a needle without an answer.
    """
    patterns = patterns_of(cache)
    shape = next(iter(patterns.values())).block_layout.shape
    tokens = checked_tokens(tokens, shape[0], shape[3])
    spans = _checked_spans(needle, answer, shape[3])
    scores = [
        score
        for text in range(shape[0])
        for layer, pattern in patterns.items()
        for score in _layer_scores(KeptEntries.of(pattern, text), tokens[text], spans, text, layer)
    ]
    return HeadScores(tuple(scores), cache.config.forward)


def _checked_spans(needle: Span | None, answer: Span | None, length: int) -> tuple[range, range] | None:
    if needle is None and answer is None:
        return None
    if needle is None or answer is None:
        raise ValueError(f"needle was {needle!r} and answer {answer!r}; expected both, or neither, for retrieval takes both.")
    spans = checked_span("needle", needle, length), checked_span("answer", answer, length)
    if spans[1].start < spans[0].stop:
        raise ValueError(f"answer began at token {spans[1].start}; expected it after the needle, from {spans[0].stop} on.")
    return spans


def _layer_scores(
    entries: KeptEntries, tokens: Tensor, spans: tuple[range, range] | None, text: int, layer: int
) -> list[HeadScore]:
    real = entries.real_tokens()
    first = int(real.int().argmax())
    tokens = tokens.to(real.device)
    sums = torch.zeros(len(_SUMS), entries.n_heads, dtype=torch.float64, device=real.device)
    hits, n_rows = torch.zeros_like(sums[0]), 0
    for rows in entries.runs():
        inside = rows.query_pos < entries.length
        counted = inside & real[rows.query_pos.clamp(max=entries.length - 1)] & rows.kept.any(-1).any(0)
        sums += _sums(rows, counted, tokens, first)
        n_rows += int(counted.sum())
        if spans is not None:
            hits += _copied(rows, tokens, *spans)
    total = sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
    per_row = sums / max(n_rows, 1)
    return [
        HeadScore(
            text=text,
            layer=layer,
            head=head,
            previous_token=float(sums[1, head] / total[head]),
            duplicate_token=float(sums[2, head] / total[head]),
            induction=float(sums[3, head] / total[head]),
            sink=float(per_row[4, head]),
            entropy=float(per_row[5, head]),
            retrieval=None if spans is None else float(hits[head]) / len(spans[0]),
        )
        for head in range(entries.n_heads)
    ]


def _sums(rows: KeptRows, counted: Tensor, tokens: Tensor, first: int) -> Float[Tensor, "score head_index"]:
    """Sums over the counted rows, in the order of `_SUMS`."""
    last = len(tokens) - 1
    query, key = rows.query_pos[:, :, None], rows.key_pos[:, :, None]
    token, at_key, before_key = tokens[query.clamp(max=last)], tokens[key.clamp(max=last)], tokens[(key - 1).clamp(0, last)]
    weight = rows.weight * counted[..., None]
    parts = (
        weight,
        weight * (key == query - 1),
        weight * ((at_key == token) & (key < query)),
        weight * ((before_key == token) & (key > first)),
        weight * (key == first),
        -torch.special.xlogy(weight, weight),
    )
    return torch.stack([part.sum((1, 2, 3), dtype=torch.float64) for part in parts])


def _copied(rows: KeptRows, tokens: Tensor, needle: range, answer: range) -> Float[Tensor, " head_index"]:
    """How many of the answer's tokens each head copies from the needle."""
    query = rows.query_pos
    generates = (query >= answer.start - 1) & (query < answer.stop - 1)
    top = rows.weight.argmax(-1)
    key = rows.key_pos[:, :, None].expand_as(rows.weight).gather(-1, top[..., None])[..., 0]
    reads = rows.weight.gather(-1, top[..., None])[..., 0] > 0
    last = len(tokens) - 1
    same = tokens[key.clamp(max=last)] == tokens[(query + 1).clamp(max=last)]
    return (generates & reads & same & (key >= needle.start) & (key < needle.stop)).sum((1, 2), dtype=torch.float64)

"""The audit of a run whose answer is read a second time: does it still say the same when it reads more?

A sparse answer may be wrong and sure of itself: a few heads of its rows drop what it hangs on, while most rows and heads keep
what they read. What the run lost tells little of that. The direct question does: the same model at twice the budget, whose last
rows are full attention (`StreamConfig.dense_queries`). That is one more sparse run, O(T log T) as the first, and O(64 T)
for its last rows; the dense model isn't asked. How much either part tells: docs/measurements.md.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch

from tl_stream.audit import Audit
from tl_stream.cache import SparseActivationCache, is_pattern
from tl_stream.config import StreamConfig
from tl_stream.hosts import host_of
from tl_stream.hosts.arguments import check_keywords
from tl_stream.tracing import run_with_sparse_cache


@torch.no_grad()
def recheck(
    model: Any,
    text: Any,
    cache: SparseActivationCache,
    rows: int = 1,
    sample: int = 64,
    *,
    dense_queries: int = 64,
    confidence: float = 0.95,
    seed: int = 0,
    **kwargs: Any,
) -> Audit:
    """`cache.audit(rows, sample)`, with what a run at twice the budget, whose last rows read everything, says in these rows.

    Costs that run: in time as much as the first at lengths where the budget's share is small, and at most about twice that.

    Args:
        model: The model of the run.
        text: What the run read: text, or tokens `[batch, pos]`.
        cache: The run's.
        rows: How many of the last rows of each text make the answer, padding left out.
        sample: As for `SparseActivationCache.audit`.
        dense_queries: How many of the last rows read everything in the recheck, or `rows`, if these are more. The chances are
            calibrated for 64.
        confidence: As for `SparseActivationCache.audit`.
        seed: Likewise.
        **kwargs: What else the model was given (`attention_mask`, ...), but no `return_type`.

    Returns:
        The audit; its `answers` have `reread`, and the chance that dense attention says otherwise goes by that.

    Raises:
        ValueError: The run knows no next tokens of these rows, or read everything anyway (`forward="exact"`); a `dense_queries`
            below 0; `text` isn't of the run's batch size and length, or has more padding behind it than there are
            positions whose next tokens the run knows; a `return_type`; or as `SparseActivationCache.audit`.
        TypeError: `rows` isn't an int, a keyword that nobody takes, or a pattern was written to.
    """
    _check_arguments(model, rows, dense_queries, kwargs)
    known = cache.next_tokens
    if known is None or not 1 <= rows <= known.token.shape[1]:
        n = 0 if known is None else known.token.shape[1]
        raise ValueError(
            f"rows was {rows}, but the cache knows the next tokens of the last {n} rows; expected one of these. Run with "
            "logits (logits_to_keep=n keeps those of the last n rows)."
        )
    if cache.config.forward == "exact":
        raise ValueError(
            "cache was of a run with forward='exact', whose answer is the dense model's; there is nothing to recheck."
        )
    config = _with_more(cache.config, max(rows, dense_queries))
    kept = rows + max((pattern.block_layout.mask.padding_behind() for pattern in cache.patterns.values()), default=0)
    name = next(name for name in cache.cache_dict if is_pattern(name))
    logits, again = run_with_sparse_cache(model, text, config=config, logits_to_keep=kept, names_filter=name, **kwargs)
    assert isinstance(again, SparseActivationCache)
    shape, expected = _shape(again), _shape(cache)
    if shape != expected:
        raise ValueError(f"text was of shape {shape}, but the cache is of a run on {expected}; expected what that run read.")
    return cache.audit(rows, sample, reread=known.reread(logits), confidence=confidence, seed=seed)


def _shape(cache: SparseActivationCache) -> tuple[int, int]:
    """Batch size and length of what a run read."""
    layout = next(iter(cache.patterns.values())).block_layout
    return layout.batch, layout.mask.key_length


def _with_more(config: StreamConfig, dense_queries: int) -> StreamConfig:
    """Twice the budget that chose the run's blocks, and so many last rows that read everything."""
    chosen = config
    while chosen.layout_from is not None:
        chosen = chosen.layout_from.config
    rows = max(dense_queries, config.dense_queries)
    return replace(chosen, k=chosen.budget.doubled(), dense_layers=config.dense_layers, dense_queries=rows, forward="sparse")


def _check_arguments(model: Any, rows: Any, dense_queries: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"rows was {rows!r}; expected an int: how many of the last rows make the answer.")
    if isinstance(dense_queries, bool) or not isinstance(dense_queries, int) or dense_queries < 0:
        raise ValueError(f"dense_queries was {dense_queries!r}; expected an int >= 0: how many of the last rows read all.")
    if "return_type" in kwargs:
        raise ValueError(f"return_type was {kwargs['return_type']!r}; a recheck needs logits. Leave it out.")
    own = inspect.signature(recheck).parameters.keys() - {"model", "text", "kwargs"}
    check_keywords(model, host_of(model), kwargs, ("forward",), own)

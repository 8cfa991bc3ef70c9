"""The audit of a run whose answer is read a second time: do its rows still say the same when they read everything?

A sparse answer may be wrong and sure of itself: a few heads of its rows drop what it hangs on, while most rows and heads keep
what they read. What the run lost tells little of that. The direct question does: the same model on the same blocks, with the
answer's rows as full attention (`StreamConfig.dense_queries`). That is one more sparse run, without an estimate of blocks, and
O(rows T) for the answer's rows; the dense model isn't asked. What earlier rows lost is in it as in the first run.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch

from tl_stream.audit import Audit
from tl_stream.cache import SparseActivationCache
from tl_stream.hosts import host_of
from tl_stream.hosts.arguments import check_keywords
from tl_stream.tracing import sparse


@torch.no_grad()
def recheck(
    model: Any,
    text: Any,
    cache: SparseActivationCache,
    rows: int = 1,
    sample: int = 64,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    **kwargs: Any,
) -> Audit:
    """`cache.audit(rows, sample)`, with what the answer's rows say when they read everything. Costs one more sparse run.

    Args:
        model: The model of the run.
        text: What the run read: text, or tokens `[batch, pos]`.
        cache: The run's.
        rows: How many of the last rows of each text make the answer, padding left out.
        sample: As for `SparseActivationCache.audit`.
        confidence: Likewise.
        seed: Likewise.
        **kwargs: What else the model was given (`attention_mask`, ...), but no `return_type`.

    Returns:
        The audit; its `answers` have `reread`, and their verdict goes by it.

    Raises:
        ValueError: The run knows no next tokens of these rows, or read everything anyway (`forward="exact"`), or its patterns
            are those of another length; `text` isn't of the run's batch size, or has more padding behind it than there are
            positions whose next tokens the run knows; a `return_type`; or as `SparseActivationCache.audit`.
        KeyError: A layer's pattern isn't in the cache.
        TypeError: `rows` isn't an int, a keyword that nobody takes, or a pattern was written to.
    """
    _check_arguments(model, rows, kwargs)
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
    dense = max(rows, cache.config.dense_queries)
    kept = rows + max((pattern.block_layout.mask.padding_behind() for pattern in cache.patterns.values()), default=0)
    # With decode="exact" a run of one row would not be asked whether it is of the cache's size.
    config = replace(cache.config, layout_from=cache, dense_queries=dense, decode="sparse")
    with sparse(model, config, logits_to_keep=kept):
        output = model(text, **kwargs)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return cache.audit(rows, sample, reread=known.reread(logits), confidence=confidence, seed=seed)


def _check_arguments(model: Any, rows: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"rows was {rows!r}; expected an int: how many of the last rows make the answer.")
    if "return_type" in kwargs:
        raise ValueError(f"return_type was {kwargs['return_type']!r}; a recheck needs logits. Leave it out.")
    own = inspect.signature(recheck).parameters.keys() - {"model", "text", "kwargs"}
    check_keywords(model, host_of(model), kwargs, ("forward",), own)

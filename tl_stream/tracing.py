"""The context in which a model's attention is sparse, and `run_with_sparse_cache`, a thin wrapper over it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache

from tl_stream.audit import NextTokens
from tl_stream.cache import SparseActivationCache
from tl_stream.config import StreamConfig, as_config
from tl_stream.hosts import host_of, model_classes
from tl_stream.hosts.arguments import check_keywords
from tl_stream.hosts.installation import Trace, opened
from tl_stream.hosts.uninterrupted import Uninterrupted


def sparse(
    model: Any, config: StreamConfig | None = None, *, logits_to_keep: int | None = None
) -> AbstractContextManager[Trace]:
    """Within this context the model's attention is sparse: `run_with_cache`, `run_with_hooks`, `generate`, all of it.

    Every layer keeps the key blocks that Stream estimates (arXiv:2510.19875); `hook_attn_scores` and `hook_pattern` show
    `BlockSparseScores` and `BlockSparsePattern`, all other hook points ordinary tensors.

    Contexts nest: the one opened last counts. They may be left in any order: each ends itself, and when the last one has been
    left the model is as it was found, also after an exception or Ctrl-C. An asyncio task sees the contexts that it opened
    itself, and those in which it was started; where it sees none while another task of its thread has one open, its runs are
    refused. A model is traced by one thread at a time; meanwhile it is dense in other threads.

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        config: What to keep; None: the defaults.
        logits_to_keep: Unembed only the last so many positions; None: all.

    Raises:
        TypeError: The model or the config is of the wrong type.
        ValueError: The model can't be traced, or the config names layers that it doesn't have. Within the context: an input
            that is empty or longer than n_ctx, NaN in q or k, and a `layout_from` of another size.
        RuntimeError: Another thread traces the model, or another model that shares its layers is being traced. Where a context
            is open: a run of which it can't be told whether it should be traced.
        KeyError: `layout_from` lacks a layer.
    """
    return Uninterrupted(_traced(model, config, logits_to_keep))


@contextmanager
def _traced(model: Any, config: StreamConfig | None, logits_to_keep: int | None) -> Iterator[Trace]:
    config = as_config(config)
    _check_logits_to_keep(logits_to_keep)
    host = host_of(model)
    dense = config.dense_layer_indices(model.cfg.n_layers)
    if config.layout_from is not None:
        for layer in host.attention_layers(model).keys() - dense:
            config.layout_from.block_layout(layer)
    with opened(model, host, Trace(config, dense, logits_to_keep, rerun_cache=_rerun_cache)) as trace:
        yield trace


def run_with_sparse_cache(
    model: Any,
    *model_args: Any,
    config: StreamConfig | None = None,
    logits_to_keep: int | None = None,
    return_cache_object: bool = True,
    remove_batch_dim: bool = False,
    **kwargs: Any,
) -> tuple[Any, SparseActivationCache | dict[str, Tensor]]:
    """`run_with_cache` with sparse attention: the same arguments, the same keys, no T x T tensor.

    Args:
        model: A causal HookedTransformer or TransformerBridge (this function is also its method `run_with_sparse_cache`).
        *model_args: As for `run_with_cache`: tokens `[batch, pos]` or text.
        config: What to keep; None: the defaults of `StreamConfig`.
        logits_to_keep: Return the logits of the last so many positions only: `[batch, n, d_vocab]`. None: of all.
        return_cache_object: False gives a plain dict.
        remove_batch_dim: Drop the batch dimension (of size 1) in the cache.
        **kwargs: As for `run_with_cache` (names_filter, device, incl_bwd, pos_slice, stop_at_layer, return_type,
            past_kv_cache, ...).

    Returns:
        The model's output, and the cache. Its patterns and scores are sparse: exact for the sparse model.

    Raises:
        TypeError: As `sparse`; also a keyword that nobody takes, and a config among `model_args`.
        ValueError: As `sparse`; also `logits_to_keep` with a loss, which needs all logits.
    """
    _check_arguments(model, model_args, kwargs)
    return_type = kwargs.get("return_type", model_args[1] if len(model_args) > 1 else "logits")
    if logits_to_keep is not None and return_type in ("loss", "both"):
        raise ValueError(
            f"logits_to_keep was {logits_to_keep} with return_type={return_type!r}; a loss needs all logits. Leave "
            "logits_to_keep out."
        )
    with (
        sparse(model, config, logits_to_keep=logits_to_keep) as trace,
        host_of(model).unchanged_on_error(kwargs),
    ):
        output, activations = model.run_with_cache(
            *model_args, return_cache_object=False, remove_batch_dim=remove_batch_dim, **kwargs
        )
    if not return_cache_object:
        return output, activations
    says_logits = return_type in ("logits", "both") and kwargs.get("stop_at_layer") is None
    return output, SparseActivationCache(
        activations,
        model,
        has_batch_dim=not remove_batch_dim,
        config=trace.config,
        fallbacks=trace.fallbacks,
        next_tokens=NextTokens.of(output) if says_logits else None,
    )


def _rerun_cache(trace: Trace, output: Any, cache: ActivationCache) -> SparseActivationCache:
    """The cache of `generate(return_cache=True)`, which says what it is of."""
    result = SparseActivationCache(
        cache.cache_dict,
        cache.model,
        cache.has_batch_dim,
        config=trace.config,
        fallbacks=trace.fallbacks,
        next_tokens=NextTokens.of(output),
    )
    is_whole = bool(result.patterns) and not result.pruned
    relation = "from which nothing was pruned" if is_whole else _as_to_the_steps(trace)
    result.of = f"a run of prompt and generated tokens under {trace.config.changed()}, {relation}"
    return result


def _as_to_the_steps(trace: Trace) -> str:
    """What a run that reads a generated text again has to do with the steps that generated it."""
    config = trace.config
    if config.forward == "exact":
        return "the dense model, as the steps of generation were"
    if config.decode == "exact" or config.dense_queries:
        return "another sparse model than the steps of generation, which read everything"
    if config.block_q > 1:
        return "another sparse model than the steps of generation, each of which chose its blocks for itself"
    if trace.earlier.has_warned:
        return "another sparse model than the steps of generation, which read a KV cache that the context had not seen filled"
    own = ", if its estimator chooses by places in the text, and not in the run" if callable(config.estimator) else ""
    return f"the same sparse model as the steps of generation{own}"


def register() -> None:
    """Make `run_with_sparse_cache` a method of TransformerLens's model classes, as importing tl_stream does.

    Raises:
        AttributeError: A class has an attribute of that name that isn't ours.
    """
    name = run_with_sparse_cache.__name__
    for owner in model_classes():
        present = getattr(owner, name, None)
        if present is not None and getattr(present, "__module__", None) != __name__:
            raise AttributeError(
                f"{owner.__name__}.{name} exists already, from {getattr(present, '__module__', '?')}; tl_stream does not "
                "overwrite it. Remove it before importing tl_stream."
            )
        setattr(owner, name, run_with_sparse_cache)


def _check_arguments(model: Any, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    own = inspect.signature(run_with_sparse_cache).parameters.keys() - {"model", "model_args", "kwargs"}
    check_keywords(model, host_of(model), kwargs, ("run_with_cache", "forward"), own)
    if any(isinstance(x, StreamConfig) for x in model_args):
        raise TypeError(
            "A StreamConfig was given without a name, as an argument of the model; expected config=StreamConfig(...)."
        )


def _check_logits_to_keep(n: Any) -> None:
    if n is None:
        return
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"logits_to_keep was {n!r}; expected an int >= 1, or None for all positions.")
    if n < 1:
        raise ValueError(f"logits_to_keep was {n}; expected an int >= 1, or None for all positions.")

"""The demo's job: the bundled model reads a long text densely and sparsely, and answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream import models
from tl_stream.cache import is_pattern
from tl_stream.config import StreamConfig
from tl_stream.demo.answer import generate, readings
from tl_stream.demo.report import write_report
from tl_stream.demo.result import DemoResult
from tl_stream.tasks import NeedleTask, niah_single_1
from tl_stream.tracing import run_with_sparse_cache, sparse
from tl_stream.viz.page import check_writable

CONFIG = StreamConfig(block_q=32, block_k=32, k=6, estimator="dual")
STEPS = ("dense: cached run", "dense: answer", "sparse: cached run", "sparse: answer", "write the page")
_WARM_UP_TOKENS = 64
_DENSE_TEMPORARIES = 4  # tensors of one layer's pattern that the dense run holds beside its cache at its peak, measured


@torch.inference_mode()
def run(
    tokens: int = 4096,
    depth: float = 0.5,
    seed: int = 0,
    html: Path = Path("tl_stream_demo.html"),
    *,
    model: Any = None,
    progress: Callable[[str], None] = lambda step: None,
) -> DemoResult:
    """Hide a needle in `tokens` tokens, ask the model for it densely and sparsely, and write a page about it.

    Args:
        tokens: Length of the prompt.
        depth: Where the needle lies in it, 0 to 1.
        seed: Of the text.
        html: File to write; it appears whole or not at all.
        model: A HookedTransformer with a tokenizer; None: the bundled one.
        progress: Told each of `STEPS` as it begins.

    Raises:
        ValueError: Too few tokens for the needle, more than the model reads or than fit into memory densely, a depth
            outside 0..1, or a file that can't be written. All of that is known before anything is computed.
    """
    check_writable(html)
    model = models.load() if model is None else model
    task = _task(model, tokens, depth, seed)
    prompt = model.to_tokens(task.prompt)

    progress(STEPS[0])
    dense_cache, seconds_dense = _timed(lambda text: _cached(model.run_with_cache, text), prompt)
    bytes_dense = sum(pattern.nbytes for pattern in dense_cache.values())
    del dense_cache
    progress(STEPS[1])
    dense_answer = generate(model, prompt, task)

    progress(STEPS[2])
    cache, seconds_sparse = _timed(lambda text: _cached(run_with_sparse_cache, model, text, config=CONFIG), prompt)
    progress(STEPS[3])
    with sparse(model, CONFIG):
        sparse_answer = generate(model, prompt, task)

    progress(STEPS[4])
    result = DemoResult(
        tokens=tokens,
        depth=depth,
        seed=seed,
        expected=task.answer,
        answer_dense=dense_answer.text,
        answer_sparse=sparse_answer.text,
        pruned=cache.pruned,
        cache_bytes_dense=bytes_dense,
        cache_bytes_sparse=cache.nbytes,
        seconds_dense=seconds_dense,
        seconds_sparse=seconds_sparse,
        retained_mass_mean=sparse_answer.retained.mean().item(),
        retained_mass_least=sparse_answer.retained.min().item(),
        heads=readings(sparse_answer, dense_answer),
        html=str(html),
    )
    write_report(html, result, cache, task, _strings(model, prompt))
    return result


def _task(model: Any, tokens: int, depth: float, seed: int) -> NeedleTask:
    n_ctx = model.cfg.n_ctx
    if tokens > n_ctx:
        raise ValueError(f"tokens: {tokens} are more than the {n_ctx} that the model reads; ask for fewer")
    task = niah_single_1(model.tokenizer, tokens, depth=depth, seed=seed)
    room = n_ctx - len(task.value)
    if tokens > room:
        raise ValueError(f"tokens: {tokens} leave no room for the answer; ask for {room} or fewer")
    _check_memory(model, tokens)
    return task


def _check_memory(model: Any, tokens: int) -> None:
    """The dense run, which is there for comparison, takes T x T numbers a head and layer."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return  # Windows: unknown
    patterns = model.cfg.n_layers + _DENSE_TEMPORARIES
    needed = patterns * model.cfg.n_heads * tokens**2 * model.cfg.dtype.itemsize
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ValueError(
            f"tokens: with {tokens} the dense run would take about {needed / 1e9:.0f} GB of this machine's "
            f"{present / 1e9:.0f} GB of memory; ask for {int(tokens * (present / needed) ** 0.5)} or fewer"
        )


def _cached(run_with_cache: Callable[..., tuple[Any, Any]], *arguments: Any, **options: Any) -> Any:
    """The cache of a forward pass that keeps all patterns and unembeds nothing."""
    return run_with_cache(*arguments, names_filter=is_pattern, return_type=None, **options)[1]


def _timed(trace: Callable[[Tensor], Any], prompt: Int[Tensor, "batch pos"]) -> tuple[Any, float]:
    """What `trace` makes of the prompt, and in how many seconds, after a warm-up on its beginning."""
    trace(prompt[:, :_WARM_UP_TOKENS])
    start = perf_counter()
    traced = trace(prompt)
    return traced, perf_counter() - start


def _strings(model: Any, prompt: Int[Tensor, "batch pos"]) -> list[str]:
    """The prompt's tokens with the spaces before them."""
    return [piece.replace("▁", " ") for piece in model.tokenizer.convert_ids_to_tokens(prompt[0].tolist())]

"""Whether a run will take longer than the model's own forward: known from its config, and said before it begins.

The estimate counts, layer by layer, what is multiplied and copied, in nanoseconds of one CPU thread. Its constants are fitted
to one layer's attention, of the shapes of SmolLM2-135M (heads of 64) and Gemma 3 270M (heads of 256), 1,024 to 4,096 tokens,
blocks of 1 x 1 to 32 x 32, on an AMD EPYC (`benchmarks/attention_price.py`; whole runs: `benchmarks/real/price.py`). What
counts is the order of magnitude: blocks of single tokens take longer than dense attention on a text of a thousand tokens.
Accelerators were not measured, and nothing is said there.
"""

from __future__ import annotations

import math
import warnings
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from tl_stream.config import StreamConfig

LEAST_TOKENS = 1024  # of shorter texts no run takes long
DEAR = 1.3
_SAMPLES = 8  # places in the text at which a row's cost is counted
_OF_A_PARAMETER = 0.012  # of a layer, a token
_COPIED, _SCORED, _SHARE = 1.4, 3.5, 22.0  # a number of a key that is copied; a pair of tokens; a candidate block's place

_said: WeakKeyDictionary[Any, set[tuple[int, int]]] = WeakKeyDictionary()  # of which models and blocks it was said


def warn_where_dear(model: Any, layers: dict[int, Any], config: StreamConfig, resid: Any) -> None:
    """Warn, once for a model and a size of blocks, of a run that will take longer than dense attention.

    Args:
        model: The model.
        layers: Its attention modules.
        config: The run's.
        resid: What enters the first layer, `[batch, pos, d_model]`.
    """
    known, blocks = _said.setdefault(model, set()), (config.block_q, config.block_k)
    if not isinstance(resid, Tensor) or resid.dim() != 3 or resid.device.type != "cpu" or resid.shape[1] < LEAST_TOKENS:
        return
    if blocks in known:
        return
    n = resid.shape[1]
    price = relative_price(model, layers, config, n)
    if price < DEAR:
        return
    known.add(blocks)
    warnings.warn(
        f"{config.changed()} makes this run of {n:,} tokens take about {price:.1f} times as long as the model's own forward "
        "(an estimate for CPUs). Larger blocks are cheaper (block_q=32, block_k=8, say), and so are fewer (k); or run the "
        "dense model: run_with_cache outside of a context.",
        stacklevel=2,
    )


def relative_price(model: Any, layers: dict[int, Any], config: StreamConfig, n: int) -> float:
    """The estimated time of a run on a text of `n` tokens, by that of the model's own forward."""
    n_heads, d_head = int(model.cfg.n_heads), int(model.cfg.d_head)
    parameters = sum(each.numel() for each in model.blocks.parameters())
    shared = _OF_A_PARAMETER * parameters * n
    dense = _dense_pair(d_head) * n * n * n_heads
    dense_layers = config.dense_layer_indices(int(model.cfg.n_layers))
    traced = 0.0
    for layer, attn in layers.items():
        window = window_of(attn)
        rows = [min((2 * i + 1) * n / (2 * _SAMPLES), float(window or n)) for i in range(_SAMPLES)]
        if layer in dense_layers:
            traced += _full(rows, d_head) * n * n_heads
        else:
            traced += sum(_head(config, layer, head, rows, d_head) for head in range(n_heads)) * n
    return (shared + traced) / (shared + dense * len(layers))


def window_of(attn: Any) -> int | None:
    """How many keys a query of an attention module may read, where the module says so."""
    if getattr(attn, "attn_type", None) == "local":
        return int(attn.cfg.window_size)
    inner = getattr(attn, "original_component", None)
    config = getattr(inner, "config", None)
    same = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
    window = getattr(inner, "sliding_window", same)
    return window if isinstance(window, int) else None


def _dense_pair(d_head: int) -> float:
    return 10.5 + d_head / 64


def _full(rows: list[float], d_head: int) -> float:
    """A row of streamed full attention of one head."""
    return 0.6 * _dense_pair(d_head) * fmean(rows)


def _head(config: StreamConfig, layer: int, head: int, rows: list[float], d_head: int) -> float:
    """A row of sparse attention of one head, the choice of its blocks included: mean over rows that can read so many keys."""
    budget, n_blocks = config.budget.of_head(layer, head), math.ceil(max(rows) / config.block_k)
    if budget.share is None and budget.blocks(n_blocks) == n_blocks:
        return _full(rows, d_head)
    chosen = 0.0 if config.layout_from is not None else fmean(_choice(config, budget, row, d_head) for row in rows)
    if config.forward == "exact":
        return chosen + _full(rows, d_head)
    own = -(-config.block_q // config.block_k)
    blocks = [1 if budget.share is not None else budget.blocks(math.ceil(row / config.block_k)) for row in rows]
    kept = fmean(min((n + own) * config.block_k, row + config.block_k) for n, row in zip(blocks, rows, strict=True))
    return chosen + kept * (4 + 2 * d_head * _COPIED / config.block_q)


def _choice(config: StreamConfig, budget: Any, row: float, d_head: int) -> float:
    """The choice of one row's blocks, of as many keys as it can read."""
    block_q, block_k, n_blocks = config.block_q, config.block_k, math.ceil(row / config.block_k)
    most, estimator = budget.blocks(n_blocks), config.estimator
    if estimator == "auto":
        estimator = "exact" if row <= config.exact_below else "dual"
    pair = _SCORED + d_head / 64
    if estimator == "exact":
        return row * (pair + _SHARE / (block_q * block_k))
    if estimator in ("dual", "stream", "hip", "box"):
        width = 2 * most * (config.beam if estimator == "dual" else 1)
        visits = min(width, n_blocks) * (math.log2(max(n_blocks / width, 1)) + 1)
        if estimator != "dual":
            return 0.4 * visits * (3 * d_head + 190) / block_q
        leaves = min((2 * config.beam + 1) * most, n_blocks) * block_k
        asked = min(config.leaf_queries or block_q, block_q) / block_q
        return visits * (3 * d_head + 190) / block_q + leaves * (pair * asked + d_head * _COPIED / block_q)
    return _SHARE * (n_blocks if estimator == "random" else most) / block_q  # a function of the user's own: unknown

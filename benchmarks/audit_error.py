"""How far off the audit's estimates are: its estimate for all rows, and its 95 % intervals from 64 rows.

    python benchmarks/audit_error.py

The bundled model on three texts of about 2,048 tokens. The truth is the audit of all rows, which are then exact.
"""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.cache import is_pattern
from tl_stream.tasks import niah_multikey_1, niah_single_1, reasoning_trace

TOKENS, SENTENCES, SEED = 2048, 180, 31
BLOCKS, KS = (8, 32), (2, 4, 8)
ROUNDING = 1e-6


def texts(model: Any) -> list[str]:
    needles = [make(model.tokenizer, TOKENS, seed=SEED).prompt for make in (niah_single_1, niah_multikey_1)]
    return [*needles, reasoning_trace(model.tokenizer, SENTENCES, seed=SEED).text]


@torch.inference_mode()
def measure(model: Any, prompts: list[str], config: StreamConfig) -> dict[str, list[float]]:
    """Of each head of each text: mean error of a row's estimate, width of the interval, and whether it holds the mean."""
    found: dict[str, list[float]] = {"error": [], "width": [], "inside": []}
    for prompt in prompts:
        _, cache = model.run_with_sparse_cache(prompt, config=config, names_filter=is_pattern, logits_to_keep=1)
        for exact, sampled in zip(cache.audit(sample=10**6).heads, cache.audit(sample=64).heads, strict=True):
            mean = exact.mean_low  # = mean_high
            found["error"].append(exact.estimate_error)
            found["width"].append(sampled.mean_high - sampled.mean_low)
            found["inside"].append(sampled.mean_low - ROUNDING <= mean <= sampled.mean_high + ROUNDING)
    return found


def main() -> int:
    model: Any = tl_stream.models.load()
    prompts = texts(model)
    table = Table("block", "k", "error: mean", "worst head", "interval: width", "holds the mean", title="The audit's estimates")
    for block, k in tqdm(list(itertools.product(BLOCKS, KS)), desc="configs"):
        found = measure(model, prompts, StreamConfig(block_q=block, block_k=block, k=k))
        held = f"{sum(found['inside']):.0f} of {len(found['inside'])}"
        figures = fmean(found["error"]), max(found["error"]), fmean(found["width"])
        table.add_row(str(block), str(k), *(f"{x:.3f}" for x in figures), held)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

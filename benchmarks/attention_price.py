"""What one layer's attention costs, dense and sparse: `python benchmarks/attention_price.py [--tokens N ...]`.

CPU seconds of one thread (the least of two repeats) on random queries and keys that share a direction, in the shapes of two
real models: the eager attention of Hugging Face, Stream's choice of blocks, and the attention over these. The constants of
`tl_stream.hosts.price` are fitted to this.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tl_stream import StreamConfig, estimate_layout
from tl_stream.attention import sparse_attention
from tl_stream.audit import records
from tl_stream.masking import AttentionMask

SHAPES: dict[str, tuple[int, int, int, int | None]] = {  # heads, kv heads, d_head, window
    "SmolLM2-135M": (9, 3, 64, None),
    "Gemma 3 270M, full": (4, 1, 256, None),
    "Gemma 3 270M, window": (4, 1, 256, 512),
}
BLOCKS = ((32, 32, 16), (32, 8, 16), (8, 8, 16), (4, 4, 16), (1, 1, 32))  # block_q, block_k, k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in SHAPES for n in options.tokens for line in cases(name, n)]
    header = ("attention of", "tokens", "blocks", "dense", "choice", "sparse", "ratio")
    Console(width=120).print(records.table("CPU seconds of one layer's attention, one thread", header, lines))


@torch.inference_mode()
def cases(name: str, n: int) -> list[tuple[Any, ...]]:
    """A row for each shape of blocks."""
    heads, kv_heads, d_head, window = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, d_head, generator=generator) for h in (heads, kv_heads, kv_heads))
    q, k = 1.5 * q, k + 2 * torch.randn(1, kv_heads, 1, d_head, generator=generator)
    mask, hidden = AttentionMask.causal(n, window=window), dense_mask(n)
    dense, found = cpu_seconds(lambda: eager(q, k, v, hidden)), []
    for block_q, block_k, number in BLOCKS:
        config = StreamConfig(block_q=block_q, block_k=block_k, k=number)
        layout = estimate_layout(q, k, config, mask=mask)
        choice = cpu_seconds(partial(estimate_layout, q, k, config, mask=mask))
        sparse = cpu_seconds(partial(sparse_attention, q, k, v, layout))
        blocks = f"{block_q} x {block_k}, k = {number}"
        found.append((name, f"{n:,}", blocks, dense, choice, sparse, (choice + sparse) / dense))
    return found


def dense_mask(n: int) -> Tensor:
    return torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers' `eager_attention_forward`; a window only changes the mask's values."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


def cpu_seconds(run: Callable[[], Any]) -> float:
    """The lesser of two runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(2):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()

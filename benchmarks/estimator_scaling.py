"""How the time and memory of the choice of blocks grow with the number of tokens, by `dual` and by the streamed exact choice.

    python benchmarks/estimator_scaling.py [--quick] [--json FILE]

One layer's queries and keys, random (4 heads of 64, 2 kv heads); blocks of 64, k = 16, defaults else. Each row is measured in a
process of its own: seconds are the median of three estimates, peak_bytes the growth of the resident set at its highest over
the queries and keys (Linux only). The exponents are slopes of the logarithms, by least squares. First `dual` is checked to keep
about what the exact choice keeps, where random keys hide nothing: nothing is reported where it doesn't.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scaling import exponent, resident, timed
from tqdm import tqdm

from tl_stream import BlockLayout, StreamConfig, estimate_layout

CONFIG = StreamConfig(block_q=64, block_k=64, k=16, estimator="dual")
LENGTHS = {"dual": [8192, 16384, 32768, 65536, 131072], "exact": [8192, 16384, 32768]}
REPEATS = 3
FIGURES = ("seconds", "peak_bytes")


def queries_and_keys(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that look for four earlier keys each."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, length, 64, generator=generator)
    wanted = (torch.rand(4, 4 * length, generator=generator) * torch.arange(length).repeat(4)).long()
    found = k.repeat_interleave(2, 1)[0].gather(1, wanted[..., None].expand(-1, -1, 64))
    return 0.5 * found.unflatten(1, (4, length)).sum(1)[None], k


def check() -> str | None:
    """What is wrong with `dual`'s choice; None if nothing."""
    q, k = queries_and_keys(8192)
    scores = (q[:, :, -64:] @ k.repeat_interleave(2, 1).mT / 8).softmax(-1).unflatten(-1, (-1, 64)).sum(-1).mean(2)

    def held(estimator: str) -> float:
        layout: BlockLayout = estimate_layout(q, k, replace(CONFIG, estimator=estimator))
        return (scores * layout.to_block_dense()[:, :, -1]).sum(-1).mean().item()

    dual, exact = held("dual"), held("exact")
    return None if dual > 0.9 * exact else f"dual kept {dual:.3f} of the last block's attention, the exact choice {exact:.3f}"


@torch.no_grad()
def measure(estimator: str, length: int) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(1)
    config = replace(CONFIG, estimator=estimator)
    estimate_layout(*queries_and_keys(512), config)
    before = resident("VmRSS")
    q, k = queries_and_keys(length)
    seconds, peak, _ = timed(lambda: estimate_layout(q, k, config), REPEATS)
    return {"method": estimator, "tokens": length, "seconds": seconds, "peak_bytes": peak - before - q.nbytes - k.nbytes}


def in_own_process(estimator: str, length: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, estimator, length).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 32,768 tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and exponents there")
    options = parser.parse_args()
    if fault := check():
        print(f"Not measured: {fault}", file=sys.stderr)
        return 1
    jobs = [(name, n) for name, lengths in LENGTHS.items() for n in lengths if n <= 32768 or not options.quick]
    rows = [in_own_process(*job) for job in tqdm(jobs, desc="rows", file=sys.stderr)]
    exponents = {name: {figure: exponent(rows, name, figure) for figure in FIGURES} for name in LENGTHS}
    table = Table("estimator", "tokens", "seconds", "peak MB", title="Choosing blocks")
    for row in rows:
        table.add_row(row["method"], f"{row['tokens']:,}", f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}")
    Console().print(table, exponents)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "exponents": exponents}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

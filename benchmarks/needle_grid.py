"""A needle study of the bundled model: accuracy by depth and length, dense and with constant and growing budgets.

    python benchmarks/needle_grid.py --cells FILE [--html FILE]

niah_single_1 (RULER, arXiv:2404.06654), five depths, two texts a cell that training never used. Interrupted, it goes
on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import needle_grid
from tl_stream.budget import Budget, Sqrt

LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BUDGETS: dict[str, int | Budget] = {"k = 1": 1, "k = 2": 2, "k = sqrt(n)": Sqrt(1.0)}
CONFIG = StreamConfig(block_q=16, block_k=16, estimator="dual")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, metavar="FILE", help="finished cells, as JSON lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the heat maps there")
    options = parser.parse_args()
    model = tl_stream.models.load()
    grid = needle_grid(model, LENGTHS, DEPTHS, BUDGETS, samples=2, seed=20_000, config=CONFIG, path=options.cells)
    columns = ["accuracy_dense", "accuracy_sparse", "pruned", "needle_retained"]
    Console().print(grid.to_dataframe().groupby(["budget", "length"], sort=False)[columns].mean().to_string())
    if options.html:
        grid.plot().write_html(options.html, include_plotlyjs="cdn")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

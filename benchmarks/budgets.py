"""How small a budget `find_budget` finds on needle tasks: the paper's criterion (the next two tokens), and the whole answer.

The k that every head gets, and the total over all heads that is distributed by the attention it holds.

python benchmarks/budgets.py [tokens] [--seeds N] [--blocks N ...]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from itertools import product
from typing import Any

import rich
from rich.table import Table

import tl_stream
from tl_stream import StreamConfig
from tl_stream.fidelity import find_budget

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MATCHES = (2, 7)
OVER = ("k", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", nargs="?", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=(16, 32, 64))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what is not monotone is counted
    model: Any = tl_stream.models.load()
    columns = "block", "next tokens", "over", "prompts", "found", "median", "largest", "pruned: mean", "least", "not monotone"
    table = Table(*columns)
    for block, match, over in product(options.blocks, MATCHES, OVER):
        config = StreamConfig(block_q=block, block_k=block)
        results = []
        for depth, seed in product(DEPTHS, range(options.seeds)):
            prompt = tl_stream.tasks.niah_single_1(model.tokenizer, options.tokens, depth=depth, seed=seed).prompt
            results.append(find_budget(model, prompt, match, config=config, over=over, progress=False))
        best = [result.best for result in results if result.best is not None]
        pruned = [each.pruned for each in best]
        table.add_row(
            *map(str, (block, match, over, len(results), len(best))),
            f"{statistics.median(each.budget for each in best):g}",
            str(max(each.budget for each in best)),
            f"{statistics.fmean(pruned):.2%}",
            f"{min(pruned):.2%}",
            str(sum(not result.is_monotone for result in results)),
        )
        print(block, match, over, [(each.budget, round(each.pruned, 4)) for each in best], flush=True)
    rich.print(table)


if __name__ == "__main__":
    main()

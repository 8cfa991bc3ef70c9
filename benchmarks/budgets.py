"""How small a budget `find_budget` finds on needle tasks: the paper's criterion (the next two tokens), and the whole answer.

python benchmarks/budgets.py [tokens] [--seeds N]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import rich
from rich.table import Table

import tl_stream
from tl_stream import StreamConfig
from tl_stream.fidelity import find_budget

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
BLOCKS = (16, 32, 64)
MATCHES = (2, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", nargs="?", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what is not monotone is counted
    model: Any = tl_stream.models.load()
    table = Table(
        "block", "next tokens", "prompts", "found", "k: median", "largest", "pruned: median", "least", ">= 95 %", "not monotone"
    )
    for block in BLOCKS:
        for match in MATCHES:
            config = StreamConfig(block_q=block, block_k=block)
            results = []
            for depth in DEPTHS:
                for seed in range(options.seeds):
                    prompt = tl_stream.tasks.niah_single_1(model.tokenizer, options.tokens, depth=depth, seed=seed).prompt
                    results.append(find_budget(model, prompt, match, config=config, progress=False))
            best = [result.best for result in results if result.best is not None]
            pruned = [each.pruned for each in best]
            table.add_row(
                str(block),
                str(match),
                str(len(results)),
                str(len(best)),
                f"{statistics.median(each.k for each in best):g}",
                str(max(each.k for each in best)),
                f"{statistics.median(pruned):.1%}",
                f"{min(pruned):.1%}",
                str(sum(share >= 0.95 for share in pruned)),
                str(sum(not result.is_monotone for result in results)),
            )
    rich.print(table)


if __name__ == "__main__":
    main()

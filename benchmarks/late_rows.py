"""Does a constant budget fail late in a text, and a growing one not? What the sparse model says, quarter by quarter.

    python benchmarks/late_rows.py [--quick] [--json FILE]

Reasoning traces of 270 sentences (about 3,100 tokens), read by the bundled model; blocks of 8, `dual`. At the row that states
each derived value: does the sparse model say what the dense model says? Constant k beside budgets that grow with the square
root of the position or in proportion to it, with as many blocks over the text. Intervals: Wilson, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.budget import Budget, Constant, Linear, Sqrt
from tl_stream.cache import is_pattern
from tl_stream.fidelity.runs import dense_config
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import reasoning_trace

SENTENCES, BLOCK = 270, 8
FIRST_SEED = 300
KS = (2, 4, 8)


def budgets(k: int, n_blocks: int) -> dict[str, int | Budget]:
    """Budgets of k blocks in the mean over a text of so many key blocks."""
    return {"constant": k, "sqrt": matched(Sqrt, math.sqrt(n_blocks), k, n_blocks), "linear": matched(Linear, 1.0, k, n_blocks)}


def matched(kind: type[Sqrt | Linear], high: float, k: int, n_blocks: int) -> Budget:
    """The largest budget of a kind that keeps at most as many blocks as a constant k does; with `high` it keeps everything."""
    wanted = total(Constant(k), n_blocks)
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(kind(middle), n_blocks) <= wanted else (low, middle)
    return kind(low)


def total(budget: Budget, n_blocks: int) -> int:
    """Blocks that are kept over all rows, one row a block."""
    return sum(budget.blocks(n) for n in range(1, n_blocks + 1))


def derived_values(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """A trace's tokens, and the rows that state its derived values."""
    task = reasoning_trace(model.tokenizer, SENTENCES, seed=seed)
    tokens = torch.tensor([model.tokenizer(task.text)["input_ids"]])
    spans = [sentence.value_span for sentence in task.sentences if sentence.kind == "derivation"]
    return tokens, torch.tensor([span.start - 1 for span in spans if span is not None])


def said(model: Any, tokens: Tensor, rows: Tensor, config: StreamConfig) -> tuple[Float[Tensor, "row d_vocab"], float]:
    """Logits of the rows, and the share of pairs that was pruned."""
    logits, cache = model.run_with_sparse_cache(tokens, config=config, names_filter=is_pattern)
    return logits[0, rows], cache.pruned


@torch.inference_mode()
def measure(model: Any, seed: int) -> list[dict[str, Any]]:
    """Every budget on one trace: of each value whether the models agree."""
    tokens, rows = derived_values(model, seed)
    dense, _ = said(model, tokens, rows, dense_config(StreamConfig()))
    quarter = rows * 4 // tokens.shape[1]
    found = []
    for k in KS:
        for name, budget in budgets(k, tokens.shape[1] // BLOCK).items():
            config = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=budget, estimator="dual")
            logits, pruned = said(model, tokens, rows, config)
            same: Bool[Tensor, " row"] = logits.argmax(-1) == dense.argmax(-1)
            agree = [same[quarter == i].tolist() for i in range(4)]
            found.append({"seed": seed, "k": k, "budget": name, "pruned": pruned, "agree": agree})
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("k", "budget", "pruned", "1st quarter", "2nd", "3rd", "4th", title="Values on which both models agree")
    for k, name in dict.fromkeys((row["k"], row["budget"]) for row in rows):
        of_budget = [row for row in rows if (row["k"], row["budget"]) == (k, name)]
        quarters = [[same for row in of_budget for same in row["agree"][i]] for i in range(4)]
        pruned = sum(row["pruned"] for row in of_budget) / len(of_budget)
        shown.add_row(str(k), name, f"{pruned:.1%}", *map(share, quarters))
    return shown


def share(agree: list[bool]) -> str:
    agreed = sum(agree) / len(agree)
    low, high = wilson(agreed, len(agree))
    return f"{agreed:.2f} ({low:.2f} to {high:.2f}; {len(agree)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two traces")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args()
    model: Any = tl_stream.models.load()
    seeds = range(FIRST_SEED, FIRST_SEED + (2 if options.quick else 10))
    rows = [row for seed in tqdm(seeds, desc="traces") for row in measure(model, seed)]
    Console(width=160).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

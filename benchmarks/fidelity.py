"""How much of the attention the estimators' blocks hold, at what cost: on text, on constructed heads, and for needles.

    python benchmarks/fidelity.py [--quick] [--json FILE]

Blocks of 32, causal, k = 8; the budgets "sqrt" and "linear" are scaled to about as many blocks in the mean over the text,
"top_p" keeps 90 %, at most 64 blocks. The truth is the exact attention of every key block, streamed; before anything is
reported it is checked against a dense softmax. Masses are relative to those of the exact best blocks, as many as the
estimator kept in that row; rows are query blocks of each head, evenly spaced over the text (in constructed heads: over the
blocks that want something).

- mass_mean, mass_p5, mass_worst_head: over rows; the 5th percentile of rows; the mean of the worst head. For each layer,
  and for all rows of all layers of a text together.
- mass_late, mass_early: not relative: attention kept in the last and in the first quarter of the text
- block_recall: share of the exact best blocks that are kept
- needle_kept: share of the queries that want one key in particular whose key is kept
- cost_share_of_dense_qk: multiplications of the estimator / those of q k^T (lower triangle), counted by torch
- kept_share: blocks kept / blocks that can be read
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import sources
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from sources import Constructed, Source
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import tl_stream
from tl_stream import BlockLayout, StreamConfig, estimate_layout
from tl_stream.budget import Budget, Linear, Sqrt, TopP
from tl_stream.estimator import Problem, block_masses
from tl_stream.masking import AttentionMask

BLOCK, K = 32, 8
ROWS = 256
MEANS = ("mass_mean", "mass_early", "mass_late", "block_recall", "kept_share", "cost_share_of_dense_qk")
ESTIMATORS = ("dual", "stream", "hip", "box", "window", "random", "exact")
BUDGETS: dict[str, Callable[[int], int | Budget]] = {
    "constant": lambda n_blocks: K,
    "sqrt": lambda n_blocks: Sqrt(1.5 * K / math.sqrt(n_blocks)),
    "linear": lambda n_blocks: Linear(2 * K / n_blocks),
    "top_p": lambda n_blocks: TopP(0.9, at_most=8 * K),
}


@dataclass(frozen=True)
class Row:
    """One line of the result; see the top of this file."""

    source: str
    estimator: str
    budget: str
    tokens: int
    block: int
    k: int
    mass_mean: float
    mass_p5: float
    mass_worst_head: float
    mass_early: float
    mass_late: float
    block_recall: float
    needle_kept: float | None
    kept_share: float
    cost_share_of_dense_qk: float
    seconds: float


class Truth:
    """The exact attention of every key block, in evenly spaced rows.

    Attributes:
        rows: Query blocks that are judged.
        masses: Attention of each key block, `[batch, head_index, row, kv_block]`.
    """

    def __init__(self, source: Source, n_rows: int) -> None:
        problem = problem_of(source)
        reading = (source.readers // BLOCK).unique()
        spaced = torch.linspace(0, len(reading) - 1, min(n_rows, len(reading))).round().long()
        self.rows: Int[Tensor, " row"] = reading[spaced]
        self.masses: Float[Tensor, "batch head_index row kv_block"] = torch.cat(
            [masses_of(problem, int(i)) for i in self.rows], 2
        )
        self.ranked = self.masses.sort(-1, descending=True)


def problem_of(source: Source) -> Problem:
    mask = AttentionMask.causal(source.q.shape[2], source.k.shape[2])
    return Problem.of(source.q, source.k, mask, BLOCK, BLOCK, source.q.shape[-1] ** -0.5, ())


def masses_of(problem: Problem, q_block: int) -> Float[Tensor, "batch head_index 1 kv_block"]:
    part = problem.slice(q_block, q_block + 1)
    query_pos = torch.arange(q_block * BLOCK, (q_block + 1) * BLOCK)[None]
    _, readable = part.readable_blocks()
    return block_masses(part, query_pos, None, readable)


def check_truth() -> None:
    """The exact masses equal those of a dense softmax."""
    source = replace(sources.induction(512), readers=torch.arange(512))
    scores = source.q @ source.k.mT * source.q.shape[-1] ** -0.5
    pattern = scores.masked_fill(~torch.ones(512, 512).tril().bool(), -torch.inf).softmax(-1)
    by_block = pattern.unflatten(3, (-1, BLOCK)).sum(4).unflatten(2, (-1, BLOCK)).mean(3)
    torch.testing.assert_close(Truth(source, 10**6).masses, by_block, atol=1e-6, rtol=1e-4)


def judge(source: Source, truth: Truth, estimator: str, budget: str) -> tuple[Row, Tensor]:
    """The line, and the relative mass of each row, `[batch, head_index, row]`."""
    k = BUDGETS[budget](source.k.shape[2] // BLOCK)
    config = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=k, estimator=estimator, seed=0)
    start = time.perf_counter()
    layout = estimate_layout(source.q, source.k, config)
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        estimate_layout(source.q, source.k, config)
    kept = layout.to_block_dense()[:, :, truth.rows] & (truth.rows[:, None] >= torch.arange(layout.n_kv_blocks))
    in_best = torch.arange(layout.n_kv_blocks) < kept.sum(-1, keepdim=True)
    best = (truth.ranked.values * in_best).sum(-1)
    held = (truth.masses * kept).sum(-1)
    relative = held / best
    tokens, quarter = source.q.shape[2], len(truth.rows) // 4
    readable = kept.shape[0] * kept.shape[1] * (truth.rows + 1).sum()
    row = Row(
        source=source.name,
        estimator=estimator,
        budget=budget,
        tokens=tokens,
        block=BLOCK,
        k=layout.n_slots,
        mass_mean=relative.mean().item(),
        mass_p5=relative.flatten().quantile(0.05).item(),
        mass_worst_head=relative.mean(2).min().item(),
        mass_early=held[:, :, :quarter].mean().item(),
        mass_late=held[:, :, -quarter:].mean().item(),
        block_recall=((kept.gather(-1, truth.ranked.indices) & in_best).sum() / in_best.sum()).item(),
        needle_kept=found(source, layout),
        kept_share=(kept.sum() / readable).item(),
        cost_share_of_dense_qk=counter.get_total_flops() / dense_flops(source),
        seconds=seconds,
    )
    return row, relative


def pooled(text: str, layers: list[tuple[Row, Tensor]]) -> Row:
    """A whole text: all rows of all layers."""
    rows = [row for row, _ in layers]
    means: dict[str, Any] = {name: fmean(getattr(row, name) for row in rows) for name in MEANS}
    return replace(
        rows[0],
        source=f"{text}, all layers",
        **means,
        mass_p5=torch.cat([relative.flatten() for _, relative in layers]).quantile(0.05).item(),
        mass_worst_head=min(row.mass_worst_head for row in rows),
        seconds=sum(row.seconds for row in rows),
    )


def found(source: Source, layout: BlockLayout) -> float | None:
    """The share of readers whose wanted key is kept."""
    if not isinstance(source, Constructed):
        return None
    return layout.to_block_dense()[:, :, source.readers // BLOCK, source.wanted // BLOCK].float().mean().item()


def dense_flops(source: Source) -> int:
    """Of q k^T below the diagonal: a multiplication and an addition a pair and dimension."""
    batch, heads, tokens, d_head = source.q.shape
    return batch * heads * tokens * (tokens + 1) * d_head


def all_sources(quick: bool) -> Iterator[list[Source]]:
    """A layer or constructed head at a time is judged; each list is one text."""
    for tokens in (2048, 8192, 32768) if quick else (2048, 8192, 32768, 131072):
        yield sources.english(tokens)
    yield sources.bundled_tasks(4096)
    yield [sources.induction(8192), sources.induction(8192, shuffled=True), sources.induction(32768)]
    yield [sources.needle(32768, readers=n, seed=seed) for n in (1, 32) for seed in range(1 if quick else 4)]


def rows_of(quick: bool) -> Iterator[Row]:
    for group in all_sources(quick):
        texts: dict[tuple[str, str, str], list[tuple[Row, Tensor]]] = {}
        for source in tqdm(group, desc=group[0].name, leave=False):
            truth = Truth(source, ROWS // 4 if quick else ROWS)
            tried = [(estimator, "constant") for estimator in ESTIMATORS if estimator != "exact" or source.q.shape[2] <= 8192]
            if not isinstance(source, Constructed):
                tried += [("dual", budget) for budget in BUDGETS if budget != "constant"]
            for choice in tried:
                row, relative = judge(source, truth, *choice)
                yield row
                text, _, layer = source.name.partition(", layer ")
                if layer:
                    texts.setdefault((text, *choice), []).append((row, relative))
        yield from (pooled(text, layers) for (text, *_), layers in texts.items())


def table(rows: list[Row]) -> Table:
    shown = Table(title="Attention held by the chosen blocks, relative to the exact best ones")
    columns = ("source", "estimator", "budget", "mean", "p5", "worst head", "early", "late", "needle", "kept", "cost", "s")
    for column in columns:
        shown.add_column(column)
    for row in rows:
        masses = (row.mass_mean, row.mass_p5, row.mass_worst_head, row.mass_early, row.mass_late)
        needle = "" if row.needle_kept is None else f"{row.needle_kept:.3f}"
        shares = (f"{row.kept_share:.3f}", f"{row.cost_share_of_dense_qk:.1%}", f"{row.seconds:.2f}")
        shown.add_row(row.source, row.estimator, row.budget, *(f"{x:.3f}" for x in masses), needle, *shares)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 32k tokens, fewer rows")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    check_truth()
    rows = list(rows_of(arguments.quick))
    Console(width=180).print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def versions() -> dict[str, Any]:
    return {"python": platform.python_version(), "torch": torch.__version__, "tl_stream": tl_stream.__version__}


if __name__ == "__main__":
    main()

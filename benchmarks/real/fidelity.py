"""How near does each estimator bring a real model to its dense self, on English prose?

    PYTHONPATH=benchmarks python -m real.fidelity FOLDER ROWS [--tokens N ...] [--k N ...] [--estimators NAME ...]

The text is the held-out part of the Jargon File, blocks are 32 x 32. What is measured is what `tl_stream.fidelity` says of the
same run (a test compares them), less what would take long here: the dense model reads the text once for all estimators, its
attention is summed by blocks, and outputs are compared at `POSITIONS` evenly spaced positions.

- mass: share of the dense model's attention that lies on the blocks that the sparse run kept, mean over heads and rows; of
  each layer, and of all. A layer's q and k are those of a model whose earlier layers were pruned: some of what is lost here
  was lost by other layers.
- mass, dense q and k: the same for the blocks that the estimator keeps of the dense model's own q and k. `exact` keeps the best
  ones there, so this is how good a choice is; tables give it relative to `exact`'s, layer by layer. (The own block is kept
  beside the budget where it isn't among the chosen, so that two choices may differ by a block; at small k one may pass 1.)
- KL(dense || sparse) of the next token in nats, and the share of positions with the same most likely one.
- seconds: CPU seconds of the sparse run, and of the estimator alone (on the dense model's q and k).
- MB: the most memory that the run took beyond what was there before, its cached patterns included.
- prunes: whether there are more key blocks to read than `dual` keeps tree nodes, by kind of layer: where not, it scores every
  block exactly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from paper_studies.loading import check_context
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from real import common
from real.common import append, load, peak, reset_peak, rows, versions
from tl_stream import BlockLayout, StreamConfig, estimate_layout
from tl_stream.audit import records
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.cache import is_pattern
from tl_stream.fidelity.runs import dense_config
from tl_stream.hosts.unembedding import logits_of, runs, without_logits

ESTIMATORS = ("exact", "dual", "stream", "hip", "box", "window", "random")
BLOCK = 32
POSITIONS = 1024
ENOUGH = 0.985  # of what the exact best blocks hold, in the mean over a layer
DENSE = dense_config(StreamConfig(block_q=BLOCK, block_k=BLOCK))


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass.

    Attributes:
        final: What the unembedding was given, `[batch, pos, d_model]`.
        patterns: By layer.
        pruned: Share of the token pairs that were dropped.
        seconds: CPU seconds.
        peak_mb: The most memory that it took beyond what was there before; None where the system doesn't say.
    """

    final: Float[Tensor, "batch pos d_model"]
    patterns: dict[int, Any]
    pruned: float
    seconds: float
    peak_mb: float | None

    @classmethod
    def of(cls, model: Any, text: Int[Tensor, "1 pos"], config: StreamConfig) -> Run:
        """Run the model."""
        before, start = reset_peak(), time.process_time()
        with without_logits(model) as given:
            _, cache = model.run_with_sparse_cache(text, config=config, names_filter=is_pattern)
        seconds = time.process_time() - start
        peak_mb = None if before is None else (peak() - before) / 2**20
        return cls(given[0], cache.patterns, cache.pruned, seconds, peak_mb)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a model, as save_pretrained writes it")
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of the text (%(default)s)")
    parser.add_argument("--k", type=int, nargs="+", default=[8], help="budgets, in blocks (%(default)s)")
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS, choices=ESTIMATORS, help="(all)")
    options = parser.parse_args()
    model = load(options.folder)
    for tokens in options.tokens:
        done = {case_of(row) for row in rows(options.rows)}
        cases = [(Path(options.folder).name, tokens, name, k) for k in options.k for name in options.estimators]
        for row in study(model, [case for case in cases if case not in done]):
            append(options.rows, row)
    for shown in (table, layers_table):
        Console(width=140).print(shown(rows(options.rows)))
    return 0


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["tokens"], row["estimator"], row["k"]


@torch.inference_mode()
def study(model: Any, cases: Sequence[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The cases of one length; the dense model reads the text once."""
    if not cases:
        return
    name, tokens, *_ = cases[0]
    text = prose(model, tokens)
    Run.of(model, text[:, :BLOCK], DENSE)  # the first run reads the weights into memory
    dense = Run.of(model, text, DENSE)
    held = {layer: masses(pattern) for layer, pattern in dense.patterns.items()}
    for *_, estimator, k in tqdm(cases, desc=f"{tokens} tokens", file=sys.stderr):
        config = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=k, estimator=estimator, seed=0, max_dense=0)
        about = {"model": name, "tokens": tokens, "estimator": estimator, "k": k, "block": BLOCK}
        yield {**about, **compared(model, text, config, dense, held), "versions": versions()}


def prose(model: Any, tokens: int) -> Int[Tensor, "1 pos"]:
    """So many tokens of held-out English. InputError: more than the model reads."""
    check_context(model, "--tokens", tokens)
    if tokens % BLOCK:
        raise ValueError(f"--tokens was {tokens}; expected a multiple of {BLOCK}, the block.")
    return common.prose(model.tokenizer, tokens)


def masses(pattern: Any) -> Float[Tensor, "head_index q_block kv_block"]:
    """The share of each query block's attention that each key block holds, in the full softmax of the pattern's q and k."""
    return by_key(pattern).unflatten(-1, (-1, BLOCK)).sum(-1)


def by_key(pattern: Any) -> Float[Tensor, "head_index q_block key_pos"]:
    """The same of each key."""
    full = SoftmaxRows.of(pattern)
    every = torch.arange(full.layout.mask.query_length)
    parts = (full.softmax(full.scores(part), part)[0] for part in full.runs(every, BLOCK))
    return torch.cat([part.unflatten(1, (-1, BLOCK)).mean(2) for part in parts], 1)


def compared(model: Any, text: Tensor, config: StreamConfig, dense: Run, held: dict[int, Tensor]) -> dict[str, Any]:
    """One sparse run beside the dense one; see the top of this file."""
    run = Run.of(model, text, config)
    mass = {layer: retained(held[layer], pattern.block_layout) for layer, pattern in run.patterns.items()}
    final, pruned, seconds, peak_mb = run.final, run.pruned, run.seconds, run.peak_mb
    del run
    start = time.process_time()
    layouts = {layer: chosen(pattern, config, layer) for layer, pattern in dense.patterns.items()}
    choosing = time.process_time() - start
    best = {layer: retained(held[layer], layout) for layer, layout in layouts.items()}
    kl, top_1 = outputs(model, dense.final, final, text)
    return {
        "mass": mean(mass.values()),
        "mass by layer": listed(mass),
        "mass, dense q and k": mean(best.values()),
        "mass by layer, dense q and k": listed(best),
        "worst head, dense q and k": round(min(float(each.min()) for each in best.values()), 5),
        "kl": kl,
        "top_1": top_1,
        "pruned": round(pruned, 5),
        "seconds": round(seconds, 2),
        "seconds, choosing": round(choosing, 2),
        "peak_mb": rounded(peak_mb),
        "dense seconds": round(dense.seconds, 2),
        "dense peak_mb": rounded(dense.peak_mb),
        "layers": [kind_of(layout) for layout in layouts.values()],
        "key blocks": {kind_of(layout): span_of(layout) for layout in layouts.values()},
        "beam": config.beam * int(config.budget.blocks(text.shape[1] // BLOCK)),
    }


def chosen(pattern: Any, config: StreamConfig, layer: int) -> BlockLayout:
    """The blocks that the estimator keeps of a dense pattern's q and k."""
    rows = SoftmaxRows.of(pattern)
    given, mask = rows.products, rows.layout.mask
    return estimate_layout(given.q, given.k, config, mask=mask, scale=given.scale, score_mods=given.score_mods, layer=layer)


def retained(held: Float[Tensor, "head_index q_block kv_block"], layout: BlockLayout) -> Float[Tensor, " head_index"]:
    """The share of attention on the kept blocks, mean over the rows of each head."""
    return (held * layout.to_block_dense()[0]).sum(-1).mean(-1)


def outputs(model: Any, dense: Tensor, sparse: Tensor, text: Tensor) -> tuple[float, float]:
    """KL and top-1 agreement at evenly spaced positions, the last among them."""
    step = -(-text.shape[1] // POSITIONS)
    dense, sparse = (x[:, step - 1 :: step] for x in (dense, sparse))
    kl, same = [], []
    for run in runs(model, *dense.shape[:2]):
        p, q = (logits_of(model, x[:, run], text).float().log_softmax(-1) for x in (dense, sparse))
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    return round(float(torch.cat(kl, 1).mean()), 5), round(float(torch.cat(same, 1).mean()), 5)


def kind_of(layout: BlockLayout) -> str:
    return "full" if layout.mask.start is None else "window"


def span_of(layout: BlockLayout) -> int:
    """The most key blocks that a query block may read."""
    first, last = layout.mask.bounds(layout.query_positions())
    first = torch.zeros_like(last) if first is None else first
    return int(((last.amax(-1) - 1) // BLOCK - first.clamp(min=0).amin(-1) // BLOCK + 1).max())


def mean(by_layer: Any) -> float:
    return round(float(torch.stack(list(by_layer)).mean()), 5)


def listed(by_layer: dict[int, Tensor]) -> list[float]:
    return [round(float(by_layer[layer].mean()), 5) for layer in sorted(by_layer)]


def rounded(x: float | None) -> int | None:
    return None if x is None else round(x)


def table(cases: list[dict[str, Any]]) -> Any:
    """Every case, its masses relative to those of the exact best blocks."""
    lines = []
    for row in ordered(cases):
        shares = relative(row, cases)
        lines.append(
            (
                *(row[name] for name in ("model", "tokens", "k", "estimator", "mass", "mass, dense q and k")),
                row["mass, dense q and k"] / best_of(row, cases)["mass, dense q and k"] if shares else None,
                min(shares, default=None),
                *(row[name] for name in ("kl", "top_1")),
                f"{row['pruned']:.1%}",
                *(f"{row[name]:.0f}" for name in ("seconds", "seconds, choosing", "dense seconds")),
                *(row[name] for name in ("peak_mb", "dense peak_mb")),
            )
        )
    header = ("model", "tokens", "k", "estimator", "mass", "of dense q, k", "/ exact", "least layer", "KL", "top-1", "pruned",
              "CPU s", "choosing", "dense", "MB", "dense")  # fmt: skip
    return records.table("Sparse runs beside the dense model, on prose", header, lines)


def layers_table(cases: list[dict[str, Any]]) -> Any:
    """Of `dual`, by kind of layer: does its beam prune, and is a layer's mean below `ENOUGH` of the exact best blocks'?"""
    lines = []
    for row in ordered(cases):
        shares = relative(row, cases)
        for kind, blocks in row["key blocks"].items() if row["estimator"] == "dual" and shares else ():
            of_kind = [share for share, each in zip(shares, row["layers"], strict=True) if each == kind]
            prunes = "yes" if blocks > row["beam"] else "no"
            below = sum(share < ENOUGH for share in of_kind)
            about = (row["model"], row["tokens"], row["k"], f"{kind} ({len(of_kind)})", blocks, row["beam"], prunes)
            lines.append((*about, sum(of_kind) / len(of_kind), min(of_kind), below))
    header = ("model", "tokens", "k", "layers", "key blocks", "beam", "prunes", "/ exact", "least layer", f"below {ENOUGH}")
    return records.table("What dual's beam loses, on the dense model's q and k", header, lines)


def relative(row: dict[str, Any], cases: list[dict[str, Any]]) -> list[float]:
    """Of each layer, the mass relative to the exact best blocks'; empty where that wasn't measured."""
    name, best = "mass by layer, dense q and k", best_of(row, cases)
    return [mine / theirs for mine, theirs in zip(row[name], best[name], strict=True)] if best else []


def best_of(row: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = (*case_of(row)[:2], "exact", row["k"])
    return next((each for each in cases if case_of(each) == wanted), {})


def ordered(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(cases, key=lambda row: (row["model"], row["tokens"], row["k"], ESTIMATORS.index(row["estimator"])))


if __name__ == "__main__":
    raise SystemExit(main())

"""Do the routes from needle to answer carry the answer in a real model? Cut them, and as many other entries, and see.

    PYTHONPATH=benchmarks python -m real.routes FOLDER ROWS [--tokens N] [--first N] [--cases N]

A case is a text of one of RULER's tasks (niah_single_1 and niah_single_2 in turn, in the tokenizer's chat template where there
is one), read sparsely with its answer. It is a retrieval where each of the answer's digits is the most likely one after those
before it. The routes from the needle sentence to the rows that say them are found, the entries on the top ones to each are cut
in one pass, and the answer has changed where another digit is the most likely one somewhere: where greedy generation would give
another answer. Controls: as many kept entries, drawn from all layers, heads and rows; and from the very rows (layer, head,
query) that the routes' entries are in. All of that in one fixed sparse model: cuts choose no other blocks. Each case is a row
appended to ROWS; an interrupted study reads those.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_studies.loading import with_answer
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

import tl_stream
from real.common import load, once, rows
from tl_stream import StreamConfig
from tl_stream.analysis import cut_edges, flow_names, needle_routes, random_edges
from tl_stream.audit import records
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import NeedleTask, in_chat, niah_single_1, niah_single_2

TASKS = (niah_single_1, niah_single_2)
CONFIG = StreamConfig(block_q=32, block_k=8, k=16)
TOP = (3, 10, 30)
FOLLOW = 0.5  # holds the top routes; what carries the rest is hundreds of times as many edges
DEPTHS = 5
CUTS = ("cut", "random", "same rows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a model, as save_pretrained writes it")
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt (%(default)s)")
    parser.add_argument("--cases", type=int, default=40, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (%(default)s)")
    options = parser.parse_args()
    model = load(options.folder)
    for number in tqdm(range(options.first, options.first + options.cases), file=sys.stderr):
        about = {"model": Path(options.folder).name, "tokens": options.tokens, "number": number}
        once(options.rows, about, partial(case, model, options.tokens, number))
    Console(width=120).print(table([row for row in rows(options.rows) if row["tokens"] == options.tokens]))
    return 0


@torch.inference_mode()
def case(model: Any, length: int, number: int) -> dict[str, Any]:
    """One text: whether it is a retrieval, its routes, and whether each cut changes the answer."""
    start, make = time.perf_counter(), TASKS[number % len(TASKS)]
    depth = number // len(TASKS) % DEPTHS / (DEPTHS - 1)
    asked: Any = in_chat(make) if model.tokenizer.chat_template else make
    task: NeedleTask = asked(model.tokenizer, length, depth=depth, seed=number)
    text, n_digits = with_answer(model, task)
    _, run = model.run_with_sparse_cache(text, config=CONFIG, names_filter=flow_names, logits_to_keep=1)
    fixed = replace(CONFIG, layout_from=run)
    whole = logits_of(model, text, fixed, n_digits, [])
    digits = text[0, -n_digits:]
    found: dict[str, Any] = {"task": make.__name__, "depth": depth, "pruned": run.pruned}
    found["retrieved"] = bool((whole.argmax(-1) == digits).all())
    if found["retrieved"]:
        routes = [needle_routes(run, task.needle, row, top=max(TOP), follow=FOLLOW) for row in range(-n_digits - 1, -1)]
        found |= {"from the needle": [each.found for each in routes], "followed": [each.followed for each in routes]}
        found |= {"first route": str(routes[0].routes[0]), "p": chances(whole, digits)}
        for top in TOP:
            edges = list(dict.fromkeys(edge.entry for each in routes for route in each.routes[:top] for edge in route.edges))
            drawn = random_edges(run, len(edges), seed=number), random_edges(run, len(edges), rows=edges, seed=number)
            found[f"top {top}: edges"] = len(edges)
            for name, cut in zip(CUTS, (edges, *drawn), strict=True):
                logits = logits_of(model, text, fixed, n_digits, cut)
                found[f"top {top}: {name}"] = bool((logits.argmax(-1) != digits).any())
                found[f"top {top}: p, {name}"] = chances(logits, digits)
    return {**found, "seconds": time.perf_counter() - start}


def chances(logits: Tensor, digits: Tensor) -> list[float]:
    """The probability of each digit after those before it."""
    return [round(p, 4) for p in logits.softmax(-1).gather(-1, digits[:, None])[:, 0].tolist()]


def logits_of(model: Any, text: Tensor, config: StreamConfig, n_digits: int, edges: list[Any]) -> Tensor:
    """Of the rows that say the digits, with some entries cut: `[n_digits, d_vocab]`."""
    with tl_stream.sparse(model, config, logits_to_keep=n_digits + 1):
        return model.run_with_hooks(text, fwd_hooks=cut_edges(edges))[0, :-1].float()


def table(cases: list[dict[str, Any]]) -> Any:
    """In how many retrievals each cut changed the answer, with Wilson's interval at 95 %."""
    retrieved = [row for row in cases if row["retrieved"]]
    lines = []
    for top in TOP:
        edges = [row[f"top {top}: edges"] for row in retrieved]
        for name in CUTS:
            share = sum(row[f"top {top}: {name}"] for row in retrieved) / max(len(retrieved), 1)
            low, high = wilson(share, len(retrieved))
            lines.append((top, sum(edges) / max(len(edges), 1), name, share, f"{low:.2f} to {high:.2f}"))
    title = f"Changed answers in {len(retrieved)} retrievals of {len(cases)} texts"
    return records.table(title, ("top routes a digit", "entries, mean", "which", "changed", "95 %"), lines)


if __name__ == "__main__":
    raise SystemExit(main())

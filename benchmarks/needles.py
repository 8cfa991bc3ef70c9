"""Does the choice of blocks matter? Needle retrieval, dense and sparse, against choices that don't look at the keys.

    python benchmarks/needles.py [--quick] [--json FILE]

The bundled model answers niah_single_1 and, in noise, niah_multikey_1 (RULER, arXiv:2404.06654) at 4,096 tokens over depths x
seeds that its training never used, by greedy generation: densely (the same weights in transformers, which is faster), with
Stream's choice, and with two static choices of the same budget (the first block and the most recent ones; random blocks). All
of it with the demo's one fixed config. Intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.cache import is_pattern
from tl_stream.demo.job import CONFIG
from tl_stream.models.evaluate import generate, wilson
from tl_stream.tasks import niah_multikey_1, niah_single_1

TOKENS = 4096
TASKS: dict[str, Any] = {"niah_single_1": niah_single_1, "niah_multikey_1": niah_multikey_1}
METHODS = ("dense", "stream", "window + sink", "random")
CONFIGS = {
    "stream": CONFIG,
    "window + sink": replace(CONFIG, estimator="window"),
    "random": replace(CONFIG, estimator="random", seed=0),
}


def answer(model: Any, prompt: torch.Tensor, n_tokens: int, config: StreamConfig) -> str:
    with tl_stream.sparse(model, config):
        output = model.generate(prompt, max_new_tokens=n_tokens, do_sample=False, verbose=False)
    return model.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 depths x 1 seed, each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer there")
    options = parser.parse_args()
    n_depths, n_seeds = (3, 1) if options.quick else (7, 4)
    depths = [i / (n_depths - 1) for i in range(n_depths)]
    model: Any = tl_stream.models.load()
    dense_model = tl_stream.models.load(host="hf")
    rows = []
    jobs = [(name, depth, seed) for name in TASKS for depth in depths for seed in range(10_000, 10_000 + n_seeds)]
    for name, depth, seed in tqdm(jobs, desc="texts", file=sys.stderr):
        task = TASKS[name](model.tokenizer, TOKENS, depth=depth, seed=seed)
        prompt = model.to_tokens(task.prompt)
        answers = {method: answer(model, prompt, len(task.value), config) for method, config in CONFIGS.items()}
        answers["dense"] = generate(dense_model, model.tokenizer, [task.prompt], len(task.value))[0]
        right = {method: task.score(text) == 1.0 for method, text in answers.items()}
        rows.append({"task": name, "depth": depth, "seed": seed, "expected": task.answer, "answers": answers, "right": right})
    _, cache = model.run_with_sparse_cache(prompt, config=CONFIG, names_filter=is_pattern, return_type=None)
    show(rows, cache.pruned)
    if options.json:
        options.json.write_text(
            json.dumps({"tokens": TOKENS, "config": vars(CONFIG), "pruned": cache.pruned, "rows": rows}, indent=1)
        )
    return 0


def show(rows: list[dict[str, Any]], pruned: float) -> None:
    table = Table(title=f"{TOKENS:,} tokens, {pruned:.1%} of the token pairs pruned")
    for column in ("task", "method", "right", "right where dense is", "95 % interval"):
        table.add_column(column, justify="right")
    for name in TASKS:
        texts = [row for row in rows if row["task"] == name]
        known = [row for row in texts if row["right"]["dense"]]
        for method in METHODS:
            right = sum(row["right"][method] for row in texts)
            both = sum(row["right"][method] for row in known)
            low, high = wilson(both / len(known), len(known))
            table.add_row(name, method, f"{right} / {len(texts)}", f"{both} / {len(known)}", f"{low:.1%} to {high:.1%}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())

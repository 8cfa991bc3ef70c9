"""Is a needle found wherever the dense model finds it? Two real models on RULER's needle tasks, answer by answer.

    PYTHONPATH=benchmarks python -m real.needles FOLDER ROWS [--block-k N] [--first N] [--texts N] [--no-paper] [--look]

1. The budget: the smallest with which the sparse model gives the dense model's whole answer (`tl_stream.find_budget`), in
   texts that none of the figures are from: shorter ones, of other seeds. It grows with the square root of the position from
   there. The paper's choice of blocks gets as many keys a row, its first layers dense.
2. A text in turn of niah_single_1, niah_single_2 and niah_multikey_1 (in the tokenizer's chat template where there is one), at
   five depths, of lengths in turn. The dense model answers: the same weights in transformers, as that is faster. Where it is
   right the sparse one generates its answer, too: `tl_stream.analysis.needle_run.run_task`, as `needle_grid` does.
3. `--look`: where the sparse answer was wrong, whether one with twice the budget is right, and what `tl_stream.recheck` says.

Each text is a row appended to ROWS; an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from paper_studies.configs import Candidate, budget_of, ours, paper
from paper_studies.needle import ANSWER_ROOM
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import tl_stream
from real.common import load, once, rows, versions
from tl_stream import StreamConfig
from tl_stream.analysis.needle_run import NeedleRun, answer_tokens, run_task
from tl_stream.analysis.needle_store import as_json
from tl_stream.audit import records
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import NeedleTask, in_chat, niah_multikey_1, niah_single_1, niah_single_2

TASKS = (niah_single_1, niah_single_2, niah_multikey_1)
DEPTHS = 5
LENGTHS = (2048, 2048, 4096, 2048, 2048, 4096, 2048, 8192)  # in turn: most texts where they take seconds
PAPER_EVERY, PAPER_FIRST = len(LENGTHS) - 1, 3  # in turn with all lengths: a wrong answer takes three times as long
SEARCH_TOKENS = 1024
SEARCH_TEXTS = 8
SEARCH_SEED = 10_000
BLOCK = 32
RUNS = {keys: ours(BLOCK, keys) for keys in (32, 8)}  # by the keys of a block
PAPER = paper(BLOCK)


@dataclass(frozen=True)
class Pair:
    """A model that can be traced, and the same weights in transformers for the dense answers."""

    name: str
    traced: Any
    dense: Any

    @property
    def tokenizer(self) -> Any:
        return self.traced.tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a model, as save_pretrained writes it")
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument(
        "--block-k", type=int, choices=RUNS, default=8, help="keys of a block; its queries are 32 (%(default)s)"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first text (%(default)s)")
    parser.add_argument("--texts", type=int, default=80, help="how many (%(default)s)")
    parser.add_argument("--no-paper", dest="paper", action="store_false", help="leave out the paper's choice of blocks")
    parser.add_argument("--look", action="store_true", help="look into the wrong answers")
    options = parser.parse_args()
    dense = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    pair = Pair(Path(options.folder).name, load(options.folder), dense)
    numbers = range(options.first, options.first + options.texts)
    study(pair, options.rows, RUNS[options.block_k], numbers, paper=options.paper, look=options.look)
    for each in tables(rows(options.rows)):
        Console(width=140).print(each)
    return 0


def study(pair: Pair, path: Path, own: Candidate, numbers: range, *, paper: bool = True, look: bool = False) -> None:
    """Add the cases that aren't there yet."""

    def done(about: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return once(path, {"model": pair.name, **about}, partial(timed, compute))

    step = done({"what": "search", "run": own.name}, partial(searched, pair, own))["budget"]
    for number in tqdm(numbers, file=sys.stderr):
        task, about = text_of(pair, number)
        dense = cache(partial(dense_answer, pair, task))
        if not done({"what": "dense", **about}, partial(dense_row, task, dense))["right"]:
            continue
        configs = {own.name: own.vary(step)}
        if paper and number % PAPER_EVERY == PAPER_FIRST:
            configs[PAPER.name] = PAPER.vary(mean_blocks(configs[own.name], task.length))
        for name, config in configs.items():
            row = done({"what": name, **about}, partial(sparse_row, pair, task, config, dense))
            if look and not row["right"] and name == own.name:
                done({"what": "look", "run": name, **about}, partial(looked, pair, task, config))


def timed(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    found = compute()
    return {**found, "seconds": round(time.perf_counter() - start, 1), **versions()}


def made(pair: Pair, number: int, length: int, seed: int) -> NeedleTask:
    """A text: all pairs of a task and a depth come in turn."""
    make: Any = TASKS[number % len(TASKS)]
    make = in_chat(make) if pair.tokenizer.chat_template else make
    task: NeedleTask = make(pair.tokenizer, length, depth=number % DEPTHS / (DEPTHS - 1), seed=seed)
    return task


def text_of(pair: Pair, number: int) -> tuple[NeedleTask, dict[str, Any]]:
    """A text that is judged, and what tells it from others."""
    length = min(LENGTHS[number % len(LENGTHS)], pair.traced.cfg.n_ctx - ANSWER_ROOM)
    task = made(pair, number, length, seed=number)
    about = {"task": TASKS[number % len(TASKS)].__name__, "tokens": length, "depth": task.depth, "seed": number}
    return task, {"number": number, **about}


def searched(pair: Pair, own: Candidate) -> dict[str, Any]:
    """The smallest budget that gives the dense model's whole answers in texts where these are right."""
    texts = right_texts(pair)
    some = [task for task, _ in zip(texts, range(SEARCH_TEXTS), strict=False)]
    tokens = torch.tensor([pair.tokenizer(task.prompt)["input_ids"] for task in some])
    digits = len(some[0].references[0])
    config = own.vary(1)
    most = own.most(-(-(SEARCH_TOKENS + digits) // config.block_k))
    search = tl_stream.find_budget(pair.traced, tokens, digits, config=config, over=own.vary, high=most)
    tried = [[each.budget, each.matched, round(each.pruned, 4)] for each in search.evaluations]
    best = search.best
    if best is None or search.config is None:
        raise RuntimeError(f"no budget up to {most} gives the dense model's answers")  # all blocks do
    return {
        "tokens": SEARCH_TOKENS,
        "texts": len(some),
        "budget": best.budget,
        "k": budget_of(search.config),
        "pruned": best.pruned,
        "tried": tried,
        "matched": search.criterion,
        "config": as_json(search.config),
    }


def right_texts(pair: Pair) -> Iterator[NeedleTask]:
    """Texts to search with."""
    number = 0
    while True:
        task = made(pair, number, SEARCH_TOKENS, SEARCH_SEED + number)
        if task.score(dense_answer(pair, task).output) == 1:
            yield task
        number += 1


def dense_row(task: NeedleTask, dense: Callable[[], NeedleRun]) -> dict[str, Any]:
    run = dense()
    return {"answer": run.output, "expected": task.answer, "right": task.score(run.output) == 1}


def sparse_row(pair: Pair, task: NeedleTask, config: StreamConfig, dense: Callable[[], NeedleRun]) -> dict[str, Any]:
    """The sparse model's answer, and what became of the attention that the dense model pays to the needle."""
    run = run_task(pair.traced, task, config)
    return {
        "config": as_json(config),
        "k": budget_of(config),
        "answer": run.output,
        "right": task.score(run.output) == 1,
        "pruned": run.pruned,
        "pruned of causal": run.pruned_causal,
        "needle attention kept": run.retained(dense()),
    }


@torch.inference_mode()
def dense_answer(pair: Pair, task: NeedleTask) -> NeedleRun:
    """Greedy, in as many tokens as the right one has; attention of the rows that decide its digits."""
    ids = torch.tensor([pair.tokenizer(task.prompt)["input_ids"]])
    positions = torch.cat([torch.arange(span.start, span.stop) for span in task.needles])
    pair.dense.set_attn_implementation("sdpa")
    before = pair.dense(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    pair.dense.set_attn_implementation("eager")  # which gives attention; of one row it costs nothing
    tokens: list[int] = []
    attention: list[Tensor] = []
    last = ids[:, -1:]
    for _ in range(answer_tokens(pair.tokenizer, task)):
        out = pair.dense(last, past_key_values=before, use_cache=True, output_attentions=True)
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        if any(character.isdigit() for character in pair.tokenizer.decode(last[0])):
            length = ids.shape[1] + len(tokens)
            attention.append(torch.stack([on_needle(x[0, :, 0], positions, length) for x in out.attentions]))
        tokens.append(int(last))
    rows_of_digits = torch.stack(attention, 1) if attention else torch.zeros(0, 0, 0, 0)
    output = pair.tokenizer.decode(tokens, skip_special_tokens=True)
    return NeedleRun(output, rows_of_digits, torch.ones_like(rows_of_digits, dtype=torch.bool), 0.0, 0.0)


def on_needle(row: Tensor, positions: Tensor, length: int) -> Tensor:
    """A row's probabilities `[head, needle_pos]`; zero before the keys that a window's cache still holds."""
    keys = positions - (length - row.shape[-1])
    return torch.where(keys >= 0, row[:, keys.clamp(min=0)], 0.0)


def mean_blocks(config: StreamConfig, tokens: int) -> int:
    """The constant number of square blocks that hold as many keys as a budget by position does, over the rows of a text."""
    blocks = range(1, -(-tokens // config.block_k) + 1)
    return max(1, round(fmean(config.budget.blocks(readable) for readable in blocks) * config.block_k / BLOCK))


def looked(pair: Pair, task: NeedleTask, config: StreamConfig) -> dict[str, Any]:
    """A wrong answer: would twice the budget do, and does a recheck of the run that gave it doubt it?"""
    twice = run_task(pair.traced, task, replace(config, k=config.budget.doubled()))
    output = run_task(pair.traced, task, config).output
    prompt = pair.tokenizer(task.prompt)["input_ids"]
    text = torch.tensor([pair.tokenizer(task.prompt + output)["input_ids"]])
    said = text.shape[1] - len(prompt)
    with torch.inference_mode():
        _, run = pair.traced.run_with_sparse_cache(text, config=config, logits_to_keep=said + 1)
        audit = tl_stream.recheck(pair.traced, text, run, rows=said + 1, sample=0)
    return {
        "answer": output,
        "expected": task.answer,
        "twice the budget": twice.output,
        "twice is right": task.score(twice.output) == 1,
        "pruned, twice": twice.pruned,
        "chance of another answer": audit.answers[0].flip_chance,
        "doubted": not audit.answers[0].trusted,
    }


def tables(cases: list[dict[str, Any]]) -> list[Any]:
    """All of them, as report.py shows them."""
    return [table(cases), by_task(cases), searches(cases), failures(cases)]


def table(cases: list[dict[str, Any]]) -> Any:
    """How often the sparse answer is right where the dense one is, by model, run and length, and over all."""
    lines = []
    for candidate in (*RUNS.values(), PAPER):
        own = [row for row in cases if row["what"] == candidate.name]
        groups = [(row["model"], row["tokens"]) for row in own]
        lines += [
            line(candidate, model, str(tokens), [row for row in own if (row["model"], row["tokens"]) == (model, tokens)])
            for model, tokens in sorted(set(groups))
        ]
        for model in sorted({row["model"] for row in own}):
            lines.append(line(candidate, model, "all", [row for row in own if row["model"] == model]))
        if own:
            lines.append(line(candidate, "all", "all", own))
    title = "Needles: right answers of the sparse model where the dense model is right"
    header = ("run", "model", "tokens", "texts", "right", "share", "95 %", "pruned", "of all causal", "needle attention kept")
    return records.table(title, header, lines)


def line(candidate: Candidate, model: str, tokens: str, own: list[dict[str, Any]]) -> tuple[Any, ...]:
    right = sum(row["right"] for row in own)
    low, high = wilson(right / len(own), len(own))
    means = [fmean(row[name] for row in own) for name in ("pruned", "pruned of causal", "needle attention kept")]
    return (candidate.name, model, tokens, len(own), right, right / len(own), f"{low:.3f} to {high:.3f}", *means)


def by_task(cases: list[dict[str, Any]]) -> Any:
    """How often the dense model is right, and the sparse ones where that is."""
    dense = [row for row in cases if row["what"] == "dense"]
    lines = []
    for model, task in sorted({(row["model"], row["task"]) for row in dense}):
        here = [row for row in cases if (row["model"], row.get("task")) == (model, task)]
        found = [[row["right"] for row in here if row["what"] == what] for what in ("dense", *names_of_runs())]
        lines.append((model, task, *(f"{sum(each)} of {len(each)}" for each in found)))
    return records.table("By task", ("model", "task", "dense right", *(f"then {name}" for name in names_of_runs())), lines)


def names_of_runs() -> list[str]:
    return [candidate.name for candidate in RUNS.values()]


def searches(cases: list[dict[str, Any]]) -> Any:
    """The budgets, found on other texts."""
    names = ("model", "run", "k", "texts", "tokens", "pruned", "matched")
    lines = [[row[name] for name in names] for row in cases if row["what"] == "search"]
    return records.table("Budgets found", (*names[:-1], "criterion"), lines)


def failures(cases: list[dict[str, Any]]) -> Any:
    """The wrong answers of the sparse model where the dense one is right, looked into."""
    kept = {
        (row["model"], row["what"], row["number"]): row["needle attention kept"]
        for row in cases
        if "config" in row and "number" in row
    }
    names = ("model", "run", "task", "tokens", "depth", "expected", "answer", "twice the budget")
    lines = [
        (*(row[name] for name in names), kept[row["model"], row["run"], row["number"]], row["chance of another answer"])
        for row in cases
        if row["what"] == "look"
    ]
    return records.table("Wrong answers", (*names, "needle kept", "recheck's chance"), lines)


if __name__ == "__main__":
    raise SystemExit(main())

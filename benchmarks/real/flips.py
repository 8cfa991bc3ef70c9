"""Do sparse runs of a real model flip its answers, do a few inserted tokens, and does the audit know?

    PYTHONPATH=benchmarks python -m real.flips FOLDER ROWS [--questions N] [--tokens N] [--trials N] [--k N]

A case is a passage of the held-out Jargon File with a question about it that has a short answer, in the tokenizer's chat
template where there is one. `tl_stream.find_flips` searches for 3 random tokens before the passage after which the sparse
model's answer is another one, while the dense model's stays. What it claims is then checked by transformers alone (eager
attention, T x T tensors): the dense answer by greedy generation, and every run's answer by one forward pass, for sparse runs
with the dense masks of the blocks that they kept. Each case is a row appended to ROWS; an interrupted study reads those.

`audit_table` is of other rows, benchmarks/verdict.jsonl: next tokens that sparse attention flipped, and what the audit said.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import verdict
from paper_studies.loading import tokens_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from real.common import load, once, rows, versions
from tl_stream import StreamConfig
from tl_stream.analysis import find_flips
from tl_stream.analysis.flip_result import Flip
from tl_stream.audit import records
from tl_stream.audit.verdict import ALONE, DOUBT, RECHECKED, Logistic
from tl_stream.cache import is_pattern
from tl_stream.tasks import chat_prompt

QUESTIONS = (
    "Is the text above from a dictionary or from a novel? Answer with one word.",
    "Is the text above about computers or about cooking? Answer with one word.",
    "Is the text above in English or in French? Answer with one word.",
    "Is the tone of the text above serious or humorous? Answer with one word.",
)
BLOCK = 16
INSERTED = 3
ESTIMATORS = ("auto", "stream")
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a model, as save_pretrained writes it")
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of each passage (%(default)s)")
    parser.add_argument("--trials", type=int, default=16, help="insertions to try (%(default)s)")
    parser.add_argument("--k", type=int, default=3, help="kept blocks a row; twice as many for stream (%(default)s)")
    options = parser.parse_args()
    model, name = load(options.folder), Path(options.folder).name
    independent = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="eager").eval()
    cases = [(number, estimator) for number in range(options.questions) for estimator in ESTIMATORS]
    for number, estimator in tqdm(cases, file=sys.stderr):
        k = options.k * (2 if estimator == "stream" else 1)
        about = {"model": name, "passage": options.tokens, "number": number, "estimator": estimator, "k": k}
        about["trials"] = options.trials
        config = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=k, estimator=estimator)
        once(options.rows, about, partial(case, model, independent, options.tokens, number, config, options.trials))
    Console(width=160).print(table(rows(options.rows)))
    return 0


@torch.no_grad()
def case(model: Any, independent: Any, length: int, number: int, config: StreamConfig, trials: int) -> Row:
    """One question: what the search claims, and whether transformers says the same of every run."""
    start = time.perf_counter()
    text, position = asked(model, length, number)
    options: dict[str, Any] = {"trials": trials, "n_tokens": INSERTED, "batch_size": 4, "position": position}
    (flip,) = find_flips(model, [text], config, seed=number, progress=False, **options).prompts
    claims = {name: run.same for name, run in flip.runs.items()}
    seen = {name: same_answer(model, independent, text, position, flip, name, config) for name in claims}
    return {
        "tokens": text.shape[1],
        "answer": model.tokenizer.decode(flip.answer),
        "inserted": list(flip.inserted),
        "tried": flip.tried,
        "flips without tokens": not flip.sparse.same,
        "found": flip.found,
        "by sparsity alone": flip.is_artefact,
        "claims": claims,
        "transformers": seen,
        "same dense answer": generated(independent, text, len(flip.answer)) == flip.answer,
        "chances": {name: [round(run.chance, 4), round(run.chance_rechecked, 4)] for name, run in flip.runs.items()},
        "pruned": flip.sparse.pruned,
        "seconds": time.perf_counter() - start,
        "versions": versions(),
    }


def asked(model: Any, length: int, number: int) -> tuple[Tensor, int]:
    """A passage and a question on it, as tokens, and the position of the passage's first token."""
    part = verdict.passage(length + 40, random.Random(number))
    part = part[: model.tokenizer(part, return_offsets_mapping=True)["offset_mapping"][length - 1][1]]
    message = f"{part}\n\n{QUESTIONS[number]}"
    text = chat_prompt(model.tokenizer, message) if model.tokenizer.chat_template else f"{message}\nAnswer:"
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first = text.index(message)
    return tokens_of(model, text), next(i for i, (_, stop) in enumerate(offsets) if stop > first)


def generated(independent: Any, text: Tensor, n: int) -> tuple[int, ...]:
    """The n tokens that transformers itself generates greedily."""
    options = {"max_new_tokens": n, "do_sample": False, "attention_mask": torch.ones_like(text)}
    return tuple(independent.generate(text, **options)[0, text.shape[1] :].tolist())


def same_answer(model: Any, independent: Any, text: Tensor, position: int, flip: Flip, name: str, config: StreamConfig) -> bool:
    """Whether a run gives the dense answer, by transformers: dense, or dense masked with the blocks that the run kept."""
    run, answer = flip.runs[name], torch.tensor(flip.answer)
    inserted = torch.tensor([flip.inserted if name != "sparse" else ()], dtype=text.dtype)
    whole = torch.cat([text[:, :position], inserted, text[:, position:], answer[None, :-1]], 1)
    handles = []
    if run.k is not None:
        kept = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=run.k, estimator=config.estimator)
        _, cache = model.run_with_sparse_cache(whole, config=kept, logits_to_keep=1, names_filter=is_pattern)
        for layer, module in enumerate(independent.model.layers):
            mask = torch.where(cache.block_layout(layer).to_dense(), 0.0, -torch.inf)
            handles.append(module.self_attn.register_forward_pre_hook(masked(mask), with_kwargs=True))
    try:
        logits = independent(whole).logits[0, -len(answer) :]
    finally:
        for handle in handles:
            handle.remove()
    return bool((logits.argmax(-1) == answer).all())


def masked(mask: Tensor) -> Any:
    """A hook that gives an attention module this mask in the place of the one it is called with."""
    return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})


def table(cases: list[Row]) -> Table:
    """For each model and estimator: how many answers flip, by themselves and by tokens, and how many claims hold."""
    lines = []
    for model, estimator in dict.fromkeys((row["model"], row["estimator"]) for row in cases):
        part = [row for row in cases if (row["model"], row["estimator"]) == (model, estimator)]
        runs = [row["claims"][name] == row["transformers"][name] for row in part for name in row["claims"]]
        held = f"{sum(runs)} of {len(runs)}"
        dense = f"{sum(row['same dense answer'] for row in part)} of {len(part)}"
        pruned = sum(row["pruned"] for row in part) / len(part)
        counts = [sum(row[name] for row in part) for name in ("flips without tokens", "found", "by sparsity alone")]
        lengths = sorted(row["tokens"] for row in part)
        tokens = f"{lengths[0]} to {lengths[-1]}"
        lines.append((model, estimator, part[0]["k"], tokens, pruned, len(part), *counts, dense, held))
    header = ("model", "estimator", "k", "tokens", "pruned", "questions", "flip without tokens", "flip by tokens")
    title = "Flips, found and checked by transformers alone"
    return records.table(title, (*header, "of these by sparsity alone", "dense answers that hold", "runs that hold"), lines)


def audit_table(runs: list[Row]) -> Table:
    """Flipped next tokens of real models, and how the audit tells them, from the rows of benchmarks/verdict.jsonl."""
    real = [row for row in runs if row["model"] not in verdict.BUNDLED]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in real:
        groups.setdefault((row["model"], row["kind"], row["seed"] >= verdict.FIRST_LONG, row["estimator"]), []).append(row)
    lines = []
    for (model, kind, _, estimator), part in sorted(groups.items(), key=lambda group: group[0]):
        lengths = sorted(row["tokens"] for row in part)
        tokens = f"{lengths[0]} to {lengths[-1]}"
        alone, again = told(part, ALONE), told(part, RECHECKED)
        found = [cell for name in ("caught", "false alarms", "AUC") for cell in (alone[name], again[name])]
        lines.append((model, kind, tokens, estimator, alone["tokens"], alone["flipped"], *found))
    numbers = [f"{name}, {how}" for name in ("caught", "false alarms", "AUC") for how in ("in the run", "rechecked")]
    title = (
        f"{sum(len(row['flipped']) for row in real)} next tokens of {len(real)} sparse runs (coefficients fitted on smollm2)"
    )
    return records.table(title, ("model", "kind", "tokens", "estimator", "next tokens", "flipped", *numbers), lines)


def told(part: list[Row], function: Logistic) -> Row:
    """What a function of the audit tells of some runs' next tokens."""
    score = next(each for each in verdict.SCORES if each.in_use is function)
    features, flipped = verdict.known(part, score)
    found = verdict.told(function(*features.unbind(-1)), flipped, DOUBT)
    return found | {"AUC": found["AUC"] if 0 < found["flipped"] < found["tokens"] else None}


if __name__ == "__main__":
    raise SystemExit(main())

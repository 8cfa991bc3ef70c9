"""Does the audit know when a sparse answer flipped? The threshold of its verdict on an answer's rows comes from here.

    python benchmarks/audit_roc.py [--quick] [--json FILE] [--html FILE]

The bundled model reads prompts of four tasks, half of them after three random tokens (a search over such prefixes is how
answers of the sparse model are flipped on purpose), followed by the dense model's own greedy answer. Each text is traced with
many small budgets, with the default choice of blocks, the paper's (means of keys), and two that don't look at the keys. An
answer flipped where the most likely token differs from the dense model's at any of its rows.

The audit, which sees the sparse run alone, knows of each row which share of its full softmax was lost (mean over all layers
and heads), and by how much the run's next token leads there, in probability. A recheck (one more sparse run, on the same
blocks, in which the answer's rows read everything) knows by how much that token leads then. An answer's score is the greatest
of its rows, of the lost mass, of lost mass / lead, and of lost mass / the lesser of both leads. AUC is the probability that a
flipped answer has more than one that stayed, ties counting half; "k alone" is how well the known number of kept keys does. The
thresholds are those that flag the most flips and at most a tenth of the others, on half of the seeds; their rates are those of
the other half.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.audit.verdict import DOUBT_THRESHOLD, ROW_THRESHOLD
from tl_stream.cache import is_pattern
from tl_stream.tasks import niah, reasoning_trace, variable_tracking

TOKENS = 1024
SENTENCES = 100
FIRST_SEED = 10_000
SCORES = {"lost": "lost mass", "doubt": "lost mass / lead", "recheck": "lost mass / lesser lead, rechecked"}
IN_USE = {"lost": 1 - ROW_THRESHOLD, "doubt": DOUBT_THRESHOLD, "recheck": DOUBT_THRESHOLD}
KINDS = ("dual", "stream", "window", "random")
FALSE_ALARMS = 0.1
CONFIGS = [
    StreamConfig(block_q=block, block_k=block, k=k, estimator=estimator, seed=0)
    for estimator, blocks, budgets in (
        ("dual", (8, 32), (1, 2, 4, 8)),
        ("stream", (8,), (16, 32)),
        ("stream", (32,), (4, 8)),
        ("window", (32,), (16,)),
        ("random", (32,), (16,)),
    )
    for block in blocks
    for k in budgets
]


def texts(tokenizer: Any, seed: int) -> Iterator[tuple[str, str, int]]:
    """Task, prompt and number of answer tokens."""
    for keys in (1, 4):
        task = niah(tokenizer, TOKENS, depth=seed % 7 / 6, keys=keys, seed=seed)
        yield f"niah, {keys} keys", task.prompt, len(task.value)
    tracking = variable_tracking(tokenizer, TOKENS, seed=seed)
    yield "variable tracking", tracking.prompt, len(tracking.variables)
    yield "reasoning trace", reasoning_trace(tokenizer, SENTENCES, seed=seed).prompt, 1


def prefixed(prompt: Tensor, seed: int, vocabulary: int) -> Tensor:
    """On odd seeds, three random tokens after the first one."""
    if seed % 2 == 0:
        return prompt
    extra = torch.randint(3, vocabulary, (1, 3), generator=torch.Generator().manual_seed(seed))
    return torch.cat([prompt[:, :1], extra, prompt[:, 1:]], 1)


def measure(model: Any, dense: Any, seed: int) -> Iterator[dict[str, Any]]:
    for name, prompt, n in texts(model.tokenizer, seed):
        tokens = prefixed(model.to_tokens(prompt), seed, model.cfg.d_vocab)
        text = dense.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False)[:, : tokens.shape[1] + n - 1]
        expected = dense(text, logits_to_keep=n).logits.argmax(-1)
        for config in CONFIGS:
            logits, cache = model.run_with_sparse_cache(text, config=config, logits_to_keep=n, names_filter=is_pattern)
            alone = cache.audit(rows=n, sample=0).answers[0]
            audited = tl_stream.recheck(model, text, cache, rows=n, sample=0).answers[0]
            flipped = (logits.argmax(-1) != expected)[0].tolist()
            yield {
                "task": name,
                "seed": seed,
                "block": config.block_k,
                "k": config.k,
                "estimator": config.estimator,
                "retained": audited.retained,
                "lead": audited.lead,
                "reread": audited.reread,
                "flipped": flipped,
                "lost": 1 - min(alone.retained),
                "doubt": max(alone.doubt or ()),
                "recheck": max(audited.doubt or ()),
                "flip": any(flipped),
            }


def auc(rows: list[dict[str, Any]], scores: list[float]) -> float:
    """Probability that a flipped answer has the higher score."""
    flip, score = torch.tensor([row["flip"] for row in rows]), torch.tensor(scores, dtype=torch.float64)
    high, low = score[flip][:, None], score[~flip]
    return float(((high > low).double() + (high == low).double() / 2).mean())


def curve(rows: list[dict[str, Any]], score: str) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, and the shares of flipped and of other answers above each."""
    flip, scores = torch.tensor([row["flip"] for row in rows]), torch.tensor([row[score] for row in rows])
    thresholds = torch.linspace(0, 2, 401)
    above = scores > thresholds[:, None]
    return thresholds, above[:, flip].double().mean(1), above[:, ~flip].double().mean(1)


def verdict(rows: list[dict[str, Any]], score: str) -> dict[str, dict[str, float]]:
    """What the threshold chosen on half of the seeds flags in the other half; and what the one that the audit uses does."""
    thresholds, _, false = curve([row for row in rows if row["seed"] % 4 < 2], score)
    chosen = float(thresholds[int((false <= FALSE_ALARMS).nonzero().min())])
    held = [row for row in rows if row["seed"] % 4 >= 2]
    return {"chosen here": flagged(held, score, chosen), "the audit's": flagged(held, score, IN_USE[score])}


def flagged(rows: list[dict[str, Any]], score: str, threshold: float) -> dict[str, float]:
    shares = {
        name: [row[score] > threshold for row in rows if row["flip"] == flip]
        for name, flip in (("flagged_of_flipped", True), ("flagged_of_others", False))
    }
    return {"threshold": threshold, **{name: sum(flags) / len(flags) for name, flags in shares.items()}}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    groups = {"all": rows, **{name: [r for r in rows if r["task"] == name] for name in sorted({r["task"] for r in rows})}}
    groups |= {f"{kind} blocks": [r for r in rows if r["estimator"] == kind] for kind in KINDS}
    return {
        "verdicts": {score: verdict(rows, score) for score in SCORES},
        "groups": {name: group(part) for name, part in groups.items()},
    }


def group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    flips = sum(row["flip"] for row in rows)
    mixed = 0 < flips < len(rows)
    return {
        "answers": len(rows),
        "flips": flips,
        **{f"auc_of_{score}": auc(rows, [row[score] for row in rows]) if mixed else None for score in SCORES},
        "auc_of_k": auc(rows, [-row["k"] * row["block"] for row in rows]) if mixed else None,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title="Flipped answers, told from the sparse run alone")
    for column in ("answers of", "number", "flipped", *(f"AUC of {name}" for name in (*SCORES.values(), "k alone"))):
        table.add_column(column, justify="right")
    for name, part in result["groups"].items():
        figures = ("-" if part[f"auc_of_{key}"] is None else f"{part[f'auc_of_{key}']:.3f}" for key in (*SCORES, "k"))
        table.add_row(name, str(part["answers"]), str(part["flips"]), *figures)
    Console().print(table)
    for score, verdicts in result["verdicts"].items():
        for name, found in verdicts.items():
            Console().print(
                f"{SCORES[score]} above {found['threshold']:.3f} ({name}): on the other half of the seeds "
                f"{found['flagged_of_flipped']:.1%} of the flipped answers and {found['flagged_of_others']:.1%} of the others."
            )


def drawn(rows: list[dict[str, Any]], result: dict[str, Any]) -> go.Figure:
    made = go.Figure()
    parts = [("all", score) for score in SCORES] + [(task, "recheck") for task in sorted({row["task"] for row in rows})]
    for name, score in parts:
        part = [row for row in rows if name in ("all", row["task"])]
        area = result["groups"][name][f"auc_of_{score}"]
        if area is not None:
            thresholds, hit, false = curve(part, score)
            label = f"{name}: {SCORES[score]} (AUC {area:.3f})"
            made.add_scatter(x=false.tolist(), y=hit.tolist(), text=[f"above {t:.3f}" for t in thresholds], name=label)
    for score, verdicts in result["verdicts"].items():
        found = verdicts["the audit's"]
        made.add_scatter(
            x=[found["flagged_of_others"]], y=[found["flagged_of_flipped"]], mode="markers", marker_size=12,
            name=f"{SCORES[score]} above {found['threshold']:.3f}, on unseen seeds",
        )  # fmt: skip
    return made.update_layout(
        title="Flipped answers told from the sparse run alone",
        xaxis_title="share of unflipped answers flagged",
        yaxis_title="share of flipped answers flagged",
        template="plotly_white",
    )


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 seeds instead of 16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer and the figures there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the ROC curves there")
    options = parser.parse_args()
    model: Any = tl_stream.models.load()
    dense = tl_stream.models.load(host="hf")
    seeds = range(FIRST_SEED, FIRST_SEED + (4 if options.quick else 16))
    rows = [row for seed in tqdm(seeds, desc="seeds", file=sys.stderr) for row in measure(model, dense, seed)]
    result = summary(rows)
    show(result)
    if options.json:
        options.json.write_text(json.dumps({**result, "rows": rows}, indent=1))
    if options.html:
        drawn(rows, result).write_html(options.html, include_plotlyjs="cdn")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

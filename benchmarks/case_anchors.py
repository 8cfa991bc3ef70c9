"""Thought anchors on reasoning traces whose dependencies are known: 200 sentences, 2,225 tokens or so, 97 % pruned.

Two sparse models with the same number of kept keys a row: the paper's (blocks of 8 x 8, 4 of them) and single keys
(block_q = 1, block_k = 1, 32 of them). For each:
- the vertical scores and receiver heads of sparse runs, and of exact forwards that record as much, against the dense model's;
- the effects of suppressing each sentence against the dense model's;
- how often the sentences that a derivation uses are those whose suppression changes the row that states its value the most.
"""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from typing import Any

import pandas
import torch
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import (
    AnchorSettings,
    ReceiverHeads,
    Segments,
    VerticalScores,
    receiver_heads,
    suppression,
    vertical_scores,
)
from tl_stream.cache import is_pattern
from tl_stream.fidelity.runs import dense_config
from tl_stream.tasks import ReasoningTask

CONFIGS = {
    "8 x 8, k = 4": StreamConfig(block_q=8, block_k=8, k=4),
    "1 x 1, k = 32": StreamConfig(block_q=1, block_k=1, k=32),
}
SETTINGS = AnchorSettings(n_heads=3)  # of 16: the bundled model has no 20 heads to choose
FIRST_SEED = 100  # single keys, the number of heads and the value's row were chosen on the traces 0 to 2
LONG = StreamConfig(block_q=32, block_k=32, k=16)
LONG_TOKENS = 16_384


def anchors(quick: bool) -> dict[str, Any]:
    """The study."""
    model: Any = tl_stream.models.load()
    memory = long_text(model)  # first, since the peak is that of the whole process
    sentences, traces, suppressed = (60, 1, 1) if quick else (200, 3, 1)
    seeds = range(FIRST_SEED, FIRST_SEED + traces)
    tasks = [tl_stream.tasks.reasoning_trace(model.tokenizer, sentences, seed=seed) for seed in seeds]
    figures: dict[str, Any] = {
        "tokens": [len(model.tokenizer(task.text)["input_ids"]) for task in tasks],
        "receivers": receivers(model, tasks),
        "suppression": [row for task in tasks[:suppressed] for row in suppressions(model, task)],
        "long": memory,
    }
    return {"summary": {name: figures[name] for name in ("receivers", "suppression", "long")}, **figures}


def receivers(model: Any, tasks: list[ReasoningTask]) -> list[dict[str, Any]]:
    """Vertical scores of every config, sparse and recorded, against the dense model's."""
    truth = [scores(model, task, dense_config(StreamConfig())) for task in tasks]
    dense = receiver_heads(truth, settings=SETTINGS)
    rows = [receiver_row("dense", truth, truth, dense)]
    for name, config in CONFIGS.items():
        for forward in ("sparse", "exact"):
            found = [scores(model, task, replace(config, forward=forward)) for task in tasks]
            rows.append(receiver_row(f"{name}, {forward}", found, truth, dense))
    return rows


def scores(model: Any, task: ReasoningTask, config: StreamConfig) -> VerticalScores:
    _, cache = model.run_with_sparse_cache(task.text, config=config, names_filter=is_pattern, logits_to_keep=1)
    return vertical_scores(cache, task.sentences, settings=SETTINGS)


def receiver_row(
    name: str,
    found: list[VerticalScores],
    truth: list[VerticalScores],
    dense: ReceiverHeads,
    settings: AnchorSettings = SETTINGS,
) -> dict[str, Any]:
    own = receiver_heads(found, settings=settings)
    pairs = list(zip(found, truth, strict=True))
    return {
        "run": name,
        "pruned": min(each.pruned for each in found),
        "receiver heads": " ".join(f"L{layer}H{head}" for layer, head in own.heads),
        "top 1 same": own.heads[0] == dense.heads[0],
        "of the dense model's": len({*own.heads} & {*dense.heads}) / len(dense.heads),
        "Spearman, own heads": [spearman(own.sentence_scores(a), dense.sentence_scores(b)) for a, b in pairs],
        "Spearman, dense heads": [spearman(dense.sentence_scores(a), dense.sentence_scores(b)) for a, b in pairs],
        "Spearman, all heads": [spearman(a.values.mean((0, 1)), b.values.mean((0, 1))) for a, b in pairs],
        "reliability": own.reliability if len(found) > 1 else None,
    }


def suppressions(model: Any, task: ReasoningTask) -> list[dict[str, Any]]:
    """Suppression of every sentence, dense and sparse, with the paper's settings; effects of each row on its own."""
    rows, truth = [], None
    n_tokens = len(model.tokenizer(task.text)["input_ids"])
    segments = Segments.of(task.sentences, n_tokens)
    later = segments.starts()[:, None] >= segments.starts() + segments.lengths()
    for name, config in {"dense": None, **CONFIGS}.items():
        start = time.perf_counter()
        found = suppression(
            model, task.text, task.sentences, config=config, targets=[(i, i + 1) for i in range(n_tokens)], settings=SETTINGS
        )
        log_kl = found.effects
        kinds = {"log KL": log_kl, "KL": log_kl.exp() - 1e-9}
        matrices = {
            kind: segments.means(x.nan_to_num(0.0).T).T.masked_fill(~later, torch.nan)[:, :-1] for kind, x in kinds.items()
        }
        truth = truth or matrices
        for kind, matrix in matrices.items():
            rows.append(
                {
                    "run": name,
                    "effect": kind,
                    "pruned": found.pruned,
                    "Spearman, sentence scores": spearman(matrix.nanmean(0), truth[kind].nanmean(0)),
                    "Spearman, all pairs": spearman(matrix, truth[kind]),
                    "antecedents on top: value's row": antecedents_on_top(task, kinds[kind], at_value=True),
                    "whole sentence": antecedents_on_top(task, matrix, at_value=False),
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def antecedents_on_top(task: ReasoningTask, effects: Tensor, at_value: bool) -> float:
    """Share of derivations whose n antecedents are the n sentences with the greatest effect."""
    derivations = [(i, each) for i, each in enumerate(task.sentences) if each.kind == "derivation" and each.value_span]
    hits = 0
    for index, sentence in derivations:
        assert sentence.value_span is not None
        row = effects[sentence.value_span.start - 1 if at_value else index].nan_to_num(-torch.inf)
        hits += set(row.topk(len(sentence.antecedents)).indices.tolist()) == set(sentence.antecedents)
    return hits / len(derivations)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation where both are numbers, ties sharing their mean rank; NaN where either is constant."""
    table = pandas.DataFrame({"a": a.flatten().cpu().numpy(), "b": b.flatten().cpu().numpy()}).dropna().rank()
    return float(table["a"].corr(table["b"]))


def long_text(model: Any) -> dict[str, Any]:
    """Scores of 16k tokens: seconds, and the greatest memory of the process so far (the model and torch included)."""
    prompt = tl_stream.tasks.niah_single_1(model.tokenizer, LONG_TOKENS, depth=0.4, seed=0).prompt
    start = time.perf_counter()
    parts = tl_stream.analysis.sentences(prompt, model)
    _, cache = model.run_with_sparse_cache(prompt, config=LONG, names_filter=is_pattern, logits_to_keep=1)
    found = receiver_heads(vertical_scores(cache, parts))
    return {
        "tokens": LONG_TOKENS,
        "sentences": len(parts),
        "pruned": cache.pruned,
        "heads": len(found.heads),
        "seconds": time.perf_counter() - start,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }

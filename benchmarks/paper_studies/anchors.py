"""The thought-anchor study: which sentences of a reasoning trace matter, sparse against dense (arXiv:2510.19875, section 4).

1. Traces: of the model's own, or given ones.
2. The paper's smallest budget with which the two tokens with text after each trace are the dense model's (blocks of 32); and
   this package's finer blocks, with a budget that grows as the square root of the position and isn't searched for.
3. What each keeps: retained mass and outputs against the dense model's.
4. Vertical scores, their kurtosis and receiver heads (arXiv:2506.19143), of the sparse models, and of the real model as far as
   an exact forward records it, against those of the real model with all its entries.
5. Suppression of some sentences on the first trace, with the real model and with both sparse ones.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from case_anchors import receiver_row, spearman
from tqdm import tqdm

import tl_stream
from paper_studies.configs import budget_of, paper
from paper_studies.finished import Finished, digest
from paper_studies.traces import Trace
from tl_stream import StreamConfig
from tl_stream.analysis import PAPER, AnchorSettings, VerticalScores, receiver_heads, suppression, vertical_scores
from tl_stream.analysis.needle_store import as_json
from tl_stream.budget import Sqrt
from tl_stream.cache import is_pattern
from tl_stream.fidelity.runs import dense_config

OURS = StreamConfig(block_q=1, block_k=1, k=Sqrt(1.0))
FIDELITY_ROWS = 256
BEGINNING = 120  # characters of a trace that its row shows
SPEAKS_OF = {"sparse": "the sparse model", "exact": "the real model, recorded entries"}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TraceSettings:
    """How large the study is.

    Args:
        traces: How many are generated.
        new_tokens: Tokens of each, at most.
        thoughts: How they begin.
        block: The paper's b.
        ours: This package's.
        scoring: The settings of Thought Anchors.
        sources: How many sentences are suppressed, evenly spaced.
    """

    traces: int = 3
    new_tokens: int = 10_000
    thoughts: str = ""
    block: int = 32
    ours: StreamConfig = OURS
    scoring: AnchorSettings = PAPER
    sources: int = 32


def anchors_study(model: Any, traces: list[Trace], settings: TraceSettings, finished: Finished) -> dict[str, Rows]:
    """Rows of its tables: "traces", "fidelity", "receivers", "suppression".

    Args:
        model: A bridge with its tokenizer.
        traces: What it reads.
        settings: The study's size.
        finished: What is done already: an interrupted study goes on.

    Raises:
        ValueError: As `tl_stream.find_budget`, `vertical_scores` and `suppression`.
    """
    searches = [searched(model, trace, settings, finished) for trace in traces]
    by_trace = [sparse_models(search, settings) for search in searches]
    rows = [
        finished.once(
            "fidelity",
            {"run": name, "trace": trace.name, "tokens": digest(trace.tokens), "config": as_json(config)},
            partial(fidelity_row, model, trace, name, config),
        )
        | {"matched": search["matched"] if name == search["run"] else "not searched"}
        for trace, search, configs in zip(traces, searches, by_trace, strict=True)
        for name, config in configs.items()
    ]
    about = {
        "tokens": [digest(trace.tokens) for trace in traces],
        "configs": [[as_json(config) for config in configs.values()] for configs in by_trace],
        "scoring": asdict(settings.scoring),
    }
    first = {**about, "sources": settings.sources}
    return {
        "traces": [trace_row(trace) for trace in traces],
        "fidelity": rows,
        "receivers": finished.once("receivers", about, partial(receivers, model, traces, by_trace, settings.scoring)),
        "suppression": finished.once("suppression", first, partial(suppressions, model, traces[0], by_trace[0], settings)),
    }


def trace_row(trace: Trace) -> dict[str, Any]:
    """Which text it was, without the text."""
    first, last = trace.sentences[0], trace.sentences[-1]
    return {
        "trace": trace.name,
        "tokens": trace.tokens.shape[1],
        "of sentences": last.span.stop - first.span.start,
        "sentences": len(trace.sentences),
        "repeated": len(trace.sentences) - len({each.text for each in trace.sentences}),
        "digest": digest(trace.tokens),
        "begins": first.text[:BEGINNING],
    }


def searched(model: Any, trace: Trace, settings: TraceSettings, finished: Finished) -> dict[str, Any]:
    """The paper's smallest budget on one trace."""
    candidate = paper(settings.block)

    def compute() -> dict[str, Any]:
        search = candidate.search(model, trace.tokens)
        assert search.best is not None, "a budget that covers everything is the dense model"
        return {
            "run": candidate.name,
            "k": budget_of(search.config),
            "pruned": search.best.pruned,
            "matched": search.criterion,
            "budget": search.best.budget,
        }

    return finished.once("search", candidate.about(trace.tokens), compute)


def sparse_models(search: dict[str, Any], settings: TraceSettings) -> dict[str, StreamConfig]:
    """The configs to compare on one trace."""
    return {search["run"]: paper(settings.block).vary(search["budget"]), f"ours, b = {settings.ours.block_k}": settings.ours}


def fidelity_row(model: Any, trace: Trace, name: str, config: StreamConfig) -> dict[str, Any]:
    """What one sparse model loses on one trace."""
    report = tl_stream.fidelity(model, trace.tokens, config, rows=FIDELITY_ROWS, new_tokens=2)
    return {
        "trace": trace.name,
        "tokens": report.tokens,
        "sentences": len(trace.sentences),
        "run": name,
        "k": budget_of(config),
        "pruned": report.pruned,
        "mass kept": fmean(head.retained_mean for head in report.heads),
        "worst head": min(head.retained_mean for head in report.heads),
        "KL": report.output.kl_mean,
        "same top token": report.output.top_1,
        "next two": report.output.next_n,
        "exact for": SPEAKS_OF[config.forward],
    }


def receivers(model: Any, traces: list[Trace], by_trace: list[dict[str, StreamConfig]], scoring: AnchorSettings) -> Rows:
    """Vertical scores and receiver heads of every run against the real model's."""
    runs: dict[str, list[StreamConfig]] = {"dense": [dense_config(StreamConfig())] * len(traces)}
    for name in by_trace[0]:
        for forward in SPEAKS_OF:
            configs = [replace(each[name], forward=forward) for each in by_trace]
            runs[name if forward == "sparse" else f"{name}, recorded"] = configs
    found = {}
    for name, configs in tqdm(runs.items(), desc="vertical scores", file=sys.stderr):
        found[name] = [scores(model, trace, config, scoring) for trace, config in zip(traces, configs, strict=True)]
    truth = found["dense"]
    dense = receiver_heads(truth, settings=scoring)
    rows = []
    for name, each in found.items():
        kurtosis = receiver_heads(each, settings=scoring).kurtosis
        row = receiver_row(name, each, truth, dense, scoring)
        said = "the real model" if name == "dense" else SPEAKS_OF[runs[name][0].forward]
        compared = int((kurtosis.isfinite() & dense.kurtosis.isfinite()).sum())
        row |= {"Spearman, kurtosis": spearman(kurtosis, dense.kurtosis), "of heads": f"{compared} of {kurtosis.numel()}"}
        rows.append({**row, "scored sentences": [trace.scored for trace in each], "exact for": said})
    return rows


def scores(model: Any, trace: Trace, config: StreamConfig, scoring: AnchorSettings) -> VerticalScores:
    _, cache = model.run_with_sparse_cache(trace.tokens, config=config, names_filter=is_pattern, logits_to_keep=1)
    return vertical_scores(cache, trace.sentences, settings=scoring)


def suppressions(model: Any, trace: Trace, configs: dict[str, StreamConfig], settings: TraceSettings) -> Rows:
    """The effect of suppressing some sentences of a trace."""
    parts = trace.sentences
    number = min(settings.sources, len(parts) - 1)
    sources = [round(i) for i in torch.linspace(0, len(parts) - 2, number).tolist()]
    rows, truth = [], None
    for name, config in {"dense": None, **configs}.items():
        start = time.perf_counter()
        found = suppression(model, trace.tokens, parts, config=config, sources=sources, batch_size=4, settings=settings.scoring)
        truth = truth or found
        tops = [(found.top_sources(i, 1), truth.top_sources(i, 1)) for i in range(sources[0] + 1, len(parts))]
        rows.append(
            {
                "run": name,
                "tokens": trace.tokens.shape[1],
                "suppressed": f"{len(sources)} of {len(parts)}",
                "pruned": found.pruned,
                "Spearman, sentence scores": spearman(found.scores, truth.scores),
                "Spearman, all pairs": spearman(found.effects, truth.effects),
                "same top source": fmean(own == dense for own, dense in tops),
                "seconds": time.perf_counter() - start,
                "exact for": found.exact_for,
                "scores": found.scores.tolist(),
            }
        )
    return rows

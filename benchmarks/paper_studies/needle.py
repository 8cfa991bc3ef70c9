"""The needle study: RULER's niah_single_2 (a number hidden in essays), by length and depth (arXiv:2510.19875, section 4).

For each length:

1. Each candidate's smallest budget with which the next two tokens that carry text are the dense model's, in a text for each
   depth, none of which is used again: what it prunes, and what the row that gives the answer keeps of its full softmax.
2. Greedy answers with these budgets to other texts, at all depths, beside the dense model's; and how much of the dense model's
   attention to the needle lies on kept blocks.

Then, on one text, the routes from the needle to the row that gives the answer, and whether cutting them changes that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import pandas
import torch
from torch import Tensor

import tl_stream
from paper_studies.configs import Candidate, budget_of, ours, paper
from paper_studies.finished import Finished, digest
from paper_studies.loading import check_context, tokens_of, up_to_answer
from tl_stream import StreamConfig
from tl_stream.analysis import cut_edges, flow_names, needle_grid, needle_routes, random_edges
from tl_stream.analysis.needle_store import as_json
from tl_stream.cache import is_pattern
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import NeedleTask, in_chat, niah_single_2

SEARCH_SEED = 0
GRID_SEED = 1
ANSWER_ROOM = 64
TOP_ROUTES = 5
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class NeedleSettings:
    """How large the study is.

    Args:
        lengths: Tokens of the prompts, the chat template's among them.
        depths: Of the needle, 0 to 1.
        samples: Texts of each length and depth.
        candidates: What is compared.
        route_length: Tokens of the text whose routes are followed, at most: the longest of `lengths` that isn't longer.
    """

    lengths: tuple[int, ...] = (4096, 8192, 16384, 20000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 2
    candidates: tuple[Candidate, ...] = (paper(32), paper(128), ours(32))
    route_length: int = 8192


FULL = NeedleSettings()
DRY = NeedleSettings((192, 256), (0.0, 1.0), 1, (paper(16), paper(64), ours(16)), 256)


def fitted(lengths: tuple[int, ...], n_ctx: int) -> tuple[int, ...]:
    """Those that a model reads with room for the answer; in place of longer ones, the longest."""
    return tuple(sorted({min(length, n_ctx - ANSWER_ROOM) for length in lengths}))


def needle_study(model: Any, settings: NeedleSettings, finished: Finished) -> dict[str, Rows]:
    """Rows of its tables: "search", "accuracy", "routes".

    Args:
        model: A bridge with its tokenizer; the chat template is used where there is one.
        settings: Its size.
        finished: What is done already: an interrupted study goes on.

    Raises:
        InputError: Lengths beyond the model's context.
        ValueError: As `needle_grid`.
    """
    check_context(model, "the longest text with room for its answer", max(settings.lengths) + ANSWER_ROOM)
    make = in_chat(niah_single_2) if model.tokenizer.chat_template else niah_single_2
    route_length = max((n for n in settings.lengths if n <= settings.route_length), default=min(settings.lengths))
    search: Rows = []
    accuracy: Rows = []
    routes: Rows = []
    for length in settings.lengths:
        texts: Any = [make(model.tokenizer, length, depth=depth, seed=SEARCH_SEED) for depth in settings.depths]
        tokens = torch.cat([tokens_of(model, text.prompt) for text in texts])
        before = torch.cat([up_to_answer(model, text) for text in texts])
        tried = {candidate.name: searched(model, candidate, tokens, before, finished) for candidate in settings.candidates}
        configs = {name: config for name, (config, _) in tried.items() if config is not None}
        cells = finished.cells({"samples": settings.samples})
        grid = needle_grid(
            model, [length], settings.depths, configs, task=make, samples=settings.samples, seed=GRID_SEED, path=cells
        )
        search += [row for _, row in tried.values()]
        accuracy += (found := accuracies(grid.to_dataframe()))
        finished.say("accuracy", found)
        if length == route_length:
            routes = [
                finished.once(
                    "routes",
                    {"run": name, "config": as_json(config), "tokens": digest(tokens)},
                    partial(routed, model, name, config, texts[len(texts) // 2]),
                )
                for name, config in configs.items()
            ]
    return {"search": search, "accuracy": accuracy, "routes": routes}


def searched(
    model: Any, candidate: Candidate, tokens: Tensor, before: Tensor, finished: Finished
) -> tuple[StreamConfig | None, dict[str, Any]]:
    """The smallest budget that will do in all of some texts, and what it keeps in these up to their answers."""

    def compute() -> dict[str, Any]:
        search = candidate.search(model, tokens)
        config, best = search.config, search.best
        return {
            "tokens": tokens.shape[1],
            "texts": len(tokens),
            "run": candidate.name,
            "k": budget_of(config),
            "pruned": None if best is None else best.pruned,
            "mass kept, answer's row": None if config is None else answer_mass(model, before, config),
            "matched": search.criterion,
            "budgets tried": len(search.evaluations),
            "larger ones do, too": search.is_monotone,
            "exact for": "the sparse model",
            "budget": None if best is None else best.budget,
        }

    row = finished.once("search", candidate.about(tokens), compute)
    return (None if row["budget"] is None else candidate.vary(row["budget"])), row


def answer_mass(model: Any, tokens: Tensor, config: StreamConfig) -> float:
    """What the row of the next token keeps of its own full softmax, mean over layers, heads and texts."""
    _, cache = model.run_with_sparse_cache(tokens, config=config, names_filter=is_pattern, logits_to_keep=1)
    return fmean(answer.retained[0] for answer in cache.audit(rows=1, sample=0).answers)


def accuracies(cells: pandas.DataFrame) -> Rows:
    """Means over the depths of one length, the dense model's first; every cell stands beside them."""
    parts = dict(list(cells.groupby("budget", sort=False)))
    first = next(iter(parts.values())).drop(columns="pruned_causal")
    dense = first.assign(accuracy_sparse=lambda x: x.accuracy_dense, pruned=0.0, needle_retained=1.0)
    return [accuracy_row("dense", dense, "the real model")] + [
        accuracy_row(str(name), part, "the sparse model") for name, part in parts.items()
    ]


def accuracy_row(run: str, part: pandas.DataFrame, exact_for: str) -> dict[str, Any]:
    texts, mean = int(part["samples"].sum()), float(part["accuracy_sparse"].mean())
    low, high = wilson(mean, texts)
    return {
        "tokens": int(part["length"].iloc[0]),
        "run": run,
        "texts": texts,
        "accuracy": mean,
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "worst depth": float(part["accuracy_sparse"].min()),
        "pruned": float(part["pruned"].mean()),
        "needle attention kept": float(part["needle_retained"].mean()),
        "exact for": exact_for,
        "cells": part.to_dict("records"),
    }


def routed(model: Any, name: str, config: StreamConfig, task: NeedleTask) -> dict[str, Any]:
    """The routes that carry the most, and the probability of the sparse model's own next token with and without them."""
    tokens = up_to_answer(model, task)
    logits, run = model.run_with_sparse_cache(tokens, config=config, names_filter=flow_names, logits_to_keep=1)
    routes = needle_routes(run, task.needle, top=TOP_ROUTES)
    token, fixed = int(logits[0, -1].argmax()), replace(config, layout_from=run)

    def probability(edges: Any) -> float:
        with torch.no_grad(), tl_stream.sparse(model, fixed, logits_to_keep=1):
            cut = model.run_with_hooks(tokens, fwd_hooks=cut_edges(edges))
        return float(cut[0, -1].float().softmax(-1)[token])

    return {
        "tokens": task.length,
        "run": name,
        "k": budget_of(config),
        "from the needle": routes.found,
        "not followed": 1 - routes.followed,
        "edges": len(routes.edges),
        "p": probability([]),
        "p, cut": probability(routes.edges),
        "p, random cut": probability(random_edges(run, len(routes.edges), rows=routes.edges)),
        "mass kept, answer's row": run.audit(rows=1, sample=0).answers[0].retained[0],
        "first route": str(routes.routes[0]) if routes.routes else "none",
        "exact for": routes.exact_for,
    }

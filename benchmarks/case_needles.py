"""Are needles still found? Two RULER tasks over lengths and depths, with constant and growing budgets, beside the dense model.

The bundled model, blocks of 8, on texts that training never used (`needle_grid`). Over all texts the accuracies are compared:
sparse retrieval should be within a point of dense with at least 90 % of the pairs pruned. By length they show whether a
constant budget fails where texts grow long.
"""

from __future__ import annotations

from typing import Any

import pandas

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import needle_grid
from tl_stream.budget import Budget, Sqrt
from tl_stream.tasks import niah_multikey_1, niah_single_1

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BUDGETS: dict[str, int | Budget] = {"k = 2": 2, "k = 4": 4, "k = sqrt(n) / 2": Sqrt(0.5)}
CONFIG = StreamConfig(block_q=8, block_k=8, estimator="dual")
FIRST_SEED = 20_000
FIGURES = ["accuracy_dense", "accuracy_sparse", "pruned", "needle_retained"]


def needles(quick: bool) -> dict[str, Any]:
    """The study."""
    model: Any = tl_stream.models.load()
    samples, lengths = (1, LENGTHS[:1]) if quick else (4, LENGTHS)
    grids = [
        needle_grid(model, lengths, DEPTHS, BUDGETS, task=task, samples=samples, seed=FIRST_SEED, config=CONFIG)
        for task in (niah_single_1, niah_multikey_1)
    ]
    cells = pandas.concat([grid.to_dataframe().assign(task=grid.task) for grid in grids])
    summary = {
        "texts a budget": len(cells) // len(BUDGETS) * samples,
        "all": means(cells, ["budget"]),
        "by length": means(cells, ["budget", "length"]),
    }
    return {"summary": summary, "cells": cells.to_dict("records")}


def means(cells: pandas.DataFrame, by: list[str]) -> list[dict[str, Any]]:
    """The mean over the cells, which have as many texts each."""
    return cells.groupby(by, sort=False)[FIGURES].mean().reset_index().to_dict("records")

"""The needle study of real models, on the bundled one: dense answers, rows that are read again, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real import needles

import tl_stream
from tl_stream.analysis.needle_run import run_task
from tl_stream.config import StreamConfig
from tl_stream.fidelity.runs import dense_config


@pytest.fixture(scope="module")
def pair() -> Any:
    return needles.Pair("bundled", tl_stream.models.load(), tl_stream.models.load(host="hf"))


def test_the_dense_answer_and_its_attention_are_those_of_a_run_that_prunes_nothing(pair: Any) -> None:
    task = needles.made(pair, 2, 512, 7)
    dense, streamed = needles.dense_answer(pair, task), run_task(pair.traced, task, dense_config(StreamConfig()))
    assert dense.output == streamed.output
    assert task.score(dense.output) == 1
    torch.testing.assert_close(dense.attention, streamed.attention, atol=2e-5, rtol=0)
    assert streamed.retained(dense) == 1


def test_keys_that_a_window_has_left_behind_get_nothing() -> None:
    row = torch.tensor([[0.1, 0.2, 0.7]])  # of positions 3, 4, 5
    torch.testing.assert_close(needles.on_needle(row, torch.tensor([2, 3, 5]), 6), torch.tensor([[0.0, 0.1, 0.7]]))


def test_a_study_goes_on_where_it_was(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "LENGTHS", (384,))
    monkeypatch.setattr(needles, "SEARCH_TOKENS", 256)
    monkeypatch.setattr(needles, "SEARCH_TEXTS", 1)
    path = tmp_path / "rows.jsonl"
    own = needles.RUNS[32]
    needles.study(pair, path, own, range(1))
    first = needles.rows(path)
    needles.study(pair, path, own, range(2))
    cases = needles.rows(path)
    assert cases[: len(first)] == first
    assert len(cases) > len(first)
    assert [row["what"] for row in cases[:3]] == ["search", "dense", own.name]
    assert cases[2]["config"]["k"]["scale"] == pytest.approx(0.25 * cases[0]["budget"])
    assert all(0 < row["pruned"] < 1 for row in cases if row["what"] == own.name)
    assert needles.tables(cases)[0].row_count >= 3  # of the length, the model and all

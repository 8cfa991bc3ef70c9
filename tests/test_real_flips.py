"""The study of flips in real models, on the bundled one: what transformers alone says of each run, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import verdict
from paper_studies.loading import InputError
from real import anchors, flips
from real.common import load, rows
from transformers import AutoModelForCausalLM

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis.flip_result import Flip, FlipRun

FOLDER = str(Path(tl_stream.models.__file__).parent / "mini")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return load(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()


@pytest.mark.parametrize(("k", "estimator"), [(2, "auto"), (8, "stream"), (1, "auto")])
def test_transformers_alone_says_the_same_of_every_run(
    models: tuple[Any, Any], k: int, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, independent = models
    text = model.to_tokens(tl_stream.tasks.niah(model.tokenizer, 200, depth=0.4, keys=4, seed=3).prompt)
    monkeypatch.setattr(flips, "asked", lambda *_: (text, 1))
    config = StreamConfig(block_q=16, block_k=16, k=k, estimator=estimator)
    row = flips.case(model, independent, 200, 3, config, trials=4)
    assert row["claims"] == row["transformers"]
    assert row["same dense answer"]
    assert ("vanilla" in row["claims"]) == (not row["flips without tokens"])
    about = {"model": "mini", "passage": 200, "number": 3, "estimator": estimator, "k": k, "trials": 4}
    (line,) = zip(*(column.cells for column in flips.table([{**about, **json.loads(json.dumps(row))}]).columns), strict=True)
    assert line[-2:] == ("1 of 1", f"{len(row['claims'])} of {len(row['claims'])}")


def test_a_claim_that_does_not_hold_is_told(models: tuple[Any, Any]) -> None:
    """The check is of the run's own blocks: with those around each row alone, the needle goes unread."""
    model, independent = models
    text = model.to_tokens(tl_stream.tasks.niah(model.tokenizer, 200, depth=0.4, keys=4, seed=3).prompt)
    answer = flips.generated(independent, text, 1)
    run = FlipRun(1, True, 0.9, 0.5, 0.5, 0.5, False, False)
    one, all_ = (Flip(0, answer, (), 0, replace(run, k=k)) for k in (1, 13))
    config = StreamConfig(block_q=16, block_k=16, k=1, estimator="window")
    assert not flips.same_answer(model, independent, text, 1, one, "sparse", config)
    assert flips.same_answer(model, independent, text, 1, all_, "sparse", config)


def test_the_table_of_the_audit_is_of_the_real_models() -> None:
    table = flips.audit_table(verdict.read(verdict.DATA))
    by_name = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert {*by_name["model"]} == {"smollm2", "gemma3"}
    total = sum(len(row["flipped"]) for row in verdict.read(verdict.DATA) if row["model"] not in verdict.BUNDLED)
    assert sum(int(cell) for cell in by_name["next tokens"]) == total
    assert "-" in by_name["AUC, in the run"]  # nothing flipped


def test_an_anchor_study_becomes_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    part = {"run": "dense", "pruned": 0.0, "scores": [1.0], "trace": "--trace /somewhere/a.txt"}
    study = {"study": "anchors", "dry_run": False, "model": "/folder/smollm2", "versions": {"torch": "2"}}
    study |= {"traces": [{"digest": "d", "trace": "a"}], "fidelity": [part], "receivers": [], "suppression": []}
    anchors.added(study, path)
    kept = {"run": "dense", "pruned": 0.0, "trace": "a"}
    assert rows(path)[1] == {"model": "smollm2", "study": ["d"], "part": "fidelity", **kept, "versions": {"torch": "2"}}
    with pytest.raises(InputError, match="ROWS had a study of smollm2 on these traces already"):
        anchors.added(study, path)
    with pytest.raises(InputError, match="expected anchors, of a real model"):
        anchors.added({**study, "dry_run": True}, path)

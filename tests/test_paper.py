"""What the paper's studies refuse, and how they cut traces; the studies themselves run dry in .ci/run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import paper
import pytest
import torch
from paper_studies import dry_run
from paper_studies.configs import ours
from paper_studies.loading import InputError, load
from paper_studies.traces import Trace, generate, read

import tl_stream
from tl_stream.budget import Sqrt

THOUGHTS = " ".join(f"This is thought number {number} of them." for number in range(8))


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qwen")
    dry_run.save_qwen(folder)
    return load(str(folder), "cpu", torch.float32)


def test_folders_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--model was '/no/such', which is no folder"):
        load("/no/such", "cpu", torch.float32)
    with pytest.raises(InputError, match=r"a folder without a config.json and weights and a tokenizer"):
        load(str(tmp_path), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--model", "/no/such"], "--model was '/no/such'"),
        (["needle", "--lengths", "90000"], "90064 tokens, more than the 16384 that the model reads"),
        (["anchors", "--trace", "/no/trace"], "--trace was '/no/trace', which can't be read"),
    ],
)
def test_bad_input_ends_with_its_reason(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = str(Path(tl_stream.__file__).parent / "models" / "mini")
    monkeypatch.setattr(sys, "argv", ["paper.py", arguments[0], "--model", bundled, *arguments[1:]])
    with pytest.raises(SystemExit, match="2"):
        paper.main()
    assert message in capsys.readouterr().err


def test_thoughts_are_cut_whether_or_not_they_ended(reasoner: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    for end in ("", "</think>The answer is 3. That is all there is to say."):
        path.write_text(f"<|User|>What is it? Say it.<|Assistant|><think>\n{THOUGHTS}{end}", encoding="utf-8")
        trace = read(reasoner, path)
        assert [each.text for each in trace.sentences] == [f"{part}." for part in THOUGHTS[:-1].split(". ")]
        said = [reasoner.tokenizer.decode(trace.tokens[0, each.span.slice]).strip() for each in trace.sentences]
        assert said == [each.text for each in trace.sentences]
    with pytest.raises(InputError, match=r"short had 1 sentences .*; expected at least 6"):
        Trace.of(reasoner, "short", "<think>One sentence, no more.</think>")
    with pytest.raises(InputError, match=r"long was \d+ tokens, more than the 4096"):
        Trace.of(reasoner, "long", THOUGHTS * 100)


def test_a_generated_trace_is_begun_in_the_chat_template(reasoner: Any) -> None:
    trace = generate(reasoner, "What is 1 + 1?", THOUGHTS, 8, seed=0)
    assert trace.text.startswith(f"<|User|>What is 1 + 1?<|Assistant|><think>\n{THOUGHTS}")
    assert len(trace.text) > len(f"<|User|>What is 1 + 1?<|Assistant|><think>\n{THOUGHTS}")
    assert (trace.tokens == reasoner.tokenizer.bos_token_id).sum() == 1
    assert generate(reasoner, "What is 1 + 1?", THOUGHTS, 8, seed=0).text == trace.text
    with pytest.raises(InputError, match="a prompt with the tokens to generate was"):
        generate(reasoner, "What is 1 + 1?", THOUGHTS, 4096, seed=0)


@pytest.mark.parametrize("n_blocks", [1, 7, 64])
def test_the_largest_growing_budget_keeps_everything(n_blocks: int) -> None:
    candidate = ours(32)
    budget = candidate.vary(candidate.most(n_blocks)).budget
    assert isinstance(budget, Sqrt)
    assert all(budget.blocks(n) == n for n in range(1, n_blocks + 1))


def test_undefined_numbers_are_null() -> None:
    assert paper.plain({"a": [math.nan, 1.0], "b": (2, "c")}) == {"a": [None, 1.0], "b": [2, "c"]}

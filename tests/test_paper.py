"""What the paper's studies refuse, and how they cut traces; the studies themselves run dry in .ci/run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import paper
import pytest
import torch
from case_anchors import spearman
from paper_studies import dry_run
from paper_studies.configs import Candidate, ours
from paper_studies.finished import Finished
from paper_studies.loading import InputError, load, up_to_answer, with_answer
from paper_studies.needle import fitted
from paper_studies.traces import Trace, generate, read

import tl_stream
from tl_stream.analysis import needle_grid
from tl_stream.budget import Sqrt
from tl_stream.fidelity.budget_result import BudgetSearch, Evaluation
from tl_stream.tasks import niah_single_1

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
    with pytest.raises(InputError, match=r"short had 1 sentences .*; expected at least 8"):
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


def test_rank_correlation_is_that_of_scipy() -> None:
    """scipy.stats.spearmanr(a, b, nan_policy="omit"): ties share their mean rank."""
    a, b = torch.tensor([1, 2, 2, 4, 10, 3, math.nan]), torch.tensor([2, 1, 5, 5, 9, math.nan, 1])
    assert spearman(a, b) == pytest.approx(0.7631578947368423)
    assert math.isnan(spearman(a, torch.ones(7)))


def test_undefined_numbers_are_null() -> None:
    assert paper.plain({"a": [math.nan, 1.0], "b": (2, "c")}) == {"a": [None, 1.0], "b": [2, "c"]}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all searches that are begun; each takes the second budget it may."""
    begun: list[str] = []

    def search(self: Candidate, model: Any, tokens: Any) -> Any:
        begun.append(self.name)
        evaluation = Evaluation(2, 0.5, 0.5, matched=True)
        return BudgetSearch(self.vary(2), (evaluation,), "the same tokens", "budget")

    monkeypatch.setattr(Candidate, "search", search)
    return begun


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paper.py", *arguments])
    return paper.main()


@pytest.mark.parametrize(
    ("study", "steps"), [("needle", ["needle_grid", "routed"]), ("anchors", ["fidelity_row", "receivers", "suppressions"])]
)
def test_an_interrupted_study_goes_on(
    study: str,
    steps: list[str],
    searched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it was: each step is done once, and said each time; another size does what is new."""
    size = ["--lengths", "192", "--depths", "0.5", "--samples", "1"] if study == "needle" else ["--new-tokens", "8"]
    command = [study, "--dry-run", "--results", str(tmp_path / "results"), *size]
    module = f"paper_studies.{study}"
    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{step}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(monkeypatch, *command)
    names = list(searched)
    assert len(names) == (3 if study == "needle" else 2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search: ")]
    assert len(said) == len(names) * (2 if study == "needle" else 3)
    assert run(monkeypatch, *command, "--json", str(tmp_path / "first.json")) == 0
    with monkeypatch.context() as patch:
        for step in steps:
            patch.setattr(f"{module}.{step}", needle_grid if step == "needle_grid" else interrupted)
        patch.setattr("paper.generate", interrupted)
        patch.setattr("tl_stream.analysis.needle_study.run_task", interrupted)
        assert run(monkeypatch, *command, "--json", str(tmp_path / "second.json")) == 0
    assert searched == names
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_step_that_was_half_written_is_done_again(tmp_path: Path) -> None:
    done: list[str] = []

    def finished(about: dict[str, Any]) -> Finished:
        return Finished(tmp_path, about, lambda step, value: done.append(f"{step} {value}"))

    finished({"model": "a"}).once("search", {"k": 1}, lambda: {"x": (1, 2)})
    file = tmp_path / "steps.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    again = finished({"model": "a"})
    assert again.once("search", {"k": 1}, interrupted) == {"x": [1, 2]}
    again.once("search", {"k": 2}, lambda: 3)
    finished({"model": "b"}).once("search", {"k": 1}, lambda: 4)
    last = finished({"model": "b"})
    assert [last.once("search", {"k": 1}, interrupted), again.once("search", {"k": 2}, interrupted)] == [4, 3]
    assert done == ["search {'x': [1, 2]}", "search {'x': [1, 2]}", "search 3", "search 4", "search 4", "search 3"]
    assert len(file.read_text().splitlines()) == 3


def test_lengths_are_those_that_the_model_reads() -> None:
    assert fitted((4096, 8192, 16384, 20000), 8192) == (4096, 8128)
    assert fitted((4096, 8192, 16384, 20000), 32768) == (4096, 8192, 16384, 20000)


def test_a_prompt_is_read_up_to_its_answers_first_token(reasoner: Any) -> None:
    """Whether or not the space before it is a token of its own."""
    task = niah_single_1(reasoner.tokenizer, 256, depth=0.5, seed=1)
    tokens, n_answer = with_answer(reasoner, task)
    said = reasoner.tokenizer.decode(tokens[0, -n_answer:])
    assert said.strip() == task.answer
    assert reasoner.tokenizer.decode(up_to_answer(reasoner, task)[0]).rstrip().endswith("is:")
    assert reasoner.tokenizer.decode(tokens[0, -n_answer]).strip()

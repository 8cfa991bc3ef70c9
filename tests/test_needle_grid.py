"""The needle study: its numbers against a masked dense model, its file, its figure, and errors before any work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import LargestTensor
from paper_studies import dry_run
from paper_studies.loading import load
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import NeedleGrid, needle_grid, needle_run
from tl_stream.analysis.needle_run import kept_in_last_row, run_task
from tl_stream.budget import Constant, Linear, Sqrt
from tl_stream.fidelity.runs import dense_config
from tl_stream.masking import AttentionMask
from tl_stream.tasks import Span, cwe, in_chat, niah, niah_single_1, vt

CONFIG = StreamConfig(block_q=16, block_k=16, max_dense=0)
FINE = replace(CONFIG, block_q=8, block_k=8)


@pytest.fixture(scope="module")
def model() -> Any:
    return tl_stream.models.load()


@pytest.fixture(scope="module")
def grid(model: Any, tmp_path_factory: pytest.TempPathFactory) -> NeedleGrid:
    path = tmp_path_factory.mktemp("study") / "cells.jsonl"
    return needle_grid(model, [384, 192], [0.8, 0.2], [1, 10**6], seed=3, config=FINE, path=path, progress=False)


def test_a_full_budget_is_the_dense_model_and_a_poor_one_is_not(grid: NeedleGrid) -> None:
    assert grid.lengths == (192, 384)
    assert grid.depths == (0.2, 0.8)
    assert grid.budgets == {"k = 1": Constant(1), "k = 1000000": Constant(10**6)}
    frame = grid.to_dataframe()
    assert len(frame) == 8
    assert (frame.accuracy_dense == 1.0).all()
    assert (frame.samples == 1).all()
    full, poor = frame[frame.budget == "k = 1000000"], frame[frame.budget == "k = 1"]
    assert (full.accuracy_sparse == full.accuracy_dense).all()
    assert (full.pruned == 0.0).all()
    assert (full.needle_retained == 1.0).all()
    assert poor.accuracy_sparse.min() == 0.0
    assert (poor.pruned > 0.8).all()
    assert poor.needle_retained.between(0.0, 0.9).all()
    assert (grid.accuracy() == 1.0).all()
    assert grid.accuracy("k = 1").shape == (2, 2)
    for cell in grid.cells:
        table = grid.accuracy(cell.budget)
        assert table[grid.depths.index(cell.depth), grid.lengths.index(cell.length)] == cell.accuracy_sparse
    with pytest.raises(ValueError, match="budget was 'k = 3'; expected one of 'k = 1', 'k = 1000000'"):
        grid.accuracy("k = 3")


@torch.no_grad()
def test_the_needles_part_is_what_the_patterns_say(model: Any) -> None:
    """The prompt's last row: against the patterns of cached runs, made dense."""
    task = niah_single_1(model.tokenizer, 384, depth=0.6, seed=9)
    prompt = torch.tensor([model.tokenizer(task.prompt)["input_ids"]])
    config = replace(CONFIG, k=3)
    dense, run = run_task(model, task, dense_config(config)), run_task(model, task, config)
    _, plain = model.run_with_cache(prompt)
    _, cache = model.run_with_sparse_cache(prompt, config=config)
    needle = task.needle.slice
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(dense.attention[layer, 0], plain["pattern", layer][0, :, -1, needle], atol=1e-5, rtol=0)
        assert dense.kept.all()
        layout = cache.block_layout(layer).to_dense()
        assert torch.equal(run.kept[layer, 0], layout[0, :, -1, needle])
        torch.testing.assert_close(run.attention[layer, 0], cache["pattern", layer].to_dense()[0, :, -1, needle])
    assert run.pruned == pytest.approx(cache.pruned)
    assert dense.pruned == 0.0
    assert (run.attention > 0).equal(run.kept)
    kept, attention = run.kept, dense.attention
    assert run.retained(dense) == pytest.approx((attention[kept].sum() / attention.sum()).item())
    assert attention.shape == (model.cfg.n_layers, 7, model.cfg.n_heads, len(task.needle))


@torch.no_grad()
def test_answers_are_those_of_greedy_generation(model: Any) -> None:
    task = niah_single_1(model.tokenizer, 384, depth=0.3, seed=5)
    prompt = torch.tensor([model.tokenizer(task.prompt)["input_ids"]])
    for config in (replace(CONFIG, k=1), replace(CONFIG, k=4)):
        with tl_stream.sparse(model, config):
            output = model.generate(prompt, max_new_tokens=7, do_sample=False, stop_at_eos=False, verbose=False)
        assert run_task(model, task, config).output.startswith(model.tokenizer.decode(output[0, 384:]))
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False, "verbose": False}
    plain = model.generate(prompt, use_past_kv_cache=False, **options)
    dense = run_task(model, task, dense_config(CONFIG))
    assert dense.output == model.tokenizer.decode(plain[0, 384:])
    assert dense.output.strip() == task.answer


class Speaker:
    """Stands for generation: says given words, of which it has as many tokens as are asked for."""

    def __init__(self, model: Any, text: str) -> None:
        self.tokens = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        self.asked: list[int] = []
        self.real = needle_run.greedy_tokens

    def __call__(self, model: Any, prompt: Tensor, steps: int) -> Tensor:
        self.asked.append(steps)
        self.real(model, prompt, steps)
        return self.tokens[:, :steps]


@pytest.mark.parametrize("before", ["", "it is", "one of the special magic numbers is:"])
@torch.no_grad()
def test_what_stands_before_the_answer_does_not_count(model: Any, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Neither in the answer nor in the attention to the needle; the steps are the model's own, whatever is made of them."""
    task = niah_single_1(model.tokenizer, 192, depth=0.5, seed=2)
    monkeypatch.setattr(needle_run, "greedy_tokens", speaker := Speaker(model, f"{before} {task.answer} . the grass"))
    run = run_task(model, task, dense_config(CONFIG))
    assert task.score(run.output) == 1.0
    assert run.output.endswith(task.answer)
    n_before = len(model.tokenizer(before, add_special_tokens=False)["input_ids"])
    assert speaker.asked == ([7] if n_before == 0 else [7, 7 + len(task.question)])
    assert run.attention.shape[1] == 7
    prompt = model.to_tokens(task.prompt)
    options = {"max_new_tokens": n_before + 7, "do_sample": False, "stop_at_eos": False, "verbose": False}
    own = model.generate(prompt, use_past_kv_cache=False, **options)
    _, plain = model.run_with_cache(own[:, :-1])
    for layer in range(model.cfg.n_layers):
        expected = plain["pattern", layer][0, :, -7:, task.needle.slice].transpose(0, 1)
        torch.testing.assert_close(run.attention[layer], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_nothing_after_the_end_is_an_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = niah_single_1(model.tokenizer, 192, depth=0.5, seed=2)
    monkeypatch.setattr(needle_run, "greedy_tokens", speaker := Speaker(model, f"it is </s> {task.answer}"))
    run = run_task(model, task, dense_config(CONFIG))
    assert task.score(run.output) == 0.0
    assert run.attention.shape[1] == speaker.tokens[0].tolist().index(model.tokenizer.eos_token_id) + 1


def test_kept_keys_of_the_last_row() -> None:
    mask = AttentionMask.causal(70, 70)
    layout = tl_stream.estimate_layout(
        torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8), StreamConfig(block_q=16, block_k=8, k=3)
    )
    assert torch.equal(kept_in_last_row(layout, torch.arange(70)), layout.to_dense()[0, :, -1])
    full = tl_stream.BlockLayout.full(mask, 16, 8, 1, 4)
    assert kept_in_last_row(full, torch.arange(70)).all()


def test_a_last_row_that_reads_everything(model: Any) -> None:
    dense = replace(CONFIG, k=2, dense_queries=1)
    grid = needle_grid(model, [192], [0.5], {"sparse": 2, "dense row": dense}, config=CONFIG, progress=False)
    retained = {cell.budget: cell.needle_retained for cell in grid.cells}
    assert retained["dense row"] == 1.0
    assert retained["sparse"] < 1.0


def test_several_needles_are_scored_by_their_share(model: Any) -> None:
    grid = needle_grid(model, [300], [0.5], {"all": 10**6}, task=vt, config=CONFIG, progress=False)
    (cell,) = grid.cells
    assert (cell.accuracy_dense, cell.accuracy_sparse, cell.needle_retained) == (1.0, 1.0, 1.0)
    four = partial(niah, keys=4)
    grid = needle_grid(model, [300], [0.5], {"all": 10**6}, task=four, config=CONFIG, progress=False)
    assert grid.cells[0].accuracy_dense == grid.cells[0].accuracy_sparse


def test_finished_cells_are_read_not_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runs = tmp_path / "cells.jsonl", []
    study = partial(needle_grid, model, task=digit, config=CONFIG, path=path, progress=False)
    run = needle_run.run_task

    def counted(*args: Any) -> Any:
        runs.append(args[1].length)
        if len(runs) == interrupted_at:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr("tl_stream.analysis.needle_study.run_task", counted)
    interrupted_at = 4
    with pytest.raises(KeyboardInterrupt):
        study([192, 256], [0.5], [2])
    assert runs == [192, 192, 256, 256]
    with path.open("a") as file:
        file.write('{"length": 256, "dep')  # as an interrupted write would leave it
    interrupted_at = 0
    runs.clear()
    resumed = study([192, 256], [0.5], [2])
    assert runs == [256, 256]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["length"] for line in lines[1:]] == [192, 256]
    runs.clear()
    assert study([192, 256], [0.5], [2]) == resumed
    assert runs == []
    grown = study([192], [0.5], [2, Sqrt(2.0)])  # the dense model again, and the new budget
    assert runs == [192, 192]
    assert grown.cells[0] == resumed.cells[0]


def test_whole_configs_stand_beside_budgets(model: Any, tmp_path: Path) -> None:
    """Each cell is that of its own config, in one study with one dense run a text, and goes on from a file."""
    path, stream = tmp_path / "cells.jsonl", replace(CONFIG, block_q=32, block_k=8, k=3, estimator="stream", dense_layers=1)
    study = partial(needle_grid, model, [192], [0.5], task=digit, config=CONFIG, path=path, progress=False)
    both = study({"stream": stream, "k = 2": 2})
    (alone,) = needle_grid(model, [192], [0.5], {"k": 3}, task=digit, config=stream, progress=False).cells
    assert replace(both.cells[0], budget="k") == alone
    assert both.cells[0].pruned != both.cells[1].pruned
    assert study({"stream": stream}).cells == both.cells[:1]
    with pytest.raises(ValueError, match=r"the budget 'stream' differ: it has \{'block_q': 32"):
        study({"stream": replace(stream, dense_layers=(0, 1))})
    with pytest.raises(ValueError, match=r"budgets\['exact'\] has forward='exact'"):
        study({"exact": StreamConfig(forward="exact")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "a study in which seed differ: it has 0, this call 1"),
        ({"samples": 2}, "a study in which samples differ"),
        ({"config": replace(CONFIG, estimator="hip")}, "a study in which config differ"),
        ({"budgets": {"some": 3}}, "the budget 'some' differ: it has {'budget': 'Constant', 'k': 2}"),
        ({"task": partial(niah, keys=2)}, "the texts (task, tokenizer) of 192 tokens at depth 0.5 differ"),
    ],
)
def test_a_changed_setting_is_named(model: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "lengths": [192],
        "depths": [0.5],
        "budgets": {"some": 2},
        "task": digit,
        "config": CONFIG,
        "progress": False,
    }
    path = tmp_path / "cells.jsonl"
    needle_grid(model, **settings, path=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=re.escape(message)):
        needle_grid(model, **(settings | change), path=path)
    assert path.read_text() == before


def test_another_model_or_another_file_is_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    needle_grid(model, [192], [0.5], [2], task=digit, config=CONFIG, path=path, progress=False)
    other = tl_stream.models.load()
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(ValueError, match="a study in which model differ"):
        needle_grid(other, [192], [0.5], [2], config=CONFIG, path=path, progress=False)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="holds no needle study; expected a file that needle_grid began"):
        needle_grid(model, [192], [0.5], [2], task=digit, config=CONFIG, path=path, progress=False)


def test_the_figure_shows_every_cell(grid: NeedleGrid) -> None:
    figure = grid.plot()
    assert len(figure.data) == 3
    assert all(trace.x == ("192", "384") and trace.y == ("20%", "80%") for trace in figure.data)
    assert (figure.data[0].z == grid.accuracy()).all()
    assert (figure.data[1].z == grid.accuracy("k = 1")).all()
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0] == "dense"
    assert titles[1] == f"k = 1<br>{grid.pruned('k = 1'):.1%} pruned"
    assert figure.layout.yaxis.autorange == "reversed"
    assert "1 text a cell" in figure.layout.title.text
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert "Plotly" in figure.to_html(include_plotlyjs="cdn")


def digit(tokenizer: Any, length: int, *, depth: float, seed: int) -> Any:
    """A task that asks for the number's first digit only."""
    task = niah_single_1(tokenizer, length, depth=depth, seed=seed)
    return replace(task, answer=task.answer[0], references=(task.answer[0],))


def test_memory_is_linear(model: Any) -> None:
    """No tensor of T x T numbers, nor one for the dense model."""
    with LargestTensor() as largest:
        needle_grid(model, [4096], [0.5], [2], task=digit, config=replace(CONFIG, estimator="dual"), progress=False)
    assert largest.numel < 4096 * 4096 / 2


def test_the_model_is_left_as_it_was(model: Any) -> None:
    def failing(tokenizer: Any, length: int, *, depth: float, seed: int) -> Any:
        if seed == 1:
            raise RuntimeError("no more texts")
        return niah_single_1(tokenizer, length, depth=depth, seed=seed)

    before = model("The grass is green.")
    with pytest.raises(RuntimeError, match="no more texts"):
        needle_grid(model, [192], [0.5], [2], task=failing, samples=2, config=CONFIG, progress=False)
    assert torch.equal(model("The grass is green."), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def outside(tokenizer: Any, length: int, *, depth: float, seed: int) -> Any:
    return replace(niah_single_1(tokenizer, length, depth=depth, seed=seed), needles=(Span(length - 2, length + 3),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": []}, ValueError, "lengths were []; expected at least one"),
        ({"depths": []}, ValueError, "depths were []; expected at least one"),
        ({"budgets": []}, ValueError, "budgets were []; expected at least one"),
        ({"budgets": {}}, ValueError, "budgets were {}; expected at least one"),
        ({"budgets": [2, Constant(2)]}, ValueError, "each of them once"),
        ({"budgets": 4}, TypeError, "budgets was 4; expected a list"),
        ({"budgets": ["many"]}, TypeError, "budgets was 'many'"),
        ({"budgets": [0]}, ValueError, "budgets was 0; expected an int >= 1"),
        ({"lengths": [192, 192]}, ValueError, "each of them once"),
        ({"lengths": [192.5]}, TypeError, "lengths was [192.5]; expected a list of numbers (int)"),
        ({"depths": [0.5, 1.2]}, ValueError, "depths were [0.5, 1.2]; expected numbers from 0"),
        ({"depths": [float("nan")]}, ValueError, "expected numbers from 0"),
        ({"samples": 0}, ValueError, "samples was 0; expected an int >= 1"),
        ({"lengths": [192, 20]}, ValueError, "length: 20 tokens are too few"),
        (
            {"lengths": [192, 16_384]},
            ValueError,
            "lengths had 16384; with the answer that is 16391 tokens, more than the 16384",
        ),
        ({"task": outside}, ValueError, "task gave a needle that ends at 195, but a prompt of 192 tokens"),
        ({"task": cwe}, TypeError, "task was cwe; expected a function (tokenizer, length, *, depth, seed)"),
        ({"task": "niah_single_1"}, TypeError, "task was 'niah_single_1'; expected a function"),
        ({"task": lambda *_, **__: "text"}, TypeError, "task gave a str without needles"),
        ({"config": StreamConfig(forward="exact")}, ValueError, "config has forward='exact', in which nothing is pruned"),
        ({"config": {"k": 3}}, TypeError, "config was a dict; expected a tl_stream.StreamConfig"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("tl_stream.analysis.needle_study.run_task", lambda *_: pytest.fail("the model ran"))
    settings: dict[str, Any] = {"lengths": [192], "depths": [0.5], "budgets": [2, Linear(0.5)], "config": CONFIG}
    with pytest.raises(error, match=re.escape(message)):
        needle_grid(model, **(settings | change), path=tmp_path / "cells.jsonl", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_rows_is_no_view_of_the_pattern(model: Any) -> None:
    """What is noted doesn't keep the patterns alive."""
    run = run_task(model, niah_single_1(model.tokenizer, 192, seed=1), CONFIG)
    assert type(run.attention) is type(run.kept) is Tensor


@torch.no_grad()
def test_needles_that_a_sliding_window_has_left_behind(tmp_path: Path) -> None:
    """Gemma 3's KV cache forgets what no local layer reads any more: each step's row is that of the whole text all the same."""
    dry_run.save_gemma(tmp_path)
    gemma = load(str(tmp_path), "cpu", torch.float32)
    task = in_chat(niah_single_1)(gemma.tokenizer, 300, depth=0.5, seed=1)
    needle, last = task.needles[0].slice, task.length - 1
    assert last - gemma.original_model.config.sliding_window > needle.start
    dense = run_task(gemma, task, dense_config(CONFIG))
    prompt = torch.tensor([gemma.tokenizer(task.prompt)["input_ids"]])
    options = {"max_new_tokens": dense.attention.shape[1], "do_sample": False, "stop_at_eos": False, "verbose": False}
    whole = gemma.generate(prompt, use_past_kv_cache=False, **options)
    _, plain = gemma.run_with_cache(whole[:, :-1])
    for layer, kind in enumerate(gemma.original_model.config.layer_types):
        expected = plain["pattern", layer][0, :, last:, needle].transpose(0, 1)
        torch.testing.assert_close(dense.attention[layer], expected, atol=1e-5, rtol=0)
        assert (dense.attention[layer].sum() > 0) == (kind == "full_attention")
    run = run_task(gemma, task, replace(CONFIG, k=2))
    assert 0.0 <= run.retained(dense) < 1.0

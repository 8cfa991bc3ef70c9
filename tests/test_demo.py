"""`tl-stream demo`: the answer, the figures, the page, and clear errors."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tl_stream import __version__, demo
from tl_stream.cache import is_pattern
from tl_stream.cli import main
from tl_stream.demo import answer, job
from tl_stream.models import load

TOKENS = 1024
KEYS = {
    "tokens", "expected", "answer_dense", "answer_sparse", "pruned", "cache_bytes_dense", "cache_bytes_sparse",
    "seconds_dense", "seconds_sparse", "heads", "html",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def result(model, tmp_path_factory: pytest.TempPathFactory) -> demo.DemoResult:
    return demo.run(TOKENS, 0.3, 0, tmp_path_factory.mktemp("demo") / "page.html", model=model)


def test_both_models_answer_right(result: demo.DemoResult) -> None:
    assert re.fullmatch("[0-9]{7}", result.expected)
    assert result.answer_dense == result.answer_sparse == result.expected


def test_at_the_default_length_nine_tenths_are_pruned(model) -> None:
    prompt = torch.randint(4, model.cfg.d_vocab, (1, 4096), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_sparse_cache(
        prompt, names_filter="blocks.0.attn.hook_pattern", config=job.CONFIG, return_type=None, stop_at_layer=1
    )
    assert cache.pruned >= 0.91


def test_figures_are_those_of_the_runs(result: demo.DemoResult, model) -> None:
    cfg = model.cfg
    assert result.cache_bytes_dense == 4 * cfg.n_layers * cfg.n_heads * TOKENS**2
    assert result.cache_bytes_sparse < result.cache_bytes_dense / 10
    assert 0 < result.retained_mass_least <= result.retained_mass_mean <= 1 + 1e-5
    assert result.seconds_dense > 0
    assert result.seconds_sparse > 0


def test_heads_are_those_that_read_the_needle(result: demo.DemoResult, model) -> None:
    names = [(head.layer, head.head) for head in result.heads]
    assert len(set(names)) == len(names) > 0
    most = [max(*head.needle_mass_sparse, *head.needle_mass_dense) for head in result.heads]
    assert most == sorted(most, reverse=True)
    assert all(answer.READS <= mass <= 1 + 1e-5 for mass in most)
    for head in result.heads:
        assert len(head.needle_mass_sparse) == len(head.needle_mass_dense) == len(head.retained_mass) == 7


@torch.inference_mode()
def test_noted_masses_are_those_of_the_dense_patterns(result: demo.DemoResult, model) -> None:
    task = job._task(model, TOKENS, 0.3, 0)
    text = model.to_tokens(task.prompt + " " + result.answer_dense[:3])
    _, cache = model.run_with_cache(text, names_filter=is_pattern)
    for head in result.heads:
        rows = cache["pattern", head.layer][0, head.head, TOKENS - 1 : TOKENS + 2, task.needle.slice].sum(-1)
        assert head.needle_mass_dense[:3] == pytest.approx(rows.tolist(), abs=1e-4)


def test_cutting_the_reading_heads_off_the_needle_loses_the_answer(result: demo.DemoResult, model) -> None:
    task = job._task(model, TOKENS, 0.3, 0)
    prompt = model.to_tokens(task.prompt)
    readers = {(head.layer, head.head) for head in result.heads}

    def cut(pattern, hook, of_readers):
        for head in range(model.cfg.n_heads):
            if ((hook.layer(), head) in readers) == of_readers:
                pattern[:, head, -1:, task.needle.slice] = 0.0
        return pattern

    def answer_without(of_readers: bool) -> str:
        hooks = [(is_pattern, lambda pattern, hook: cut(pattern, hook, of_readers))]
        with model.hooks(fwd_hooks=hooks):
            return answer.generate(model, prompt, task).text

    assert answer_without(of_readers=True) != task.answer
    assert answer_without(of_readers=False) == task.answer


def test_page_shows_answer_heads_and_places(result: demo.DemoResult) -> None:
    html = Path(result.html).read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|(?:import|from)\s*["']https?:""", html)
    first = result.heads[0]
    for expected in (f"is: {result.expected}.", "91", f'"L{first.layer}H{first.head}"', "\\u00b7NEEDLE:", "needle ("):
        assert expected in html
    assert "CircuitsVis.AttentionHeads" in html


def test_json_is_one_object_with_the_promised_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--tokens", "300", "--depth", "1", "--seed", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() >= KEYS
    assert (found["tokens"], found["depth"], found["seed"], found["html"]) == (300, 1.0, 3, "tl_stream_demo.html")
    assert found["heads"][0].keys() >= {"layer", "head", "needle_mass_sparse", "needle_mass_dense", "retained_mass"}
    assert [path.name for path in tmp_path.iterdir()] == ["tl_stream_demo.html"]
    assert [line.split("] ")[1] for line in err.splitlines() if line.startswith("[")] == list(demo.STEPS)


def test_tables_for_people(
    result: demo.DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", lambda *_, **__: result)
    assert main(["demo", "-o", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    for expected in (f"Dense answer                   {result.expected} (right)", "Attention kept", "times less", "L"):
        assert expected in out
    assert all(f"L{head.layer}H{head.head}" in out for head in result.heads)
    assert out.splitlines()[-1] == f"Written: {result.html}"


def test_a_wrong_dense_answer_is_an_error(
    result: demo.DemoResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", lambda *_, **__: replace(result, answer_dense="7777777"))
    assert main(["demo"]) == 1
    message = f"the dense model answered '7777777'; expected '{result.expected}'"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(demo, "run", lambda *_, **__: replace(result, answer_sparse="7777777"))
    assert main(["demo"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "20"], "tokens are too few"),
        (["--tokens", "-5"], "tokens are too few"),
        (["--tokens", "16385"], "tokens: 16385 are more than the 16384 that the model reads"),
        (["--tokens", "16380"], "tokens: 16380 leave no room for the answer; ask for 16377 or fewer"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--depth", "1.5"], "depth: 1.5 is outside 0..1"),
        (["--depth", "-0.1"], "depth: -0.1 is outside 0..1"),
        (["--depth", "nan"], "depth: nan is outside 0..1"),
        (["-o", "missing/page.html"], "output: missing/page.html can't be written (No such file or directory)"),
        (["-o", "."], "output: . exists and is no file"),
        (["--width", "3"], "unrecognized arguments: --width 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_get_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["demo", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_memory_holds_is_refused(model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(ValueError, match=r"tokens: with 2000 the dense run would take .* ask for 178 or fewer"):
        demo.run(2000, html=tmp_path / "page.html", model=model)


def test_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_report", interrupt)
    assert main(["demo", "--tokens", "200"]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_version() -> None:
    command = [sys.executable, "-m", "tl_stream.cli", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"tl-stream {__version__}\n"

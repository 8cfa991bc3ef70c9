"""`find_budget`: the smallest k that still does what the dense model does, every budget that was tried, and clear errors."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from allocations import LargestTensor
from rich.console import Console
from torch import Tensor
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.budget import PerHead, TopP
from tl_stream.fidelity import distribute, find_budget
from tl_stream.fidelity.criteria import METRICS
from tl_stream.hosts.kv_cache import served

CONFIG = StreamConfig(block_q=16, block_k=16, max_dense=0)
FINE = replace(CONFIG, block_q=8, block_k=8)


@pytest.fixture(scope="module")
def model() -> Any:
    return tl_stream.models.load()


def needle(model: Any, length: int = 512, seed: int = 0) -> Tensor:
    return model.to_tokens(tl_stream.tasks.niah_single_1(model.tokenizer, length, depth=0.4, seed=seed).prompt)


def generated(model: Any, prompt: Tensor, n: int) -> tuple[int, ...]:
    with served(model):
        output = model.generate(prompt, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False)
    return tuple(output[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("match", [1, 2, 7])
@torch.no_grad()
def test_the_smallest_k_that_generates_the_dense_models_tokens(model: Any, match: int) -> None:
    prompt = needle(model)
    result = find_budget(model, prompt, match, config=CONFIG, progress=False)
    dense = generated(model, prompt, match)
    assert result.dense_tokens == (dense,)
    assert result.best is not None
    assert result.config == replace(CONFIG, k=result.best.budget)
    for each in result.evaluations:
        with tl_stream.sparse(model, replace(CONFIG, k=each.budget)):
            assert each.tokens == (generated(model, prompt, match),)
        assert each.matched == (each.tokens == (dense,))
        _, cache = model.run_with_sparse_cache(prompt, config=replace(CONFIG, k=each.budget))
        assert each.pruned == pytest.approx(cache.pruned)
    tried = [each.budget for each in result.evaluations]
    neighbours = {k for k in (result.best.budget - 1, result.best.budget + 1) if 1 <= k <= 33}
    assert tried == sorted(set(tried))
    assert neighbours <= set(tried)


def reworded(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, characters: dict[str, str]) -> None:
    """Let a tokenizer write some characters as others."""
    decode, table = tokenizer.decode, str.maketrans(characters)
    monkeypatch.setattr(tokenizer, "decode", lambda *args, **options: decode(*args, **options).translate(table))


@torch.no_grad()
def test_white_space_is_matched_but_does_not_count(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = needle(model)  # whose answer is 6048764
    reworded(monkeypatch, model.tokenizer, {"6": " ", "4": "\n"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*says little")
        result = find_budget(model, prompt, 2, config=CONFIG, progress=False)
    assert result.criterion == "the next 4 tokens are the dense model's: ' 0\\n8'"
    dense = generated(model, prompt, 4)
    assert result.dense_tokens == (dense,)
    for each in result.evaluations:
        with tl_stream.sparse(model, replace(CONFIG, k=each.budget)):
            assert each.tokens == (generated(model, prompt, 4),)
        assert each.matched == (each.tokens == (dense,))


@torch.no_grad()
def test_an_answer_that_ends_early_or_never_begins(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, eos = needle(model), model.tokenizer.eos_token
    model.tokenizer.eos_token = "8"
    try:
        with pytest.warns(UserWarning, match=r"says little: 4 of the 4 tokens '6048' of text 0 carry text, not 7"):
            result = find_budget(model, prompt, 7, config=CONFIG, low=20, progress=False)
    finally:
        model.tokenizer.eos_token = eos
    assert result.dense_tokens == (generated(model, prompt, 4),)
    reworded(monkeypatch, model.tokenizer, dict.fromkeys("0123456789", " "))
    with pytest.warns(UserWarning, match=r"says little: \d of the \d+ tokens ' .* of text 0 carry text, not 8") as warned:
        find_budget(model, prompt, 8, config=CONFIG, low=20, progress=False)
    assert [each.filename for each in warned if "says little" in str(each.message)] == [__file__]


@NEEDS_HOOKED
@torch.no_grad()
def test_without_a_tokenizer_every_token_counts() -> None:
    result = find_budget(build("gqa", torch.float32), tokens(61), 3, config=FINE, low=8, progress=False)
    assert result.criterion == "the next 3 tokens are the dense model's"
    assert {len(answer) for answer in result.dense_tokens or ()} == {3}


@torch.no_grad()
def test_four_thousand_tokens_need_one_in_twenty(model: Any) -> None:
    """What the paper reports for needles up to 20k tokens is 90 to 96 %."""
    prompt = needle(model, 4096)
    result = find_budget(model, prompt, config=StreamConfig(block_q=32, block_k=32), progress=False)
    assert result.best is not None
    assert result.best.pruned >= 0.95
    assert result.best.tokens == (generated(model, prompt, 2),)


@torch.no_grad()
def test_a_text_of_a_batch_less_needs_no_more(model: Any) -> None:
    first, second = needle(model), needle(model, seed=1)
    both = find_budget(model, torch.cat([first, second]), config=CONFIG, progress=False)
    alone = find_budget(model, first, config=CONFIG, progress=False)
    assert both.best is not None
    assert alone.best is not None
    assert len(both.best.tokens or ()) == 2
    assert both.best.budget >= alone.best.budget


@torch.no_grad()
def test_metrics(model: Any) -> None:
    prompt = needle(model)
    dense = model(prompt)[:, -1:]
    for name, threshold in (("kl", 0.05), ("logit_difference", 2.0)):
        result = find_budget(model, prompt, metric=name, threshold=threshold, config=CONFIG, progress=False)
        assert result.best is not None
        for each in result.evaluations:
            logits, _ = model.run_with_sparse_cache(prompt, config=replace(CONFIG, k=each.budget), logits_to_keep=1)
            assert each.value == pytest.approx(METRICS[name](logits, dense), abs=1e-4)
            assert each.value is not None
            assert each.matched == (each.value <= threshold)
            assert each.tokens is None


def test_metrics_by_hand() -> None:
    dense, sparse = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    log_q = sparse.double().log_softmax(-1)
    expected = (-torch.tensor(2.0).log() - log_q.mean()).item()  # p is uniform
    assert METRICS["kl"](sparse, dense) == pytest.approx(expected)
    assert METRICS["logit_difference"](torch.tensor([[[1.0, 4.0, 9.0]]]), torch.tensor([[[3.0, 2.0, 0.0]]])) == pytest.approx(
        4.0
    )


class Scripted:
    """Budgets that meet the criterion are listed; nothing is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *good: int) -> None:
        from tl_stream.fidelity import budget_search
        from tl_stream.fidelity.budget_result import Evaluation

        self.tried: list[int] = []
        script = self

        class Criterion:
            description, dense_tokens = "scripted", None

            def evaluate(self, budget: int, config: StreamConfig) -> Evaluation:
                assert config.k == budget
                script.tried.append(budget)
                return Evaluation(budget, 1 - budget / 100, 1 - budget / 100, budget in good, value=float(budget))

        monkeypatch.setattr(budget_search, "_criterion", lambda *args: Criterion())


@pytest.mark.parametrize(("low", "high"), [(1, 100), (1, 37), (5, 64), (37, 37)])
@pytest.mark.parametrize("least", [1, 2, 3, 5, 16, 17, 31, 37])
def test_bisection(model: Any, monkeypatch: pytest.MonkeyPatch, least: int, low: int, high: int) -> None:
    script = Scripted(monkeypatch, *range(least, 101))
    result = find_budget(model, torch.zeros(1, 4, dtype=torch.long), low=low, high=high, progress=False)
    assert result.best is not None
    assert result.best.budget == max(least, low)
    assert result.is_monotone
    assert len(script.tried) == len(set(script.tried)) <= 2 * high.bit_length() + 2


def test_what_is_not_monotone_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, 4, 6, 7, 8)
    with pytest.warns(UserWarning, match=r"k = 4 meets the criterion \(scripted\), but larger ones fail: \[5\]"):
        result = find_budget(model, torch.zeros(4, dtype=torch.long), high=64, progress=False)
    assert not result.is_monotone
    assert result.best is not None
    assert result.best.budget == 4
    assert "not monotone" in str(result.table().caption)


def test_nothing_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = find_budget(model, torch.zeros(1, 4, dtype=torch.long), high=6, progress=False)
    assert result.config is None
    assert result.best is None
    assert [each.budget for each in result.evaluations] == [1, 2, 4, 6]
    assert json.loads(json.dumps(result.to_dict()))["budget"] is None


def per_head(model: Any, config: StreamConfig | None, k: int = 33) -> list[int]:
    """The blocks of each head, by layer."""
    assert config is not None
    heads = product(range(model.cfg.n_layers), range(model.cfg.n_heads))
    return [config.budget.of_head(layer, head).blocks(k) for layer, head in heads]


@torch.no_grad()
def test_the_smallest_total_over_all_heads(model: Any) -> None:
    match, prompt = 7, needle(model, seed=1)
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    passes: list[int] = []
    count = lambda embedded, hook: passes.append(embedded.shape[1])  # noqa: E731
    with model.hooks(fwd_hooks=[("hook_embed", count)]):
        result = find_budget(model, prompt, match, over="total", config=FINE, progress=False)
    assert passes.count(512) == len(result.evaluations) + 1  # the dense run also measures what the heads' blocks hold
    assert result.over == "total"
    assert result.best is not None
    assert result.best.budget > n_heads
    assert sum(per_head(model, result.config)) == result.best.budget
    dense = generated(model, prompt, match)
    for each in result.evaluations:
        k = distribute(model, prompt, each.budget / n_heads, config=FINE, at_most=65)
        with tl_stream.sparse(model, replace(FINE, k=k)):
            assert each.tokens == (generated(model, prompt, match),)
        assert each.matched == (each.tokens == (dense,))
        _, cache = model.run_with_sparse_cache(prompt, config=replace(FINE, k=k))
        assert each.pruned == pytest.approx(cache.pruned)
    assert result.evaluations[0].budget == n_heads
    tried = {each.budget for each in result.evaluations}
    assert {n for n in (result.best.budget - 1, result.best.budget + 1) if n >= n_heads} <= tried


@torch.no_grad()
def test_the_whole_total_is_the_dense_model(model: Any) -> None:
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    result = find_budget(model, needle(model, 300), 3, over="total", config=CONFIG, low=20 * n_heads, progress=False)
    assert [(each.budget, each.pruned, each.matched) for each in result.evaluations] == [(20 * n_heads, 0.0, True)]


@torch.no_grad()
def test_a_total_is_for_the_layers_that_are_not_dense(model: Any) -> None:
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    config = replace(CONFIG, dense_layers=1)
    result = find_budget(model, needle(model), over="total", config=config, progress=False)
    assert result.best is not None
    assert result.evaluations[0].budget == n_heads * (n_layers - 1)
    assert isinstance(result.config, StreamConfig)
    assert isinstance(result.config.k, PerHead)
    assert result.config.k.budgets.keys() == set(product(range(1, n_layers), range(n_heads)))
    numbers = per_head(model, result.config)[n_heads:]
    assert sum(numbers) == result.best.budget
    assert min(numbers) >= 1


@torch.no_grad()
def test_the_smallest_share_of_attention(model: Any) -> None:
    prompt = needle(model, seed=1)
    result = find_budget(model, prompt, 7, over="top_p", config=FINE, progress=False)
    assert result.best is not None
    assert 1 < result.best.budget < 100
    assert result.config == replace(FINE, k=TopP(result.best.budget / 100, at_most=66))
    with tl_stream.sparse(model, result.config):
        assert result.best.tokens == (generated(model, prompt, 7),)
    everything = find_budget(model, prompt, over="top_p", config=FINE, low=100, progress=False)
    assert [(each.budget, each.pruned, each.matched) for each in everything.evaluations] == [(100, 0.0, True)]


@torch.no_grad()
def test_a_function_and_text(model: Any) -> None:
    text = tl_stream.tasks.niah_single_1(model.tokenizer, 512, depth=0.4, seed=0).prompt
    beams = (1, 2, 4)
    result = find_budget(model, text, high=3, over=lambda i: replace(CONFIG, k=2 * i, beam=beams[i - 1]), progress=False)
    assert result.config in [replace(CONFIG, k=2 * i, beam=beams[i - 1]) for i in (1, 2, 3)]


@torch.no_grad()
def test_a_k_that_covers_every_block_always_matches(model: Any) -> None:
    result = find_budget(model, needle(model, 300), 3, config=CONFIG, low=20, progress=False)
    assert [(each.budget, each.pruned, each.matched) for each in result.evaluations] == [(20, 0.0, True)]


@torch.no_grad()
def test_printed_and_stored(model: Any) -> None:
    result = find_budget(model, needle(model), config=CONFIG, progress=False)
    console = Console(record=True, width=100)
    console.print(result)
    shown = " ".join(console.export_text().split())
    assert "the next 2 tokens are the dense model's" in shown
    assert f"smallest that met it: {result.best.budget}" in shown if result.best else False
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["budget"] == stored["config"]["k"]
    assert len(stored["evaluations"]) == len(result.evaluations)


def test_progress_is_shown(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    find_budget(model, needle(model), config=CONFIG)
    assert "find_budget" in capsys.readouterr().err


@pytest.mark.parametrize(("over", "budget"), [("k", 2), ("total", 40), ("top_p", 90)])
@torch.no_grad()
def test_no_tensor_is_of_t_by_t_elements(model: Any, monkeypatch: pytest.MonkeyPatch, over: str, budget: int) -> None:
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr("tl_stream.estimator.problem.CHUNK_ENTRIES", 2**17)
    prompt = needle(model, 2048)
    with LargestTensor() as watch:
        find_budget(model, prompt, over=over, low=budget, high=budget, config=CONFIG, progress=False)
    assert watch.numel < 2048 * 2048 / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "top_p", "config": replace(CONFIG, estimator="window")}, "config had estimator='window', which reckons no"),
        ({"over": "total", "config": replace(CONFIG, estimator="window")}, "config had estimator='window', which reckons no"),
        ({"config": replace(CONFIG, forward="exact")}, r"config had forward='exact', .* expected forward='sparse'"),
    ],
    ids=str,
)
def test_a_config_that_can_not_be_searched_is_refused_before_a_run(model: Any, arguments: dict[str, Any], message: str) -> None:
    runs: list[Tensor] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: runs.append(x))]), pytest.raises(ValueError, match=message):
        find_budget(model, needle(model, 80), progress=False, **arguments)
    assert not runs


@torch.no_grad()
def test_a_layout_from_an_earlier_run_is_refused_before_a_run(model: Any) -> None:
    prompt, runs = needle(model, 80), []
    _, cache = model.run_with_sparse_cache(prompt, config=CONFIG)
    with (
        model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: runs.append(x))]),
        pytest.raises(ValueError, match=r"config had layout_from=a SparseActivationCache, .* expected None"),
    ):
        find_budget(model, prompt, config=replace(CONFIG, layout_from=cache), progress=False)
    assert not runs


def nothing(sparse_logits: Tensor, dense_logits: Tensor) -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"low": 5, "high": 4}, ValueError, "low was 5 and high 4; expected 1 <= low <= high"),
        ({"low": 0}, ValueError, "low was 0 and high"),
        ({"match": 0}, ValueError, "match was 0; expected at least 1"),
        ({"match": True}, TypeError, "match was True; expected an int"),
        ({"match": 20_000}, ValueError, "match was 20000 after 80 tokens, more than the model's n_ctx"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "expected at least one token"),
        ({"tokens": torch.zeros(1, 4)}, TypeError, "tokens was of shape"),
        ({"tokens": [1, 2]}, TypeError, "tokens was list; expected integers"),
        ({"over": "tokens"}, ValueError, "over was 'tokens'; expected one of 'k', 'total', 'top_p', or a function"),
        ({"over": 3}, TypeError, "over was 3; expected one of"),
        ({"over": "total", "low": 15}, ValueError, "low was 15 and high 96; expected 16 <= low <= high <= 96"),
        ({"over": "total", "high": 97}, ValueError, "low was 16 and high 97; expected 16 <= low <= high <= 96"),
        ({"over": "total", "low": 30, "high": 20}, ValueError, "low was 30 and high 20"),
        ({"over": "total", "config": StreamConfig(dense_layers=4)}, ValueError, "dense_layers=4, all 4 layers"),
        (
            {"over": "total", "config": StreamConfig(estimator="window")},
            ValueError,
            "estimator='window', which reckons no shares",
        ),
        ({"over": "top_p", "high": 101}, ValueError, "low was 1 and high 101; expected 1 <= low <= high <= 100"),
        (
            {"over": "top_p", "config": StreamConfig(estimator="window")},
            ValueError,
            "estimator='window', which reckons no shares",
        ),
        ({"metric": "kld", "threshold": 1.0}, ValueError, "metric was 'kld'; expected one of 'kl', 'logit_difference'"),
        ({"metric": 3, "threshold": 1.0}, TypeError, "metric was a int"),
        ({"metric": "kl"}, ValueError, "threshold was None with a metric"),
        ({"metric": nothing, "threshold": 1.0}, ValueError, "metric nothing gave NaN at a budget of 1"),
    ],
    ids=str,
)
def test_errors(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        find_budget(model, **{"tokens": needle(model, 80), "progress": False, "config": CONFIG, **arguments})
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before

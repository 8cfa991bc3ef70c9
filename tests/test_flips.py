"""A flip is what it says: generated answers, dense and sparse, differ where it was found; the figures are the audit's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from zoo import build, gap, mask_hooks

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import Flip, find_flips
from tl_stream.analysis.flip_case import Case
from tl_stream.analysis.insertions import GradientTokens

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, estimator="stream")
PROMPTS = [torch.randint(0, 40, (90,), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]


def generated(model: Any, text: torch.Tensor, config: StreamConfig | None, n: int) -> tuple[int, ...]:
    """Greedy answer: the dense model's own for None."""
    options: dict[str, Any] = {"max_new_tokens": n, "do_sample": False, "stop_at_eos": False, "verbose": False}
    if config is None:
        return tuple(model.generate(text[None], use_past_kv_cache=False, **options)[0, len(text) :].tolist())
    tokens = []
    for _ in range(n):  # without a KV cache: as one text
        with tl_stream.sparse(model, config), torch.no_grad():
            tokens.append(int(model(text[None])[0, -1].argmax()))
        text = torch.cat([text, torch.tensor(tokens[-1:])])
    return tuple(tokens)


def with_tokens(prompt: torch.Tensor, flip: Flip, position: int) -> torch.Tensor:
    return torch.cat([prompt[:position], torch.tensor(flip.inserted, dtype=torch.long), prompt[position:]])


@pytest.mark.parametrize("method", ["random", "gcg"])
def test_what_is_found_is_a_flip(method: str) -> None:
    model, config = build("gqa", torch.float32), replace(CONFIG, k=4)
    result = find_flips(model, PROMPTS, config, method=method, trials=48, position=3, progress=False)
    assert any(flip.found for flip in result.prompts)
    for prompt, flip in zip(PROMPTS, result.prompts, strict=True):
        text = with_tokens(prompt, flip, 3)
        assert flip.answer == generated(model, prompt, None, 1)
        assert flip.sparse.same == (generated(model, prompt, config, 1) == flip.answer)
        if not flip.sparse.same:
            continue
        assert flip.vanilla is not None
        assert flip.k_adv is not None
        assert flip.vanilla.same == (generated(model, text, None, 1) == flip.answer)
        for run, read in ((flip.sparse, prompt), (flip.k1, text), (flip.k_adv, text), (flip.k2, text)):
            if run is not None:
                assert run.k is not None
                assert run.same == (generated(model, read, replace(CONFIG, k=run.k), 1) == flip.answer)
        assert flip.k_adv.k == 4
        assert flip.k1 is not None
        assert flip.k1.k == 2
        if flip.found:
            assert flip.vanilla.same
            assert flip.k2 is None or (flip.k2.same and flip.k2.k == 8)


def test_tokens_get_no_credit_where_the_answer_flips_without_them() -> None:
    model = build("gqa", torch.float32)
    result = find_flips(model, PROMPTS, CONFIG, trials=16, progress=False)
    alone = [generated(model, prompt, CONFIG, 1) != generated(model, prompt, None, 1) for prompt in PROMPTS]
    assert 0 < sum(alone) < len(PROMPTS)
    for flip, flips in zip(result.prompts, alone, strict=True):
        assert flip.sparse.same == (not flips)
        if flips:
            assert (flip.found, flip.is_artefact, flip.inserted, flip.tried) == (False, False, (), 0)
            assert list(flip.runs) == ["sparse"]
    assert f"{sum(alone)} flip without tokens" in repr(result)


def test_answers_of_several_tokens() -> None:
    model = build("gqa", torch.float32)
    config = replace(CONFIG, k=4)
    for flip, prompt in zip(
        find_flips(model, PROMPTS, config, match=3, trials=16, progress=False).prompts, PROMPTS, strict=True
    ):
        n = len(flip.answer)  # 3, and those that carry no text
        assert n >= 3
        assert flip.answer == generated(model, prompt, None, n)
        assert flip.sparse.same == (generated(model, prompt, config, n) == flip.answer)


def test_figures_are_the_audits() -> None:
    model = build("gqa", torch.float32)
    (flip,) = find_flips(model, PROMPTS[3:4], CONFIG, trials=4, position=0, progress=False).prompts
    text = with_tokens(PROMPTS[3], flip, 0)[None]
    assert flip.vanilla is not None
    assert flip.k_adv is not None
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    (alone,) = cache.audit().answers
    (rows,) = tl_stream.recheck(model, text, cache).answers
    retained = torch.stack([cache["pattern", layer][0, :, -1:].retained_mass().mean() for layer in range(3)]).mean()
    assert flip.k_adv.retained == pytest.approx(float(retained), abs=1e-6)
    assert (flip.k_adv.chance, flip.k_adv.chance_rechecked) == (alone.flip_chance, rows.flip_chance)
    assert (flip.vanilla.chance, flip.vanilla.chance_rechecked) == (0, 0)
    assert (flip.k_adv.trusted, flip.k_adv.rechecked, flip.k_adv.pruned) == (alone.trusted, rows.trusted, cache.pruned)
    assert (flip.vanilla.retained, flip.vanilla.pruned, flip.vanilla.k) == (pytest.approx(1), 0, None)


def test_slopes_are_those_of_one_hot_vectors() -> None:
    model = build("gqa")
    case = Case(model, PROMPTS[0][None], CONFIG, match=2, n_tokens=3, position=5)
    proposer = GradientTokens(case, torch.arange(40), torch.Generator().manual_seed(0))
    inserted = torch.tensor([4, 7, 9])
    text = case.text(inserted[None])
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)

    def slope(hooks: list[Any]) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(text, len(model.W_E)).to(torch.float64).requires_grad_()
        embed = ("hook_embed", lambda x, hook: one_hot @ model.W_E)
        logits = model.run_with_hooks(text, fwd_hooks=[embed, *hooks])[:, -2:]
        answer = case.answer
        own = logits[0, [0, 1], answer]
        margin = (own - logits[0].scatter(1, answer[:, None], -torch.inf).amax(1)).min()
        return torch.autograd.grad(margin, one_hot)[0][0, 5:8]

    expected = slope(mask_hooks(cache)) - slope([])
    assert expected.abs().max() > 1e-3
    assert gap(proposer._slopes(inserted), expected) < 1e-5


def test_shares_and_tables() -> None:
    result = find_flips(build("gqa", torch.float32), PROMPTS, CONFIG, trials=16, progress=False)
    runs = [run for flip in result.prompts for name, run in flip.runs.items() if name != "vanilla"]
    wrong = [run for run in runs if not run.same]
    assert result.flagged(recheck=False) == sum(not run.trusted for run in wrong) / len(wrong)
    assert result.flagged() == sum(not run.rechecked for run in wrong) / len(wrong)
    right = [run for run in runs if run.same]
    assert result.false_alarms(recheck=False) == sum(not run.trusted for run in right) / len(right)
    assert result.false_alarms() == sum(not run.rechecked for run in right) / len(right)
    frame = result.to_dataframe()
    assert len(frame) == len(runs) + sum("vanilla" in flip.runs for flip in result.prompts)
    assert frame[frame.run == "vanilla"].same.mean() == result.same("vanilla")
    assert result.table().row_count == 9
    assert len(result.plot().data) == 3
    assert f"tokens flipped {sum(flip.found for flip in result.prompts)} of 8 prompts" in repr(result)


def test_the_same_seed_finds_the_same() -> None:
    model = build("gqa", torch.float32)
    a, b = (find_flips(model, PROMPTS[:2], CONFIG, method="gcg", trials=20, progress=False).prompts for _ in range(2))
    assert [flip.inserted for flip in a] == [flip.inserted for flip in b]


def test_the_model_is_left_as_it_was() -> None:
    model = build("gqa", torch.float32)
    generated(model, PROMPTS[0], None, 1)  # TransformerLens notes some things at a first use
    before = {name: (set(module.__dict__), dict(module._forward_pre_hooks)) for name, module in model.named_modules()}
    find_flips(model, PROMPTS[:1], CONFIG, method="gcg", trials=20, progress=False)
    for name, module in model.named_modules():
        assert (set(module.__dict__), dict(module._forward_pre_hooks)) == before[name]
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompts": []}, ValueError, "prompts was"),
        ({"prompts": "text"}, ValueError, "prompts was 'text'; expected a list"),
        ({"prompts": [torch.zeros(2, 5, dtype=torch.long)]}, ValueError, "expected one text"),
        ({"prompts": [torch.zeros(5)]}, TypeError, "expected integers"),
        ({"prompts": [torch.zeros(126, dtype=torch.long)]}, ValueError, "more than the model's n_ctx of 128"),
        ({"method": "luck"}, ValueError, "expected one of 'random', 'gcg'"),
        ({"trials": 0}, ValueError, "trials was 0"),
        ({"n_tokens": 0}, ValueError, "n_tokens was 0"),
        ({"match": 0}, ValueError, "match was 0"),
        ({"position": 91}, ValueError, "position was 91"),
        ({"vocabulary": []}, ValueError, "vocabulary was empty"),
        ({"config": replace(CONFIG, k=tl_stream.budget.Sqrt(1.0))}, TypeError, "config.k was Sqrt"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"prompts": PROMPTS, "config": CONFIG, "progress": False, **change}
    with pytest.raises(error, match=match):
        find_flips(build("gqa", torch.float32), **arguments)

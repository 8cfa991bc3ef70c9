"""A KV cache fills, within contexts and in dense runs, or generation is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import families
import pytest
import torch
import zoo
from test_restoration import assert_same_state, state
from torch import Tensor
from transformers import DynamicCache

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis.needle_run import run_task
from tl_stream.hosts import kv_cache
from tl_stream.hosts.kv_cache import served

HOSTS = ["bridge", pytest.param("hooked", marks=zoo.NEEDS_HOOKED)]
FULL = StreamConfig(block_q=8, block_k=8, k=1000)
LEAST = StreamConfig(block_q=1, block_k=1, k=1)
OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "verbose": False, "stop_at_eos": False}
POINTS = ("hook_embed", "hook_q", "hook_attn_scores", "hook_pattern", "hook_z", "hook_resid_post")
REFUSAL = (
    rf"model can't generate with a KV cache: .* transformer-lens {version('transformer-lens')} and transformers "
    rf"{version('transformers')}"
)


@pytest.fixture(scope="module", params=HOSTS)
def mini(request: pytest.FixtureRequest) -> Any:
    return tl_stream.models.load(host=request.param)


@pytest.fixture
def llama() -> Any:
    return families.build("Llama")


def forget(self: DynamicCache, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return key_states, value_states


def misplace(self: DynamicCache, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    keys, values = _update(self, key_states, value_states, *args, **kwargs)
    return keys.roll(1, 2), values


_update = DynamicCache.update
is_right = kv_cache._is_right


@torch.no_grad()
def test_cached_answers_are_right_densely_and_sparsely(mini: Any) -> None:
    """The needle's number, as without a cache: an empty one makes it another number, and nothing else would tell."""
    task = tl_stream.tasks.niah_single_1(mini.tokenizer, 300, depth=0.4, seed=7)
    prompt = mini.to_tokens(task.prompt)

    def answer(**options: Any) -> str:
        return mini.to_string(mini.generate(prompt, **OPTIONS, **options)[0, prompt.shape[1] :]).replace(" ", "")

    assert answer(use_past_kv_cache=False) == task.answer
    with served(mini):
        assert answer() == task.answer
    with tl_stream.sparse(mini, FULL):
        assert answer() == task.answer
    with tl_stream.sparse(mini, StreamConfig(k=6)):
        assert answer() == task.answer
    assert run_task(mini, task, StreamConfig(k=6)).output.replace(" ", "") == task.answer
    report = tl_stream.fidelity(mini, task.prompt, StreamConfig(k=6), rows=8)
    assert report.output.next_n == 1.0
    assert tl_stream.find_budget(mini, task.prompt, low=6, high=6, progress=False).best is not None


@torch.no_grad()
def test_huggingfaces_loop_is_right_within_a_context(llama: Any) -> None:
    text = families.tokens(20, batch=1)
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False}
    expected = llama.generate(text, **OPTIONS, use_past_kv_cache=False)
    with tl_stream.sparse(llama, FULL):
        assert torch.equal(llama.hf_generate(text, **options), expected)


@pytest.mark.parametrize("update", [forget, misplace])
@torch.no_grad()
def test_a_wrong_cache_is_refused_by_every_study(
    llama: Any, update: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "update", update)
    text = families.tokens(20, batch=1)
    with pytest.raises(NotImplementedError, match=REFUSAL), tl_stream.sparse(llama, FULL):
        llama.generate(text, **OPTIONS)
    with pytest.raises(NotImplementedError, match=REFUSAL), tl_stream.sparse(llama, FULL):
        next(llama.generate_stream(text, max_new_tokens=3))
    with pytest.raises(NotImplementedError, match=REFUSAL), served(llama):
        llama.generate(text, **OPTIONS)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        tl_stream.find_budget(llama, text, low=1, high=1, progress=False)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        tl_stream.fidelity(llama, text, FULL, rows=2)


@torch.no_grad()
def test_generation_without_a_cache_is_not_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "update", forget)
    text = families.tokens(20, batch=1)
    expected = llama.generate(text, **OPTIONS, use_past_kv_cache=False)
    with tl_stream.sparse(llama, FULL):
        assert torch.equal(llama.generate(text, **OPTIONS, use_past_kv_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_rounding_is_no_fault_and_a_fault_no_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPT-2", "Llama", "Qwen2-MoE"):
        kv_cache.check(families.build(name, dtype))
        with monkeypatch.context() as patched:
            patched.setattr(DynamicCache, "update", forget)
            with pytest.raises(NotImplementedError, match=REFUSAL):
                kv_cache.check(families.build(name, dtype))


@pytest.mark.parametrize("build", [lambda: families.build("Llama"), pytest.param(zoo.build, marks=zoo.NEEDS_HOOKED)])
@torch.no_grad()
def test_the_check_leaves_no_trace_and_is_made_once(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a context that keeps next to nothing, under a user's hooks, and with weights shared."""
    model = build().train()
    fired: list[str] = []
    model.add_hook(lambda name: name.endswith(POINTS), lambda x, hook: fired.append(hook.name))
    checks: list[Any] = []

    def noted(twin: Any, method: str) -> bool:
        checks.append(twin)
        return is_right(twin, method)

    monkeypatch.setattr(kv_cache, "_is_right", noted)
    before = state(model)
    with tl_stream.sparse(model, LEAST):
        inside = state(model)
        kv_cache.check(model)
        assert_same_state(inside, state(model))
        n_checks = len(checks)
        kv_cache.check(model)
    assert_same_state(before, state(model))
    assert not fired
    assert len(checks) == n_checks > 0
    addresses = {each.data_ptr() for each in model.parameters()}
    assert all({each.data_ptr() for each in twin.parameters()} == addresses for twin in checks)


@torch.no_grad()
def test_once_it_says_that_plain_transformer_lens_is_wrong() -> None:
    """Where it is: under versions whose names for the cache agree nothing is said."""
    kv_cache._warn_once.cache_clear()
    text = families.tokens(20, batch=1)
    plain = families.build("Llama")
    is_wrong = not torch.equal(plain.generate(text, **OPTIONS), plain.generate(text, **OPTIONS, use_past_kv_cache=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = families.build("Llama")
            with tl_stream.sparse(model, FULL):
                model.generate(text, **OPTIONS)
    said = [each for each in caught if "TransformerLens doesn't find the KV cache" in str(each.message)]
    assert len(said) == is_wrong


@torch.no_grad()
def test_a_cache_under_a_name_that_nothing_reads_is_refused(llama: Any) -> None:
    past = DynamicCache(config=llama.original_model.config)
    text = families.tokens(20)
    with pytest.raises(TypeError, match="past_kv_cache was given, a keyword that neither"):
        llama.run_with_sparse_cache(text, config=FULL, past_kv_cache=past)
    with (
        tl_stream.sparse(llama, FULL),
        pytest.raises(TypeError, match=r"past_kv_cache was given, which LlamaForCausalLM doesn't read; .* past_key_values"),
    ):
        llama(text, past_kv_cache=past)

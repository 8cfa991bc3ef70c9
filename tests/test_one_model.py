"""With one query a block, prefill, the steps of a generation and a run that reads all of it again are one sparse model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.budget import Budget, PerHead, Sqrt, TopP
from tl_stream.estimator.common import PER_OCTAVE, sampled

HOSTS = ["bridge", pytest.param("hooked", marks=zoo.NEEDS_HOOKED)]
ONE = StreamConfig(block_q=1, block_k=8, k=2, beam=2, exact_below=32, seed=0, max_dense=0)
ESTIMATORS = ("auto", "dual", "exact", "stream", "hip", "box", "window", "random")
BUDGETS = [("dual", Sqrt(0.5)), ("window", Sqrt(0.5)), ("dual", TopP(0.8, 6)), ("dual", PerHead({0: 50, (1, 1): 2}, 3))]
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module", params=HOSTS)
def mini(request: pytest.FixtureRequest) -> Any:
    return tl_stream.models.load(host=request.param)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning that earlier keys aren't known would be a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A run read a KV cache")
        with torch.no_grad():
            yield


def needle(model: Any, length: int, seed: int = 1) -> Tensor:
    return model.to_tokens(tl_stream.tasks.niah_single_1(model.tokenizer, length, depth=0.4, seed=seed).prompt)


@contextmanager
def noted(model: Any) -> Iterator[tuple[dict[int, list[Tensor]], list[Tensor]]]:
    """Kept pairs of each run by layer, and logits of each run."""
    kept: dict[int, list[Tensor]] = {}
    logits: list[Tensor] = []

    def note(pattern: Any, hook: Any) -> None:
        kept.setdefault(hook.layer(), []).append(pattern.block_layout.to_dense())

    handle = model.unembed.register_forward_hook(lambda module, args, output: logits.append(output))
    try:
        with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_pattern"), note)]):
            yield kept, logits
    finally:
        handle.remove()


def assert_one(steps: Any, whole: Any, valid: Tensor | None = None, tolerance: float = 1e-4) -> None:
    """Runs of consecutive rows keep what one run of all keeps, and say what it says; padded rows aside."""
    for layer, (full,) in whole[0].items():
        at = 0
        for part in steps[0][layer]:
            rows = slice(at, at + part.shape[2])
            differs = (full[:, :, rows, : part.shape[3]] != part).any(-1)
            assert not (differs if valid is None else differs & valid[:, None, rows]).any(), (layer, at)
            at += part.shape[2]
        assert at == full.shape[2] or at == full.shape[2] - 1  # the last generated token is never read
    said = torch.cat(steps[1], 1)
    gap = (said - whole[1][0][:, : said.shape[1]]).abs()
    assert (gap if valid is None else gap[valid[:, : said.shape[1]]]).max() < tolerance
    assert min(full.sum() / torch.ones_like(full).tril().sum() for (full,) in whole[0].values()) < 0.3


def by_steps(model: Any, text: Tensor, valid: Tensor, cuts: list[int], past: Any = None) -> Any:
    """A prefill up to the first cut, then runs from cut to cut, all of them reading one KV cache."""
    if type(model).__name__ == "HookedTransformer":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        past = past or TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(text))
        for start, stop in zip([0, *cuts], cuts, strict=False):
            model(text[:, start:stop], attention_mask=valid[:, start:stop].long(), past_kv_cache=past)
        return past
    past = past or DynamicCache(config=model.original_model.config)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        model(text[:, start:stop], attention_mask=valid[:, :stop].long(), past_key_values=past, use_cache=True)
    return past


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_generation_is_the_run_that_reads_it_again(mini: Any, estimator: str) -> None:
    check_generation(mini, replace(ONE, estimator=estimator))


@pytest.mark.parametrize(("estimator", "budget"), BUDGETS, ids=repr)
def test_under_every_budget(mini: Any, estimator: str, budget: Budget) -> None:
    check_generation(mini, replace(ONE, estimator=estimator, k=budget, block_k=4))


def check_generation(model: Any, config: StreamConfig) -> None:
    prompt = needle(model, 300)
    with tl_stream.sparse(model, config):
        with noted(model) as steps:
            generated = model.generate(prompt, **OPTIONS)
        with noted(model) as whole:
            again = model(generated)
    assert len(steps[1]) == 16
    if steps[1][0].shape[1] == 1:  # the model unembeds the last position of the prompt alone
        steps[1][0] = torch.cat([whole[1][0][:, : prompt.shape[1] - 1], steps[1][0]], 1)
    assert_one(steps, whole, tolerance=2e-3 * float(again.std()))
    assert torch.equal(again[0, prompt.shape[1] - 1 : -1].argmax(-1), generated[0, prompt.shape[1] :])


MODELS = {
    **{name: lambda name=name: zoo.build(name, n_ctx=256) for name in ("gqa", "alibi", "local", "soft-capped")},
    **{name: lambda name=name: families.build(name, torch.float64, n_ctx=256) for name in ("Llama", "BLOOM", "DeepSeek V3")},
}


@pytest.mark.parametrize(("estimator", "padding"), [("dual", 0), ("dual", 13), ("stream", 13)])
@pytest.mark.parametrize("name", MODELS)
def test_with_padding_on_the_left_and_in_chunks(name: str, estimator: str, padding: int) -> None:
    model, text = MODELS[name](), families.tokens(160) % 40
    valid = torch.ones(2, 160, dtype=torch.bool)
    valid[1, :padding] = False
    with tl_stream.sparse(model, replace(ONE, estimator=estimator, block_k=4, k=3)):
        with noted(model) as steps:
            by_steps(model, text, valid, [120, 121, 122, 150, *range(151, 161)])
        with noted(model) as whole:
            model(text, attention_mask=valid.long())
    assert_one(steps, whole, valid, tolerance=1e-5)


def test_a_cache_that_is_copied_and_cut_goes_on_as_the_text_it_holds() -> None:
    model, text = families.build("Llama", torch.float64, n_ctx=256), families.tokens(180)
    other = torch.cat([text[:, :140], families.tokens(40, seed=1)], 1)
    valid = torch.ones(2, 180, dtype=torch.bool)
    with tl_stream.sparse(model, replace(ONE, estimator="dual", block_k=4)):
        past = by_steps(model, text, valid, [140])
        copied = copy.deepcopy(past)
        for i in range(140, 180):
            model(text[:, i : i + 1], past_key_values=past, use_cache=True)
        past.crop(-30)
        for branch, cached, start in ((text, past, 150), (other, copied, 140)):
            with noted(model) as steps:
                for i in range(start, 180):
                    model(branch[:, i : i + 1], past_key_values=cached, use_cache=True)
            with noted(model) as whole:
                model(branch)
            for layer, (full,) in whole[0].items():
                for i, row in enumerate(steps[0][layer], start):
                    assert torch.equal(full[:, :, i : i + 1, : i + 1], row)


@pytest.mark.parametrize("case", ["elsewhere", "another text", "sliding window"])
def test_once_it_says_where_earlier_keys_are_not_known(case: str) -> None:
    model = families.build("Mistral" if case == "sliding window" else "Llama", torch.float64, n_ctx=256)
    text, valid = families.tokens(90), torch.ones(2, 90, dtype=torch.bool)
    elsewhere = by_steps(model, text, valid, [80])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tl_stream.sparse(model, replace(ONE, estimator="dual", block_k=4)):
            past = elsewhere if case == "elsewhere" else by_steps(model, text, valid, [80])
            if case == "another text":
                model(families.tokens(90, seed=1))
            for i in range(80, 90):
                model(text[:, i : i + 1], past_key_values=past, use_cache=True)
    assert sum("in spite of block_q=1 its rows may choose other key blocks" in str(each.message) for each in caught) == 1


def test_what_is_kept_is_small_and_goes_with_the_context(mini: Any) -> None:
    prompt = needle(mini, 700)
    with tl_stream.sparse(mini, replace(ONE, estimator="dual")) as trace:
        mini.generate(prompt, **OPTIONS)
        rows = sampled(prompt.shape[1] + 15)
        assert len(rows) < PER_OCTAVE * prompt.shape[1].bit_length() / 2
        assert trace.earlier.samples.keys() == {(layer, 0) for layer in range(mini.cfg.n_layers)}
        for sample in trace.earlier.samples.values():
            assert sample.queries.shape[2] == sample.keys.shape[2] == len(rows)
    assert not trace.earlier.samples
    with tl_stream.sparse(mini, StreamConfig(k=2)) as trace:
        mini.generate(prompt, **OPTIONS)
        assert not trace.earlier.samples


RELATIONS = {
    "another sparse model than the steps of generation, each of which chose its blocks for itself": StreamConfig(k=2),
    "another sparse model than the steps of generation, which read everything": StreamConfig(k=2, decode="exact"),
    "the same sparse model as the steps of generation": replace(ONE, estimator="dual"),
    "the dense model, as the steps of generation were": StreamConfig(k=2, forward="exact"),
    "from which nothing was pruned": StreamConfig(k=1000),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_cache_of_a_generation_says_what_it_is_of(relation: str, tmp_path: Any) -> None:
    model: Any = tl_stream.models.load(host="bridge")
    config = RELATIONS[relation]
    prompt = needle(model, 200)
    plain = model.generate(prompt, **OPTIONS, return_cache=True)[1]
    assert not isinstance(plain, SparseActivationCache)
    with tl_stream.sparse(model, config):
        generated, cache, given = model.generate(prompt, **OPTIONS, return_cache=True, return_input_tokens=True)
    assert isinstance(cache, SparseActivationCache)
    assert torch.equal(given, prompt)
    assert repr(cache).endswith(f"; of a run of prompt and generated tokens under {config.changed()}, {relation})")
    again = model.run_with_sparse_cache(generated, config=config)[1]
    assert again.of is None
    assert cache.keys() == again.keys()
    assert cache.pruned == again.pruned
    assert torch.equal(cache["resid_post", 2], again["resid_post", 2])
    assert cache.next_tokens is not None
    assert torch.equal(cache.next_tokens.lead, again.next_tokens.lead)
    cache.save(tmp_path / "cache")
    assert repr(SparseActivationCache.load(tmp_path / "cache")).endswith(f"{relation})")
    assert copy.copy(cache).of == cache.of == cache.apply_slice_to_batch_dim(slice(None)).of

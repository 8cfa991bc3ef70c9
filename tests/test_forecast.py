"""How much a cache will hold is said after its first layer: within a tenth of what it holds."""

from __future__ import annotations

import functools
import warnings
from functools import partial
from typing import Any
from weakref import WeakSet

import families
import pytest
import torch
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.cache import is_pattern

CONFIG = StreamConfig(block_q=8, block_k=8, k=2)
FILTERS: dict[str, Any] = {
    "all": None,
    "patterns": is_pattern,
    "z and resid": lambda name: name.startswith("blocks.") and name.endswith(("hook_z", "hook_resid_post")),
    "later layers": lambda name: name.startswith(("blocks.1.", "blocks.2.")),
    "a list": [f"blocks.{layer}.attn.hook_z" for layer in range(3)],
}


@functools.cache
def made(name: str) -> Any:
    return build("gqa") if name == "HookedTransformer" else families.build(name)


def warned(monkeypatch: pytest.MonkeyPatch, free: float, run: Any) -> list[str]:
    """What a run says where so much is free."""
    monkeypatch.setattr("tl_stream.hosts.forecast.free_bytes", lambda device: int(free))
    monkeypatch.setattr("tl_stream.hosts.forecast._said", WeakSet())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "cache of this run" in str(each.message)]


@pytest.mark.parametrize("name", [pytest.param("HookedTransformer", marks=NEEDS_HOOKED), "GPT-2", "Gemma 3", "Native"])
@pytest.mark.parametrize("filtered", FILTERS)
@torch.no_grad()
def test_within_a_tenth(name: str, filtered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)

    def run() -> Any:
        return model.run_with_sparse_cache(tokens(), config=CONFIG, names_filter=FILTERS[filtered])

    size = run()[1].nbytes
    assert size > 0
    assert not warned(monkeypatch, 2.2 * size, run)
    (said,) = warned(monkeypatch, 1.8 * size, run)
    assert "names_filter=lambda name" in said


@torch.no_grad()
def test_logits_count_as_far_as_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = made("GPT-2"), families.tokens()
    for kept in (None, 1):
        run = partial(model.run_with_sparse_cache, text, config=CONFIG, logits_to_keep=kept)
        size = run()[1].nbytes
        assert not warned(monkeypatch, 2.2 * size, run)
        assert len(warned(monkeypatch, 1.8 * size, run)) == 1


@torch.no_grad()
def test_in_a_context_too_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = made("GPT-2"), families.tokens()
    hooks = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    with tl_stream.sparse(model, CONFIG):
        assert len(warned(monkeypatch, 1, lambda: [model.run_with_cache(text) for _ in range(2)])) == 1
        assert not warned(monkeypatch, 1, lambda: model(text))
    assert not warned(monkeypatch, 1, lambda: model.run_with_cache(text))
    assert not warned(monkeypatch, 1, lambda: model.run_with_sparse_cache(text, names_filter=lambda name: False))
    assert hooks == {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}


@torch.no_grad()
def test_nothing_is_left_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = made("GPT-2"), families.tokens()
    hooks = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}

    def fail(x: Any, hook: Any) -> None:
        raise KeyboardInterrupt

    failing = model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", fail)])
    with tl_stream.sparse(model, CONFIG), failing, pytest.raises(KeyboardInterrupt):
        model.run_with_cache(text)
    assert hooks == {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    assert not model.blocks[1]._forward_pre_hooks


def test_the_advice_works() -> None:
    from tl_stream.hosts.forecast import ADVICE

    for model in (build("gqa"), made("GPT-2")):
        _, cache = model.run_with_sparse_cache(tokens(), **eval(f"dict({ADVICE})"))
        assert cache.patterns
        assert "blocks.0.attn.hook_z" in cache

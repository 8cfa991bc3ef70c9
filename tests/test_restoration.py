"""A model is left exactly as it was found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import NEEDS_HOOKED, build, gap, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.hosts import model_classes

pytestmark = NEEDS_HOOKED

CONFIG = StreamConfig(block_q=8, block_k=8, k=3)
MODEL = next(iter(model_classes()))


def state(model: Any) -> dict[str, Any]:
    """Everything that tracing could leave behind: attributes, hooks and buffers of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[f"{name}.{key}"] = copy.copy(value) if isinstance(value, dict | list) else value
        if hasattr(module, "fwd_hooks"):
            found[f"{name}.hooks"] = [handle.user_hook for handle in module.fwd_hooks + module.bwd_hooks]
    return found


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith((".fwd_hooks", ".bwd_hooks", "ctx")):
            assert len(value) == len(after[name]), name
        elif isinstance(value, dict):
            assert value.keys() == after[name].keys(), name
            assert all(value[key] is after[name][key] for key in value), name
        else:
            assert value is after[name] or value == after[name], name


class Stop(Exception):
    pass


def fail(activation: Any, hook: Any) -> None:
    raise Stop


def interrupt(activation: Any, hook: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("variant", ["gqa", "alibi", "local", "sinks"])
@pytest.mark.parametrize(("hook", "error"), [(None, None), (fail, Stop), (interrupt, KeyboardInterrupt)], ids=str)
@torch.no_grad()
def test_the_model_is_restored(variant: str, hook: Callable[..., None] | None, error: type[BaseException] | None) -> None:
    model, text = build(variant), tokens()
    model.add_hook("blocks.0.attn.hook_pattern", lambda pattern, hook: None)
    expected = model(text)
    before = state(model)
    if error is None:
        model.run_with_sparse_cache(text, config=CONFIG)
    else:
        for point in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.2.hook_resid_pre"):
            with pytest.raises(error), model.hooks(fwd_hooks=[(point, hook)]):
                model.run_with_sparse_cache(text, config=CONFIG, logits_to_keep=1)
    assert_same_state(before, state(model))
    assert gap(model(text), expected) == 0


@torch.no_grad()
def test_restored_after_refused_input() -> None:
    model = build("gqa")
    before = state(model)
    for config in (StreamConfig(dense_layers=4), "k=3"):
        with pytest.raises((ValueError, TypeError)):
            model.run_with_sparse_cache(tokens(), config=config)
    with pytest.raises(ValueError, match="n_ctx"):
        model.run_with_sparse_cache(tokens(129))
    assert_same_state(before, state(model))


@torch.no_grad()
def test_contexts_nest_and_the_inner_one_counts() -> None:
    model, text = build("gqa"), tokens()
    before = state(model)
    wide, narrow = StreamConfig(block_q=8, block_k=8, k=5), StreamConfig(block_q=8, block_k=8, k=2)
    expected = {config.k: model.run_with_sparse_cache(text, config=config)[0] for config in (wide, narrow)}
    with tl_stream.sparse(model, wide):
        assert gap(model(text), expected[5]) == 0
        with tl_stream.sparse(model, narrow):
            assert gap(model(text), expected[2]) == 0
        assert gap(model(text), expected[5]) == 0
    assert_same_state(before, state(model))


@pytest.mark.parametrize("variant", ["gqa", "alibi"])
@torch.no_grad()
def test_a_deep_copy_made_within_is_an_ordinary_model(variant: str) -> None:
    model, text = build(variant), tokens()
    expected = model(text)
    with tl_stream.sparse(model, CONFIG):
        twin = copy.deepcopy(model)
        sparse_output = model(text)
        assert gap(twin(text), expected) == 0
        with pytest.raises(ValueError, match="nothing is cut off"):
            model(tokens(129))
        assert twin.blocks[0].attn.hook_pattern(text) is text
        assert gap(model(text), sparse_output) == 0
    assert gap(twin(text), expected) == 0
    assert gap(twin.run_with_sparse_cache(text, config=CONFIG)[0], sparse_output) == 0
    assert gap(model(text), expected) == 0


@torch.no_grad()
def test_two_models_don_t_disturb_each_other() -> None:
    one, other, text = build("alibi"), build("alibi", seed=5), tokens()
    expected = other(text)
    with tl_stream.sparse(one, CONFIG):
        assert gap(other(text), expected) == 0


@torch.no_grad()
def test_reset_hooks_does_not_end_the_tracing() -> None:
    model, text = build("gqa"), tokens()
    expected, _ = model.run_with_sparse_cache(text, config=CONFIG)
    with tl_stream.sparse(model, CONFIG):
        model.reset_hooks()
        assert gap(model(text), expected) == 0
        model.reset_hooks(including_permanent=True)
        assert gap(model.run_with_cache(text)[0], expected) == 0


def test_importing_registers_the_method_and_nothing_else() -> None:
    assert vars(MODEL)["run_with_sparse_cache"] is tl_stream.run_with_sparse_cache
    tl_stream.register()
    added = {name for name, value in vars(MODEL).items() if "tl_stream" in str(getattr(value, "__module__", ""))}
    assert added == {"run_with_sparse_cache"}


def test_registering_refuses_to_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: Any) -> None: ...

    monkeypatch.setattr(MODEL, "run_with_sparse_cache", theirs)
    with pytest.raises(AttributeError, match=r"exists already.*does not overwrite it"):
        tl_stream.register()
    assert vars(MODEL)["run_with_sparse_cache"] is theirs

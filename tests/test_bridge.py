"""What TransformerBridge must keep doing while it is traced: its hooks, its cache, its options, and its own state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked
from families import build, tokens
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

import tl_stream
from tl_stream import StreamConfig
from tl_stream.hosts.kv_cache import served

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)
KINDS = ("GPT-2", "Llama", "Gemma 2", "OPT", "GPT-Neo", "GPT-OSS")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def state(model: Any) -> dict[str, Any]:
    """Everything on every module that tracing could leave behind, and the registries."""
    found: dict[str, Any] = {"masks": sorted(AttentionMaskInterface._global_mapping)}
    found["attention"] = sorted(AttentionInterface._global_mapping)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_fired_hook_out", "_suppress_next_hook_in"):
                continue  # TransformerLens's own notes of any run
            found[f"{name}.{key}"] = (
                list(value.items()) if isinstance(value, dict) else value[:] if isinstance(value, list) else value
            )
        config = getattr(module, "config", None)
        found[f"{name} implementation"] = getattr(config, "_attn_implementation", None)
    return found


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, list):
            same = len(value) == len(other) and all(
                a[0] == b[0] and a[1] is b[1] if isinstance(a, tuple) else a == b for a, b in zip(value, other, strict=True)
            )
        else:
            same = value is other or isinstance(value, Tensor) or value == other
        assert same, (key, value, other)


def fail(x: Any, hook: Any) -> None:
    raise RuntimeError("from a hook")


def interrupt(x: Any, hook: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("hook", "error"), [(None, None), (fail, RuntimeError), (interrupt, KeyboardInterrupt)], ids=["success", "error", "Ctrl-C"]
)
@torch.no_grad()
def test_the_model_is_restored(model: Any, hook: Callable[..., None] | None, error: type[BaseException] | None) -> None:
    text = tokens()
    expected = model.run_with_cache(text)[0]
    before = state(model)
    if error is None:
        model.run_with_sparse_cache(text, config=PRUNED, logits_to_keep=2)
    else:
        for point in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.q.hook_out"):
            with pytest.raises(error), model.hooks(fwd_hooks=[(point, hook)]):
                model.run_with_sparse_cache(text, config=PRUNED)
    assert_same_state(before, state(model))
    assert torch.equal(model(text), expected)


@torch.no_grad()
def test_every_activation_equals_the_dense_ones(model: Any) -> None:
    text = tokens()
    logits, dense = model.run_with_cache(text)
    ours, cache = model.run_with_sparse_cache(text, config=FULL)
    assert close(ours, logits)
    assert set(dense.keys()) == set(cache.keys())
    for name in dense.cache_dict:
        expected, found = dense[name], cache[name]
        if expected is None or name.endswith("hook_attn_scores"):
            continue  # hidden scores are the least number in Hugging Face's models, -inf here
        found = found.to_dense() if hasattr(found, "block_layout") else found
        assert close(found.float(), expected.float(), 1e-3), name


@pytest.mark.parametrize("options", [{}, {"fold_ln": False}, {"no_processing": True}], ids=str)
@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Gemma 2"])
@torch.no_grad()
def test_compatibility_mode(family: str, options: dict[str, Any]) -> None:
    model, text = build(family), tokens()
    model.enable_compatibility_mode(disable_warnings=True, **options)
    valid = torch.ones_like(text)
    valid[0, :9] = 0
    for kwargs in ({}, {"attention_mask": valid}):
        logits, cache = model.run_with_sparse_cache(text, config=FULL, **kwargs)
        dense_logits, dense = model.run_with_cache(text, **kwargs)
        real = valid.bool() if kwargs else slice(None)
        assert close(logits[real], dense_logits[real])
        assert list(dense.keys()) == list(cache.keys())
        logits, cache = model.run_with_sparse_cache(text, config=PRUNED, **kwargs)
        keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
        with EditedAttention(keep, text.shape[1], masked(keep)):
            assert close(logits[real], model(text, **kwargs)[real])


@pytest.mark.parametrize("point", ["q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in", "hook_rot_q", "hook_rot_k"])
@torch.no_grad()
def test_hooks_that_multiply_matrices(point: str) -> None:
    """Only the model's own product of q and k is captured."""
    model, text = build("Llama"), tokens()
    seen = []

    def multiply(x: Tensor, hook: Any) -> Tensor:
        x = x if x.dim() == 4 else x.unflatten(-1, (-1, 8))
        heads = x.transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2)
        seen.append(type(scores))
        return x * (1 + scores.mean() * 0)

    hooks = [(lambda name: name.endswith(f"attn.{point}"), multiply)]
    expected = model.run_with_hooks(text, fwd_hooks=hooks)
    with tl_stream.sparse(model, FULL):
        assert close(model.run_with_hooks(text, fwd_hooks=hooks), expected)
    assert set(seen) == {Tensor}


@pytest.mark.parametrize(
    "point", ["hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_mlp_out"]
)
@torch.no_grad()
def test_edits_elsewhere(model: Any, point: str) -> None:
    text, keep = tokens(), {}

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, 5:9] *= 1.5
        return x

    def note(pattern: Any, hook: Any) -> None:
        keep[pattern._data.origin.layer] = pattern.block_layout.to_dense()

    hooks = [(f"blocks.1.{point}", edit)]
    with tl_stream.sparse(model, PRUNED):
        logits = model.run_with_hooks(text, fwd_hooks=[*hooks, (lambda name: name.endswith("hook_pattern"), note)])
    with EditedAttention(keep, text.shape[1], masked(keep)):
        assert close(logits, model.run_with_hooks(text, fwd_hooks=hooks))


@torch.no_grad()
def test_contexts_nest_and_the_inner_one_counts(model: Any) -> None:
    text = tokens()
    model.run_with_cache(text)
    before = state(model)
    expected = {config: model.run_with_sparse_cache(text, config=config)[0] for config in (FULL, PRUNED)}
    with tl_stream.sparse(model, FULL):
        assert torch.equal(model(text), expected[FULL])
        with tl_stream.sparse(model, PRUNED):
            assert torch.equal(model(text), expected[PRUNED])
        assert torch.equal(model(text), expected[FULL])
    assert_same_state(before, state(model))


@torch.no_grad()
def test_a_deep_copy_made_within_is_an_ordinary_model(model: Any) -> None:
    text = tokens()
    expected = model(text)
    with tl_stream.sparse(model, PRUNED, logits_to_keep=3):
        twin = copy.deepcopy(model)
        assert close(twin(text), expected, 1e-6)
        sparse_logits = model(text)
    assert close(twin(text), expected, 1e-6)
    assert torch.equal(model(text), expected)
    assert close(twin.run_with_sparse_cache(text, config=PRUNED, logits_to_keep=3)[0], sparse_logits, 1e-6)


@torch.no_grad()
def test_reset_hooks_does_not_end_the_tracing(model: Any) -> None:
    text = tokens()
    expected, _ = model.run_with_sparse_cache(text, config=PRUNED)
    with tl_stream.sparse(model, PRUNED):
        model.reset_hooks()
        assert torch.equal(model(text), expected)


@torch.no_grad()
def test_two_models_dont_disturb_each_other() -> None:
    one, other, text = build("Llama"), build("GPT-2"), tokens()
    expected = other(text)
    with tl_stream.sparse(one, PRUNED):
        assert torch.equal(other(text), expected)
        with tl_stream.sparse(other, FULL):
            assert close(other(text), expected)


@torch.no_grad()
def test_options_of_run_with_cache(model: Any) -> None:
    text = tokens(batch=1)
    dense_logits, dense = model.run_with_cache(text, pos_slice=-1, remove_batch_dim=True)
    logits, cache = model.run_with_sparse_cache(text, config=FULL, pos_slice=-1, remove_batch_dim=True)
    assert close(logits, dense_logits)
    row = cache["pattern", 1]
    row = row.to_dense() if hasattr(row, "block_layout") else row
    assert close(row, dense["pattern", 1])
    stopped, cache = model.run_with_sparse_cache(text, config=FULL, stop_at_layer=1)
    assert close(stopped, model.run_with_cache(text, stop_at_layer=1)[0])
    assert list(cache.patterns) == [0]
    name = "blocks.1.attn.hook_pattern"
    _, plain = model.run_with_sparse_cache(text, config=FULL, names_filter=name, return_cache_object=False)
    assert list(plain) == [name]
    last, _ = model.run_with_sparse_cache(text, config=FULL, logits_to_keep=2)
    assert close(last, dense_logits[:, -2:])


def test_gradients_of_a_loss(model: Any) -> None:
    text = tokens()
    loss, cache = model.run_with_sparse_cache(text, config=FULL, incl_bwd=True, return_type="loss")
    dense_loss, dense = model.run_with_cache(text, incl_bwd=True, return_type="loss")
    assert close(loss, dense_loss)
    for name in ("blocks.1.attn.hook_z", "blocks.0.hook_out", "blocks.1.attn.q.hook_out"):
        grad = f"{name}_grad"
        if grad in dense.cache_dict:
            assert close(cache[grad] * 100, dense[grad] * 100), name
    gradient = cache["blocks.1.attn.hook_pattern_grad"]
    assert gradient.shape == cache["pattern", 1].shape


@torch.no_grad()
def test_text_and_tokens_that_are_too_long() -> None:
    model = build("Llama")
    with pytest.raises(ValueError, match="tokens were 129 long, more than the model's n_ctx of 128; nothing is cut off"):
        model.run_with_sparse_cache(tokens(129), config=PRUNED)
    with pytest.raises(ValueError, match="nothing is cut off silently"):
        model.run_with_sparse_cache(" ".join(["w5"] * 200), config=PRUNED)
    with pytest.raises(ValueError, match="expected at least one text of at least one token"):
        model.run_with_sparse_cache(tokens(0), config=PRUNED)
    logits, _ = model.run_with_sparse_cache("w5 w6 w7", config=FULL)
    assert close(logits, model("w5 w6 w7"))


@torch.no_grad()
def test_a_failed_run_leaves_the_kv_cache_as_it_was(model: Any) -> None:
    text = tokens()
    past: Any = DynamicCache(config=model.original_model.config)
    with served(model):
        model(text[:, :30], past_key_values=past, use_cache=True)
    before = [layer.keys.clone() for layer in past.layers]
    with pytest.raises(RuntimeError, match="from a hook"), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", fail)]):
        model.run_with_sparse_cache(text[:, 30:], config=FULL, past_key_values=past, use_cache=True)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(past.layers, before, strict=True))
    expected = model(text)[:, 30:]
    assert close(model.run_with_sparse_cache(text[:, 30:], config=FULL, past_key_values=past, use_cache=True)[0], expected)


def test_importing_registers_the_method() -> None:
    assert vars(TransformerBridge)["run_with_sparse_cache"] is tl_stream.run_with_sparse_cache


@torch.no_grad()
def test_32k_tokens_in_linear_memory() -> None:
    from allocations import LargestTensor

    length = 32768
    model = build("Llama", n_ctx=length)
    config = StreamConfig(block_q=64, block_k=64, k=16, estimator="dual", beam=2, leaf_queries=4, max_dense=0)
    with LargestTensor() as seen:
        _, cache = model.run_with_sparse_cache(
            families.tokens(length, batch=1), config=config, logits_to_keep=1, names_filter=lambda name: "hook_pattern" in name
        )
    assert cache.pruned > 0.9
    assert seen.numel < length * length / 32

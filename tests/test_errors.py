"""Bad input: the error names the argument, what it was, what was expected and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from zoo import NEEDS_HOOKED, build, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.budget import Constant, Linear, PerHead, Sqrt, TopP

pytestmark = NEEDS_HOOKED


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"k": 0}, ValueError, "k was 0; expected an int >= 1"),
        ({"k": -3}, ValueError, "k was -3; expected an int >= 1"),
        ({"k": 2.5}, TypeError, "k was 2.5 of type float; expected an int >= 1"),
        ({"k": True}, TypeError, "k was True of type bool"),
        ({"block_q": 0}, ValueError, "block_q was 0; expected an int >= 1"),
        ({"block_k": -1}, ValueError, "block_k was -1; expected an int >= 1"),
        ({"beam": 0}, ValueError, "beam was 0"),
        ({"leaf_queries": 0}, ValueError, "leaf_queries was 0"),
        ({"max_dense": -1}, ValueError, "max_dense was -1; expected an int >= 0"),
        (
            {"estimator": "magic"},
            ValueError,
            "estimator was 'magic'; expected one of 'auto', 'dual', 'exact', 'stream', 'hip', 'box'",
        ),
        ({"estimator": 3}, ValueError, "estimator was 3; expected one of 'auto'"),
        ({"exact_below": -1}, ValueError, "exact_below was -1; expected an int >= 0"),
        ({"k": TopP(0.9), "estimator": "window"}, ValueError, "which reckons no shares of attention"),
        ({"k": PerHead({0: TopP(0.9)}), "estimator": "random", "seed": 0}, ValueError, "which reckons no shares of attention"),
        ({"backend": "cuda"}, ValueError, "backend was 'cuda'; expected one of 'gather', 'reference'"),
        ({"estimator": "random"}, ValueError, "seed was None with estimator='random'"),
        ({"dense_layers": -1}, ValueError, "dense_layers was -1"),
        ({"dense_layers": (0, -1)}, ValueError, "dense_layers was -1"),
        ({"dense_layers": "all"}, TypeError, "dense_layers was 'all' of type str"),
        ({"keep_sink": 1}, TypeError, "keep_sink was 1; expected True or False"),
    ],
    ids=str,
)
def test_config(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text.replace("(", r"\(")):
        StreamConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        (TopP, {"p": 0.0}, ValueError, "p was 0.0; expected a number above 0 and at most 1"),
        (TopP, {"p": 1.5}, ValueError, "p was 1.5; expected a number above 0 and at most 1"),
        (TopP, {"p": "half"}, TypeError, "p was 'half' of type str; expected a number"),
        (TopP, {"p": 0.5, "at_most": 0}, ValueError, "at_most was 0; expected an int >= 1: a budget must keep something"),
        (Constant, {"k": 0}, ValueError, "k was 0; expected an int >= 1"),
        (Sqrt, {"scale": 0}, ValueError, "scale was 0; expected a number above 0: a budget must keep something"),
        (Linear, {"fraction": 1.01}, ValueError, "fraction was 1.01; expected a number above 0 and at most 1"),
        (Linear, {"fraction": 0.5, "at_least": True}, TypeError, "at_least was True of type bool"),
        (Linear, {"fraction": float("nan")}, ValueError, "fraction was nan"),
        (PerHead, {"budgets": [4, 4]}, TypeError, "budgets was a list; expected a dict"),
        (PerHead, {"budgets": {(0, 1, 2): 4}}, ValueError, "budgets had the key (0, 1, 2); expected a layer index or"),
        (PerHead, {"budgets": {0: "4"}}, TypeError, "budgets[0] was '4' of type str"),
        (PerHead, {"budgets": {}, "otherwise": 0}, ValueError, "otherwise was 0; expected an int >= 1"),
    ],
)
def test_budgets(kind: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        kind(**options)


@pytest.mark.parametrize("dense_layers", [4, (1, 3)])
def test_layers_that_do_not_exist(dense_layers: Any) -> None:
    with pytest.raises(ValueError, match=r"dense_layers was .* but the model has 3 layers"):
        build().run_with_sparse_cache(tokens(), config=StreamConfig(dense_layers=dense_layers))


@pytest.mark.parametrize("config", [{"k": 3}, "k=3", 3], ids=repr)
def test_config_of_the_wrong_type(config: Any) -> None:
    with pytest.raises(TypeError, match=r"config was a \w+; expected a tl_stream.StreamConfig"):
        build().run_with_sparse_cache(tokens(), config=config)


def test_tokens_longer_than_n_ctx() -> None:
    model = build("gqa")
    with pytest.raises(ValueError, match=r"tokens were 129 long, more than the model's n_ctx of 128"):
        model.run_with_sparse_cache(tokens(129))
    with tl_stream.sparse(model), pytest.raises(ValueError, match="nothing is cut off"):
        model(tokens(200))


def test_text_longer_than_n_ctx_is_not_cut() -> None:
    model: Any = tl_stream.models.load(host="hooked")
    text = "the grass is green . " * (model.cfg.n_ctx // 5 + 10)
    with pytest.raises(ValueError, match="more than the model's n_ctx"):
        model.run_with_sparse_cache(text)
    with tl_stream.sparse(model), pytest.raises(ValueError, match="more than the model's n_ctx"):
        model.to_tokens(text)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)], ids=str)
def test_empty_input(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least one text of at least one token"):
        build().run_with_sparse_cache(torch.zeros(shape, dtype=torch.long))


def test_empty_residual_stream() -> None:
    with pytest.raises(ValueError, match="expected at least one of each"), tl_stream.sparse(model := build()):
        model(torch.zeros(1, 0, 32, dtype=torch.float64), start_at_layer=1)


@pytest.mark.parametrize("weight", ["W_Q", "W_K"])
def test_nan_weights(weight: str) -> None:
    model = build("standard")
    with torch.no_grad():
        getattr(model.blocks[1].attn, weight)[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{weight[-1].lower()} of layer 1 holds NaN; expected numbers"):
        model.run_with_sparse_cache(tokens())


def test_nan_values() -> None:
    model = build("standard")
    with torch.no_grad():
        model.blocks[1].attn.W_V[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"v of layer 1 holds NaN; expected numbers"):
        model.run_with_sparse_cache(tokens())


def test_bidirectional_models() -> None:
    model = build("standard", attention_dir="bidirectional")
    with pytest.raises(ValueError, match="its attention_dir is 'bidirectional'"):
        model.run_with_sparse_cache(tokens())


def test_other_models() -> None:
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=16, d_head=4, d_vocab=10, act_fn="gelu", attention_dir="bidirectional"
    )
    for model in (HookedEncoder(cfg), torch.nn.Linear(2, 2), None):
        with pytest.raises(
            TypeError, match=r"expected a HookedTransformer or a TransformerBridge of transformer_lens \(encoders"
        ):
            tl_stream.run_with_sparse_cache(model, tokens())


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError)], ids=str)
def test_logits_to_keep(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"logits_to_keep was {n}; expected an int >= 1"):
        build().run_with_sparse_cache(tokens(), logits_to_keep=n)


def test_a_failed_run_leaves_the_kv_cache_as_it_was() -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model, text = build("gqa"), tokens()
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    ones = torch.ones_like(text)
    model(text, past_kv_cache=past, attention_mask=ones)

    def fail(activation: Any, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", fail)]), pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_sparse_cache(text[:, :5], past_kv_cache=past, attention_mask=ones[:, :5])
    assert [entry.past_keys.shape[1] for entry in past.entries] == [61, 61, 61]
    assert past.previous_attention_mask.shape[1] == 61


def test_more_blocks_than_there_are_is_full_attention_and_said() -> None:
    _, cache = build("gqa").run_with_sparse_cache(tokens(), config=StreamConfig(block_q=8, block_k=8, k=8))
    assert cache.pruned == 0
    assert "full" in repr(cache["pattern", 0])
    assert "full" in repr(cache.block_layout(0))


def test_missing_patterns() -> None:
    _, cache = build("gqa").run_with_sparse_cache(tokens(), names_filter="blocks.1.attn.hook_z")
    with pytest.raises(KeyError, match=r"layer was 0; expected one whose pattern is in the cache: \[\]"):
        cache.block_layout(0)
    with pytest.raises(ValueError, match="The cache holds no pattern"):
        _ = cache.pruned
    with pytest.raises(IndexError, match="rows were"):
        build("gqa").run_with_sparse_cache(tokens())[1].exact_rows(1, [61])

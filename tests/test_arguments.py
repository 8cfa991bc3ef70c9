"""Keywords that nobody takes, tokens that the model doesn't know and models without data are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import families
import pytest
import torch
import zoo
from test_contexts import state
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig, distribute, recheck

BUILD: dict[str, Callable[[], Any]] = {
    "HookedTransformer": partial(zoo.build, "gqa", torch.float32),
    **{name: partial(families.build, name) for name in ("Llama", "GPT-2", "BLOOM", "Native")},
}
if not zoo.HAS_HOOKED:
    del BUILD["HookedTransformer"]
TEXT = zoo.tokens(29)


@pytest.fixture(params=BUILD)
def model(request: pytest.FixtureRequest) -> Any:
    return BUILD[request.param]()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("confg", "config"), ("name_filter", "names_filter"), ("logit_to_keep", "logits_to_keep"), ("posslice", "pos_slice"),
        ("attn_mask", "attention_mask"), ("attention_masks", "attention_mask"), ("returntype", "return_type"),
    ],
)  # fmt: skip
def test_mistyped_keywords(model: Any, given: str, meant: str) -> None:
    before = state(model)
    with pytest.raises(TypeError, match=f"{given} was given, a keyword that neither .* takes; did you mean '{meant}'?"):
        model.run_with_sparse_cache(TEXT, **{given: None})
    assert state(model) == before


def test_keywords_unlike_any(model: Any) -> None:
    with pytest.raises(TypeError, match=r"xyzzy was given, .* expected one of .*attention_mask, .*names_filter, .*return_type"):
        model.run_with_sparse_cache(TEXT, xyzzy=1)


def test_of_the_other_host() -> None:
    with pytest.raises(TypeError, match=r"past_kv_cache was given, .* did you mean '\w*past_k\w+'"):
        families.build("Llama").run_with_sparse_cache(TEXT, past_kv_cache=None)


@torch.no_grad()
def test_of_other_functions(model: Any) -> None:
    _, cache = model.run_with_sparse_cache(TEXT)
    with pytest.raises(TypeError, match=r"attn_mask was given, .* the model's forward takes; did you mean 'attention_mask'?"):
        recheck(model, TEXT, cache, attn_mask=torch.ones_like(TEXT))
    with pytest.raises(TypeError, match=r"sampel was given, .* did you mean 'sample'?"):
        recheck(model, TEXT, cache, sampel=3)
    with pytest.raises(TypeError, match=r"attn_mask was given, .* did you mean 'attention_mask'?"):
        distribute(model, TEXT, 2, attn_mask=torch.ones_like(TEXT))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'names_filter'"):
        distribute(model, TEXT, 2, names_filter="hook_z")


@torch.no_grad()
def test_everything_that_a_run_takes(model: Any) -> None:
    options: dict[str, Any] = {
        "names_filter": lambda name: name.endswith("hook_pattern"), "device": "cpu", "incl_bwd": False, "pos_slice": None,
        "reset_hooks_end": True, "clear_contexts": False, "return_type": "logits", "loss_per_token": False, "prepend_bos": None,
        "padding_side": None, "attention_mask": torch.ones_like(TEXT), "stop_at_layer": None, "start_at_layer": None,
    }  # fmt: skip
    hugging_face = {"use_cache": False, "output_hidden_states": False, "output_attentions": True, "return_dict": True}
    expected, _ = model.run_with_cache(TEXT)
    if not hasattr(model, "original_model"):
        del options["attention_mask"]  # it needs a tokenizer
    elif hasattr(model.original_model, "config"):
        options |= hugging_face
    logits, _ = model.run_with_sparse_cache(TEXT, config=StreamConfig(k=1000), **options)
    assert zoo.gap(logits, expected) < 1e-4


def test_a_config_without_its_name(model: Any) -> None:
    with pytest.raises(TypeError, match=r"A StreamConfig was given without a name, .* expected config=StreamConfig"):
        model.run_with_sparse_cache(TEXT, StreamConfig())


def changed(at: Any, value: int) -> Tensor:
    x = TEXT.clone()
    x[at] = value
    return x


INTEGERS = r"expected int64 of shape \[batch, pos\] or \[pos\], or text"
TOKENS: dict[str, tuple[Tensor, type[Exception], str]] = {
    "float": (TEXT.float(), TypeError, rf"tokens was of shape \(2, 29\) and torch.float32; {INTEGERS}"),
    "bool": (TEXT > 3, TypeError, rf"tokens was of shape \(2, 29\) and torch.bool; {INTEGERS}"),
    "uint8": (TEXT.byte(), TypeError, rf"tokens was of shape \(2, 29\) and torch.uint8; {INTEGERS}"),
    "3-d": (TEXT[None], TypeError, rf"tokens was of shape \(1, 2, 29\) and torch.int64; {INTEGERS}"),
    "beyond the vocabulary": (changed((1, 3), 10**6), ValueError, "tokens held 1000000; expected numbers from 0 to "),
    "negative": (changed((0, 0), -1), ValueError, "tokens held -1; expected numbers from 0 to "),
    "none": (TEXT[:, :0], ValueError, "expected at least one text of at least one token"),
    "meta": (TEXT.to("meta"), ValueError, "tokens was on the meta device, where tensors have no data"),
}


@pytest.mark.parametrize("what", TOKENS)
@torch.no_grad()
def test_tokens(model: Any, what: str) -> None:
    tokens, error, text = TOKENS[what]
    expected = model(TEXT)
    with pytest.raises(error, match=text), tl_stream.sparse(model):
        model(tokens)
    before = state(model)
    with pytest.raises(error, match=text):
        model.run_with_sparse_cache(tokens)
    assert state(model) == before
    assert torch.equal(model(TEXT), expected)


@pytest.mark.parametrize("tokens", [TEXT[0], TEXT.int(), TEXT[:, :1]], ids=["1-d", "int32", "one"])
@torch.no_grad()
def test_tokens_that_a_model_takes(model: Any, tokens: Tensor) -> None:
    logits, _ = model.run_with_sparse_cache(tokens, config=StreamConfig(k=1000))
    assert zoo.gap(logits, model(tokens)) < 1e-4


@torch.no_grad()
def test_embeddings_in_place_of_tokens() -> None:
    model = families.build("Llama")
    embedded = model.original_model.get_input_embeddings()(TEXT)
    config = StreamConfig(block_q=8, block_k=8, k=2)
    expected, _ = model.run_with_sparse_cache(TEXT, config=config)
    assert torch.equal(model.run_with_sparse_cache(embedded, config=config)[0], expected)
    with pytest.raises(ValueError, match="nothing is cut off silently"):
        model.run_with_sparse_cache(embedded.repeat(1, 100, 1))


def test_models_on_the_meta_device(model: Any) -> None:
    model.to("meta")
    reason = "model can't be traced: its weights are on the meta device, where tensors have no data"
    support = tl_stream.supports(model)
    assert not support
    assert reason in str(support.reason)
    with pytest.raises(ValueError, match=re.escape(reason)):
        model.run_with_sparse_cache(TEXT)
    with pytest.raises(ValueError, match=re.escape(reason)), tl_stream.sparse(model):
        pass

"""A run that will take longer than the dense model says so, once; others say nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import families
import pytest
import torch
from zoo import NEEDS_HOOKED, build

import tl_stream
from tl_stream import StreamConfig
from tl_stream.budget import PerHead, TopP
from tl_stream.hosts.price import LEAST_TOKENS, relative_price, window_of

FINE = StreamConfig(block_q=1, block_k=1, k=32)


def said(monkeypatch: pytest.MonkeyPatch, run: Any, fresh: bool = True) -> list[str]:
    if fresh:
        monkeypatch.setattr("tl_stream.hosts.price._said", WeakKeyDictionary())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "times as long" in str(each.message)]


def shaped(n_layers: int, n_heads: int, d_head: int, parameters: int, window: int | None, every: int) -> tuple[Any, Any]:
    """What the estimate asks of a model: sizes, and the window of each layer but every so many."""
    blocks = torch.nn.Linear(parameters // 100, 100, bias=False, device="meta")
    model = SimpleNamespace(cfg=SimpleNamespace(n_heads=n_heads, d_head=d_head, n_layers=n_layers), blocks=blocks)
    windows = [None if window is None or i % every == every - 1 else window for i in range(n_layers)]
    return model, {i: SimpleNamespace(original_component=SimpleNamespace(sliding_window=w)) for i, w in enumerate(windows)}


SMOLLM2: Any = shaped(30, 9, 64, 106_000_000, None, 1)
GEMMA: Any = shaped(18, 4, 256, 100_000_000, 512, 6)


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA], ids=["SmolLM2", "Gemma 3"])
def test_the_price_of_real_models(model: Any) -> None:
    """Blocks of one token are dear on a short text and less so on a long one; the defaults are never dear."""

    def price(config: StreamConfig, n: int) -> float:
        return relative_price(model[0], model[1], config, n)

    default, short, long = price(StreamConfig(), 1100), price(FINE, 1100), price(replace(FINE, estimator="exact"), 4096)
    assert default < 1.2
    assert short > 1.3
    assert long < short
    assert price(StreamConfig(), 8192) < 0.5
    assert price(StreamConfig(block_k=8), 2048) < 0.9
    assert price(replace(FINE, estimator="dual"), 8192) > price(StreamConfig(), 8192)


@pytest.mark.parametrize(
    "config",
    [
        StreamConfig(k=2**31), StreamConfig(k=TopP(0.9)), StreamConfig(k=PerHead({0: 3, (1, 2): TopP(0.5)}, 4)),
        StreamConfig(forward="exact"), StreamConfig(dense_layers=30), StreamConfig(estimator="window", k=4),
        StreamConfig(estimator="random", seed=0), StreamConfig(estimator=lambda problem, pos: problem.readable_blocks()),
        StreamConfig(estimator="stream"), StreamConfig(estimator="hip"), StreamConfig(estimator="box", leaf_queries=2),
    ],
    ids=StreamConfig.changed,
)  # fmt: skip
def test_every_config_has_a_price(config: StreamConfig) -> None:
    model, layers = SMOLLM2
    assert 0 < relative_price(model, layers, config, 4096) < 1.3


@torch.no_grad()
def test_dear_runs_say_so_once_for_a_model_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("Llama", n_ctx=2048)
    text = families.tokens(LEAST_TOKENS, batch=1)
    monkeypatch.setattr("tl_stream.hosts.price._SHARE", 2000.0)  # a toy takes no time, but this one does

    def run(config: StreamConfig = FINE, n: int = LEAST_TOKENS) -> None:
        model.run_with_sparse_cache(text[:, :n], config=config, names_filter=lambda name: False)

    (message,) = said(monkeypatch, lambda: list(map(run, [FINE, FINE])))
    assert message.startswith("StreamConfig(block_q=1, block_k=1, k=32) makes this run of 1,024 tokens take about ")
    assert "block_q=32, block_k=8" in message
    assert not said(monkeypatch, lambda: run(replace(FINE, k=16)), fresh=False)
    assert not said(monkeypatch, lambda: run(n=LEAST_TOKENS - 1))
    assert not said(monkeypatch, lambda: run(StreamConfig()))
    assert not said(monkeypatch, lambda: model(text))
    with tl_stream.sparse(model, FINE):
        assert len(said(monkeypatch, lambda: model(text))) == 1


@pytest.mark.parametrize("family", ["Gemma 3", "Mistral", "Llama"])
def test_windows_are_found(family: str) -> None:
    model = families.build(family)
    found = {window_of(block.attn) for block in model.blocks}
    assert found <= {None, 27}
    assert (27 in found) == (family != "Llama")


@NEEDS_HOOKED
def test_windows_of_a_hooked_transformer_are_found() -> None:
    assert [window_of(block.attn) for block in build("local").blocks] == [9, None, 9]

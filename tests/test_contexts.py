"""Contexts that aren't left last-in-first-out, tasks, threads, two bridges around one model, Ctrl-C.

A run is what its own context says, or is refused; and afterwards the model is as it was found.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import families
import pytest
import torch
import zoo
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import tl_stream
from tl_stream import StreamConfig
from tl_stream.fidelity.pairs import PromptPairs
from tl_stream.hosts.uninterrupted import Uninterrupted

WIDE, NARROW = (StreamConfig(block_q=8, block_k=8, k=k, max_dense=0) for k in (3, 1))
BUILD: dict[str, Callable[[], Any]] = {
    "HookedTransformer": partial(zoo.build, "gqa", torch.float32),
    "HookedTransformer, ALiBi": partial(zoo.build, "alibi", torch.float32),
    "HookedTransformer, sinks": partial(zoo.build, "sinks", torch.float32),
    **{name: partial(families.build, name) for name in ("Llama", "GPT-2", "GPT-Neo", "OPT", "BLOOM", "Gemma 3", "Native")},
}
if not zoo.HAS_HOOKED:
    BUILD = {name: build for name, build in BUILD.items() if "Hooked" not in name}
TWO = [name for name in ("HookedTransformer", "Llama") if name in BUILD]
TEXT = zoo.tokens(29)


@pytest.fixture(params=BUILD)
def model(request: pytest.FixtureRequest) -> Any:
    return BUILD[request.param]()


@pytest.fixture(params=TWO)
def one_of_two(request: pytest.FixtureRequest) -> Any:
    return BUILD[request.param]()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def state(model: Any) -> list[Any]:
    """Everything that tracing changes: attributes, buffers and hooks of every module, configs, and the registries."""
    modules = [model, *model.modules()]
    attributes = [{name: type(value) for name, value in vars(module).items()} for module in modules]
    dicts = [
        {key: id(value) for key, value in found.items()}
        for module in modules
        for found in (module._buffers, module._forward_hooks, module._forward_pre_hooks)
    ]
    configs = [getattr(getattr(module, "config", None), "_attn_implementation_internal", None) for module in modules]
    registries = [list(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    return [attributes, dicts, [(type(each), each) for each in configs], registries, signal.getsignal(signal.SIGINT)]


def runs(model: Any) -> dict[Any, Tensor]:
    """What the model gives densely and under each config."""
    found: dict[Any, Tensor] = {None: model(TEXT)}
    for config in (WIDE, NARROW):
        found[config], _ = model.run_with_sparse_cache(TEXT, config=config)
    assert not torch.equal(found[WIDE], found[NARROW])
    assert not torch.equal(found[WIDE], found[None])
    return found


def in_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        with torch.no_grad():  # which is a matter of each thread
            try:
                found.append(function())
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_left_in_the_order_in_which_they_were_opened(model: Any) -> None:
    expected, before = runs(model), state(model)
    first, second = (tl_stream.sparse(model, config) for config in (WIDE, NARROW))
    first.__enter__()
    assert torch.equal(model(TEXT), expected[WIDE])
    second.__enter__()
    assert torch.equal(model(TEXT), expected[NARROW])
    first.__exit__(None, None, None)
    assert torch.equal(model(TEXT), expected[NARROW])
    second.__exit__(None, None, None)
    assert torch.equal(model(TEXT), expected[None])
    assert state(model) == before


def test_abandoned_generators(one_of_two: Any) -> None:
    model = one_of_two
    expected, before = runs(model), state(model)

    def reader(config: StreamConfig) -> Generator[Tensor, None, None]:
        with tl_stream.sparse(model, config):
            while True:
                yield model(TEXT)

    first, second = reader(WIDE), reader(NARROW)
    assert torch.equal(next(first), expected[WIDE])
    assert torch.equal(next(second), expected[NARROW])
    del first
    gc.collect()
    assert torch.equal(next(second), expected[NARROW])
    assert in_thread(second.close) is None  # collected in whatever thread
    assert torch.equal(model(TEXT), expected[None])
    assert state(model) == before


@pytest.mark.parametrize("steps", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_tasks_run_under_their_own_contexts(one_of_two: Any, steps: tuple[int, int]) -> None:
    model = one_of_two
    expected, before = runs(model), state(model)

    async def read(config: StreamConfig, n: int) -> None:
        with tl_stream.sparse(model, config):
            for _ in range(n):
                await asyncio.sleep(0)
                assert torch.equal(model(TEXT), expected[config])

    async def read_both() -> None:
        await asyncio.gather(*(read(config, n) for config, n in zip((WIDE, NARROW), steps, strict=True)))

    asyncio.run(read_both())
    assert torch.equal(model(TEXT), expected[None])
    assert state(model) == before

    async def read_within() -> None:  # tasks see the context in which they were started
        with tl_stream.sparse(model, WIDE):
            inherited = asyncio.ensure_future(asyncio.sleep(0, model))
            await asyncio.gather(read(NARROW, 2), inherited)
            assert torch.equal(model(TEXT), expected[WIDE])

    asyncio.run(read_within())
    with tl_stream.sparse(model, WIDE):
        asyncio.run(read(NARROW, 1))
        assert torch.equal(model(TEXT), expected[WIDE])
    assert state(model) == before


def test_a_task_without_a_context_is_refused_while_another_one_has_one(model: Any) -> None:
    expected, before = runs(model), state(model)

    async def trace() -> None:
        with tl_stream.sparse(model, WIDE):
            await asyncio.sleep(0)
            assert torch.equal(model(TEXT), expected[WIDE])

    async def read() -> None:
        with pytest.raises(
            RuntimeError,
            match=r"being traced by another task of this thread; .* Open tl_stream.sparse in the task that runs it",
        ):
            model(TEXT)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert torch.equal(model(TEXT), expected[None])

    async def both() -> None:
        await asyncio.gather(trace(), read())

    asyncio.run(both())
    assert state(model) == before


def test_in_other_threads_the_model_stays_dense(model: Any) -> None:
    expected, before = runs(model), state(model)
    _, cache = model.run_with_cache(TEXT)
    last, _ = model.run_with_sparse_cache(TEXT, config=WIDE, logits_to_keep=1)
    with tl_stream.sparse(model, WIDE, logits_to_keep=1):
        assert torch.equal(in_thread(lambda: model(TEXT)), expected[None])
        _, found = in_thread(lambda: model.run_with_cache(TEXT))
        assert torch.equal(model(TEXT), last)
    assert found.keys() == cache.keys()
    assert all(x is None or (type(x) is type(cache[name]) and torch.equal(x, cache[name])) for name, x in found.items())
    assert state(model) == before


def test_in_other_threads_the_model_stays_dense_amid_a_sparse_run(model: Any) -> None:
    expected, found = runs(model), []

    def note(x: Any, hook: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            found.append(in_thread(lambda: model(TEXT)))

    points = {f"blocks.1.attn.{name}" for name in ("hook_in", "hook_q", "q.hook_out", "hook_pattern", "hook_z", "o.hook_in")}
    hooks = [(name, note) for name in sorted(points & model.hook_dict.keys())]
    with tl_stream.sparse(model, WIDE), model.hooks(fwd_hooks=hooks):
        assert torch.equal(model(TEXT), expected[WIDE])
    assert len(found) >= 3
    assert all(torch.equal(each, expected[None]) for each in found)


def test_a_second_thread_is_refused(model: Any) -> None:
    expected, before = runs(model), state(model)

    def trace() -> None:
        with tl_stream.sparse(model, NARROW):
            pass

    with tl_stream.sparse(model, WIDE):
        within = state(model)
        for attempt in (trace, lambda: model.run_with_sparse_cache(TEXT)):
            error = in_thread(attempt)
            assert isinstance(error, RuntimeError)
            assert "being traced by another thread ('MainThread'); expected one thread at a time" in str(error)
        assert state(model) == within
        assert torch.equal(model(TEXT), expected[WIDE])
    assert in_thread(trace) is None
    assert torch.equal(in_thread(lambda: model.run_with_sparse_cache(TEXT, config=NARROW)[0]), expected[NARROW])
    assert state(model) == before


def test_a_thread_that_was_given_the_context_is_refused(one_of_two: Any) -> None:
    model = one_of_two

    async def read() -> None:
        refused = pytest.raises(RuntimeError, match=r"being traced by the thread 'MainThread'; .* in the thread that runs it")
        with tl_stream.sparse(model, WIDE), refused:
            await asyncio.to_thread(model, TEXT)

    asyncio.run(read())


def test_contexts_within_a_run(one_of_two: Any) -> None:
    model = one_of_two
    expected = runs(model)
    found: list[Any] = []

    def look(x: Any, hook: Any) -> None:
        if not found:
            found.append(None)
            with tl_stream.sparse(model, NARROW):
                found.append(model(TEXT))

    with tl_stream.sparse(model, WIDE), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]):
        assert torch.equal(model(TEXT), expected[WIDE])
    assert torch.equal(found[1], expected[NARROW])


def test_how_many_logits_are_kept_is_the_inner_context_s_too(model: Any) -> None:
    with tl_stream.sparse(model, WIDE, logits_to_keep=2):
        assert model(TEXT).shape[1] == 2
        with tl_stream.sparse(model, WIDE):
            assert model(TEXT).shape[1] == TEXT.shape[1]
        with tl_stream.sparse(model, WIDE, logits_to_keep=1):
            assert model(TEXT).shape[1] == 1
        assert model(TEXT).shape[1] == 2


@pytest.mark.parametrize("forward", ["sparse", "exact"])
def test_inner_contexts_of_the_other_forward(one_of_two: Any, forward: str) -> None:
    model = one_of_two
    other = {"sparse": "exact", "exact": "sparse"}[forward]
    outer, inner = (StreamConfig(block_q=8, block_k=8, k=1, forward=each) for each in (forward, other))
    expected = [model.run_with_sparse_cache(TEXT, config=config)[0] for config in (outer, inner)]
    with tl_stream.sparse(model, outer):
        assert torch.equal(model(TEXT), expected[0])
        with tl_stream.sparse(model, inner):
            assert torch.equal(model(TEXT), expected[1])
        assert torch.equal(model(TEXT), expected[0])


def test_models_that_share_their_layers(one_of_two: Any) -> None:
    model = one_of_two
    twin = copy.copy(model)
    expected, before = runs(model), state(model)
    with tl_stream.sparse(model, WIDE):
        with pytest.raises(RuntimeError, match="shares attention layers with another one that is being traced"):
            twin.run_with_sparse_cache(TEXT)
        assert torch.equal(model(TEXT), expected[WIDE])
    assert torch.equal(twin.run_with_sparse_cache(TEXT, config=NARROW)[0], expected[NARROW])
    assert state(model) == before


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-NeoX"])
def test_two_bridges_around_one_model(name: str) -> None:
    hf_model = families.build_hf(name)
    first = families.boot(hf_model)
    expected = runs(first)
    second = families.boot(hf_model)
    support = tl_stream.supports(first)
    assert not support
    assert "another TransformerBridge was booted around the same Hugging Face model afterwards" in str(support.reason)
    found = runs(second)
    assert all(torch.equal(logits, expected[config]) for config, logits in found.items())
    before = [state(first), state(second)]
    with pytest.raises(ValueError, match="another TransformerBridge was booted"), tl_stream.sparse(first):
        pass
    second.run_with_sparse_cache(TEXT)
    assert [state(first), state(second)] == before


def act_at(step: int, act: Callable[[], None], files: tuple[str, ...], body: Callable[[], Any]) -> bool:
    """Call `act` at one step of `body()`, counted in the code of some files; whether there are so many."""
    seen = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(files):
            return None
        seen += 1
        if seen == step:
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        body()
    finally:
        sys.settrace(before)
    return seen >= step


def raise_it() -> None:
    raise KeyboardInterrupt


STEPS = "overrides.py", "hooked_transformer.py", "transformer_bridge.py", "bridge_attention.py", "hf_interfaces.py"
ALL = *STEPS, "installation.py", "tracing.py", "uninterrupted.py", "contextlib.py", "signal.py", "threading.py"
interrupt = partial(signal.raise_signal, signal.SIGINT)
INTERRUPTIONS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "SIGINT": (interrupt, ALL),
    "another exception": (raise_it, STEPS),
}


@pytest.mark.parametrize("what", INTERRUPTIONS)
def test_interrupted_at_every_step_of_entry_and_exit(one_of_two: Any, what: str) -> None:
    model = one_of_two
    expected, before = runs(model), state(model)

    def enter_and_leave() -> None:
        with tl_stream.sparse(model, WIDE, logits_to_keep=1):
            pass

    act, files = INTERRUPTIONS[what]
    stride = 1 if len(before[0]) < 150 else 11  # a bridge has many hook points, in which the same is done
    step, interrupted = 0, True
    while interrupted:
        step += stride
        with suppress(KeyboardInterrupt):
            interrupted = act_at(step, act, files, enter_and_leave)
        assert state(model) == before, step
    assert step > 300
    assert torch.equal(model(TEXT), expected[None])


def test_interrupted_at_every_step_of_transformer_lens_s_hooks(one_of_two: Any) -> None:
    model = one_of_two
    before = state(model)

    def enter_and_leave() -> None:
        with PromptPairs().counted(model):
            pass

    step, interrupted = 0, True
    while interrupted:
        step += 3 if len(before[0]) < 150 else 41
        with suppress(KeyboardInterrupt):
            interrupted = act_at(step, interrupt, ("hook_points.py", "bridge.py"), enter_and_leave)
        assert state(model) == before, step
    assert step > 50


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="a bridge's run_with_cache adds and removes its hooks itself")
def test_interrupted_amid_the_hooks_of_run_with_cache() -> None:
    model = BUILD["HookedTransformer"]()
    model.run_with_sparse_cache(TEXT)
    before = state(model)
    for step in range(1, 4000, 97):
        with suppress(KeyboardInterrupt):
            act_at(step, interrupt, ("hook_points.py",), lambda: model.run_with_sparse_cache(TEXT))
        assert state(model) == before, step


def test_the_handler_of_ctrl_c_stays_the_user_s(one_of_two: Any) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with Uninterrupted(tl_stream.sparse(one_of_two)):
            signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]

        with Uninterrupted(signalling()):
            assert len(came) == 2
        assert len(came) == 3
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def signalling() -> Iterator[None]:
    signal.raise_signal(signal.SIGINT)
    yield
    signal.raise_signal(signal.SIGINT)

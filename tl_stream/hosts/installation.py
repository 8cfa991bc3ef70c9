"""One installation a model, whatever contexts are open on it.

The first context opened on a model installs Stream in it, and the last one that is left takes it out, in whatever order they
are left. In between a run takes the context that counts where it runs (`contextvars`): the last one opened in the same task, or
in what started that task. So contexts nest, and asyncio's tasks don't see each other's. A model is traced by one thread at a
time; in other threads it is meanwhile the dense model.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from tl_stream.config import StreamConfig
from tl_stream.estimator import Earlier
from tl_stream.hosts.arguments import without_right_padding
from tl_stream.hosts.forecast import foretold
from tl_stream.hosts.hooks import to_all_tokens
from tl_stream.hosts.overrides import Overrides
from tl_stream.hosts.price import warn_where_dear
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.pairs import Pairs
from tl_stream.tensors.products import Origin


@dataclass(frozen=True)
class Trace:
    """What `sparse` yields.

    Attributes:
        config: The config in force.
        dense_layers: The layers that it leaves dense.
        logits_to_keep: How many positions are unembedded, counted from the last; None: all.
        fallbacks: How often an operation unknown to the sparse tensors was made dense, by its name.
        pairs: Token pairs that all runs so far kept, steps of generation among them: `pairs.pruned`, `pairs.pruned_causal`.
        earlier: What runs that read a KV cache have to know of those before them.
        rerun_cache: What `generate(return_cache=True)` returns of its last run, by the trace, that run's output and its cache.
    """

    config: StreamConfig
    dense_layers: frozenset[int] = frozenset()
    logits_to_keep: int | None = None
    fallbacks: Counter[str] = field(default_factory=Counter)
    pairs: Pairs = field(default_factory=Pairs)
    earlier: Earlier = field(default_factory=Earlier)
    rerun_cache: Callable[[Trace, Any, Any], Any] = field(default=lambda trace, output, cache: cache, repr=False)


_OPENED: ContextVar[tuple[int, ...]] = ContextVar("tl_stream_opened", default=())  # the contexts that the running code sees
_INSTALLED: dict[Module, Installation] = {}  # by every attention module in which something is installed
_LOCK = threading.RLock()
_numbers = itertools.count()


class Installation:
    """What stands in one model while it is traced.

    Attributes:
        model: The model.
        thread: The thread that traces it.
        traces: The open contexts, in the order in which they were opened.
        overrides: What is replaced in the model.
        real: False where a token of the present run is padding that no mask tells the model of; None: there is none.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.thread = model, threading.current_thread()
        self.traces: dict[int, Trace] = {}
        self.overrides = Overrides(self.is_on)
        self.real: Tensor | None = None

    def is_on(self) -> bool:
        """Whether the code that runs now is traced."""
        return self.trace() is not None

    def trace(self) -> Trace | None:
        """The trace that counts for the code that runs now; None: it belongs to another thread, where the model is dense.

        Raises:
            RuntimeError: It can't be told whether that code should be traced: it runs in a task that opened no context while
                another one of its thread has one open, or in a thread that was started with the context of the one that traces.
        """
        here = threading.current_thread() is self.thread
        seen = [number for number in _OPENED.get() if number in self.traces]
        if not seen and (not here or not self.traces):
            return None
        if not seen or not here:
            kind, other = ("task", "another task of this thread") if here else ("thread", f"the thread {self.thread.name!r}")
            raise RuntimeError(
                f"The model is being traced by {other}; this run could be meant to be sparse or dense. Open tl_stream.sparse "
                f"in the {kind} that runs it, or run it when that context has been left."
            )
        return self.traces[seen[-1]]

    def origin(self, layer: int) -> Origin:
        """Where the sparse tensors of a layer come from, in a run that is traced."""
        trace = self.trace()
        assert trace is not None
        is_dense = layer in trace.dense_layers
        return Origin(trace.config, layer, is_dense, trace.fallbacks, self.real, trace.earlier, trace.pairs)

    def install(self, host: ModuleType, layers: dict[int, Module]) -> None:
        """Replace what every host replaces, and what this one does."""
        for attn in layers.values():
            self.overrides.put(_INSTALLED, attn, self)
        self.overrides.entry(self.model.blocks[0], partial(self._check_price, layers))
        self.overrides.method(self.model, "to_tokens", lambda _, *args, **kwargs: to_all_tokens(self.model, *args, **kwargs))
        self.overrides.method(self.model, "hooks", lambda hooks, *args, **kwargs: Uninterrupted(hooks(*args, **kwargs)))
        self.overrides.method(self.model, "run_with_cache", self._run_with_cache)
        self.overrides.method(self.model, "generate", self._generate)
        self.overrides.entry(self.model.unembed, self._last_positions)
        host.install(self.model, self)

    def note_tokens(self, tokens: Any) -> None:
        """Find the padding of a run that was given no attention mask."""
        self.real = without_right_padding(self.model, tokens)

    def _check_price(self, layers: dict[int, Any], args: Any, kwargs: Any) -> Any:
        """What the first layer is called with, as it is."""
        trace = self.trace()
        if trace is not None:
            warn_where_dear(self.model, layers, trace.config, args[0] if args else kwargs.get("hidden_states"))
        return args, kwargs

    def _run_with_cache(self, run_with_cache: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own, which warns where the cache will be large."""
        trace = self.trace()
        with foretold(self.model, None if trace is None else trace.logits_to_keep, kwargs):
            return run_with_cache(*args, **kwargs)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model generates; where it returns the cache of a run of all that (`return_cache=True`), the trace's own."""
        runs: list[Any] = []

        def note(run_with_cache: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            runs.append(run_with_cache(*args, **kwargs))
            return runs[-1]

        overrides, trace = Overrides(lambda: True), self.trace()
        overrides.method(self.model, "run_with_cache", note)
        try:
            result = generate(*args, **kwargs)
        finally:
            overrides.restore()
        if trace is None or not runs or not isinstance(result, tuple) or not any(each is runs[-1][1] for each in result):
            return result
        cache = trace.rerun_cache(trace, *runs[-1])
        return tuple(cache if each is runs[-1][1] else each for each in result)

    def _last_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `unembed` is called with: the residual stream of the last positions only, where so many logits are kept."""
        trace = self.trace()
        if trace is None or trace.logits_to_keep is None:
            return args, kwargs
        return (args[0][:, -trace.logits_to_keep :], *args[1:]), kwargs


@contextmanager
def opened(model: Any, host: ModuleType, trace: Trace) -> Iterator[Trace]:
    """A context in which runs of the model are traced.

    Raises:
        RuntimeError: Another thread traces the model, or another model with the same attention layers is traced.
    """
    number = next(_numbers)
    layers: dict[int, Module] = host.attention_layers(model)
    installation = None
    try:
        with _LOCK:  # a context that is collected may be left in any thread
            installation = _installation(model, list(layers.values()))
            installation.traces[number] = trace
            if not installation.overrides:
                installation.install(host, layers)
            _OPENED.set((*_OPENED.get(), number))
        yield trace
    finally:
        trace.earlier.clear()
        if installation is not None:
            try:
                _leave(installation, number)
            except BaseException:  # an interruption: what it does may be done again
                _leave(installation, number)
                raise


def _installation(model: Any, layers: list[Module]) -> Installation:
    """The one that is there, or a new one."""
    found = next((_INSTALLED[attn] for attn in layers if attn in _INSTALLED), None)
    if found is None:
        return Installation(model)
    if found.model is not model:
        raise RuntimeError(
            "The model shares attention layers with another one that is being traced; expected one of them at a time. Leave "
            "that context first, or take a copy.deepcopy() of the model."
        )
    if found.thread is not threading.current_thread():
        raise RuntimeError(
            f"The model is being traced by another thread ({found.thread.name!r}); expected one thread at a time. Wait until "
            "that context has been left, or take a copy.deepcopy() of the model."
        )
    return found


def _leave(installation: Installation, number: int) -> None:
    """Leave one context, from whatever thread or task; the last one restores the model."""
    with _LOCK:
        installation.traces.pop(number, None)
        if not installation.traces:
            installation.overrides.restore()
        _OPENED.set(tuple(each for each in _OPENED.get() if each != number))

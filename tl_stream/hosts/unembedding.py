"""Logits a few positions at a time, from what a run's unembedding was given; all of them at once are pos x d_vocab numbers.

What the model does to its logits after the unembedding (a soft cap, a factor) is the model's own: its code runs on a single
token, and the unembedding is handed the positions that are wanted instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_stream.hosts.overrides import Overrides
from tl_stream.hosts.uninterrupted import Uninterrupted

ENTRIES = 2**23


def without_logits(model: Any) -> Uninterrupted[list[Tensor]]:
    """Within this context a run unembeds its last position only; all where a hook on the unembedding may tell them apart.

    Yields:
        What each run's unembedding was given, `[batch, pos, d_model]`.
    """
    return Uninterrupted(_without_logits(model))


@contextmanager
def _without_logits(model: Any) -> Iterator[list[Tensor]]:
    given: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        return args if _is_hooked(model) else (args[0][:, -1:], *args[1:])

    handle = model.unembed.register_forward_pre_hook(note)
    try:
        yield given
    finally:
        handle.remove()


def logits_of(
    model: Any, resid: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch text_pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of some positions, `resid` being what the unembedding was given there.

    Args:
        model: The model.
        resid: As `without_logits` yields it, or a part of that.
        tokens: Any of the texts' tokens.
    """
    with Uninterrupted(_given(model, resid)), torch.no_grad():
        return model(tokens[:, -1:])


def runs(model: Any, batch: int, positions: int) -> list[slice]:
    """Runs of positions with about `ENTRIES` logits; one run of all where a hook on the unembedding may tell them apart."""
    step = positions if _is_hooked(model) else max(1, ENTRIES // (batch * model.cfg.d_vocab))
    return [slice(i, min(i + step, positions)) for i in range(0, positions, step)]


def _is_hooked(model: Any) -> bool:
    """Whether a hook point of the unembedding has a hook."""
    return any(isinstance(x, HookPoint) and x._forward_hooks for x in model.unembed.modules())


@contextmanager
def _given(model: Any, resid: Tensor) -> Iterator[None]:
    """The unembedding is given `resid`, whatever it is called with; hooks before it, which may count on a text, stay out."""
    after = set(model.unembed.modules())
    overrides = Overrides(lambda: True)
    try:
        for module in model.modules():
            if isinstance(module, HookPoint) and module not in after:
                overrides.put(module.__dict__, "_forward_hooks", OrderedDict())
        overrides.entry(model.unembed, lambda args, kwargs: ((resid, *args[1:]), kwargs))
        yield
    finally:
        overrides.restore()

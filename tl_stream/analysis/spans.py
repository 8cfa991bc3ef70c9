"""Checks of what callers say about positions in a text."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Span(Protocol):
    """Token positions `start <= pos < stop`: a slice, a range, or a `tl_stream.tasks.Span`."""

    @property
    def start(self) -> Any: ...
    @property
    def stop(self) -> Any: ...


def checked_span(name: str, span: Span, length: int) -> range:
    """`span` as a range of positions.

    Raises:
        TypeError: No start and stop.
        ValueError: Empty, or not within the text's `length` tokens.
    """
    start, stop = getattr(span, "start", None), getattr(span, "stop", None)
    if not isinstance(start, int) or not isinstance(stop, int) or getattr(span, "step", None) not in (None, 1):
        raise TypeError(f"{name} was {span!r}; expected token positions as a slice(start, stop), a range or a tasks.Span.")
    if not 0 <= start < stop <= length:
        raise ValueError(
            f"{name} was tokens {start} to {stop}; expected 0 <= start < stop <= {length}, the number of tokens in the cache. "
            "(A model may have cut the text off at n_ctx.)"
        )
    return range(start, stop)


def checked_position(name: str, position: int, length: int) -> int:
    """A position counted from the start.

    Raises:
        IndexError: Not within the text's `length` tokens.
    """
    if not -length <= position < length:
        raise IndexError(f"{name} was {position}; expected a token position from {-length} to {length - 1}.")
    return position % length


def checked_tokens(tokens: Any, n_texts: int, length: int) -> Tensor:
    """Token ids as `[batch, pos]`.

    Raises:
        TypeError: Not a tensor of ints.
        ValueError: Not those of the cached texts.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise TypeError(f"tokens was {type(tokens).__name__}; expected the run's token ids, an int tensor [batch, pos].")
    tokens = torch.atleast_2d(tokens)
    if tokens.shape != (n_texts, length):
        raise ValueError(f"tokens were of shape {tuple(tokens.shape)}; expected {(n_texts, length)}, those of the cached run.")
    return tokens

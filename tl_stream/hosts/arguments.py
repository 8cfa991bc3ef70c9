"""What a run is given, checked before anything runs: keywords that somebody takes, and tokens that the model knows."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


def check_keywords(model: Any, host: ModuleType, given: Iterable[str], methods: Collection[str], own: Collection[str]) -> None:
    """Raise TypeError for a keyword that nobody takes: a bridge and many Hugging Face models ignore those that they don't know.

    Args:
        model: The model.
        host: Its host.
        given: The keywords that are handed on.
        methods: The model's methods that they are handed to.
        own: Further ones that the caller takes itself, to suggest them.
    """
    taken = set(host.keywords(model)).union(*(_taken(type(model), method) for method in methods))
    for name in given:
        if name not in taken:
            close = difflib.get_close_matches(name, [*taken, *own], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted({*taken, *own}))}."
            raise TypeError(
                f"{name} was given, a keyword that neither this function nor the model's {' and '.join(methods)} takes; {hint}"
            )


def parameters(function: Callable[..., Any]) -> set[str]:
    """The names that a function takes as keywords, those of a typed `**kwargs` too."""
    found = set()
    for each in inspect.signature(function).parameters.values():
        if each.kind is inspect.Parameter.VAR_KEYWORD:
            for kind in getattr(each.annotation, "__args__", ()):  # Unpack[...] of a TypedDict
                found |= set(getattr(kind, "__annotations__", ()))
        elif each.kind is not inspect.Parameter.VAR_POSITIONAL:
            found.add(each.name)
    return found


def _taken(kind: type, method: str) -> set[str]:
    """The keywords of a method, and of the base classes' to which it hands others on."""
    found: set[str] = set()
    for base in kind.__mro__:
        if method in vars(base):
            function = vars(base)[method]
            found |= parameters(function)
            if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in inspect.signature(function).parameters.values()):
                break
    return found - {"self"}


def check_tokens(x: Tensor, vocabulary: int, n_ctx: int) -> None:
    """Raise for anything but tokens `[batch, pos]` or `[pos]` that the model knows, at least one and at most n_ctx of them.

    Raises:
        TypeError: Not integers, or of another shape.
        ValueError: None or too many, or not in the vocabulary; or a tensor without data (on the meta device).
    """
    if x.dtype not in (torch.int64, torch.int32) or x.dim() not in (1, 2):
        raise TypeError(
            f"tokens was of shape {tuple(x.shape)} and {x.dtype}; expected int64 of shape [batch, pos] or [pos], or text."
        )
    if x.is_meta:
        raise ValueError("tokens was on the meta device, where tensors have no data; expected it on the model's device.")
    check_length(x if x.dim() == 2 else x[None], n_ctx)
    least, greatest = int(x.min()), int(x.max())
    if least < 0 or greatest >= vocabulary:
        raise ValueError(
            f"tokens held {least if least < 0 else greatest}; expected numbers from 0 to {vocabulary - 1}, the model's "
            "vocabulary. Was another model's tokenizer used?"
        )


def check_length(x: Tensor, n_ctx: int) -> None:
    """Raise ValueError for tokens (or embeddings) `[batch, pos, ...]` that are none, or more than n_ctx."""
    batch, length = x.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"tokens were of shape {[batch, length]}; expected at least one text of at least one token.")
    if length > n_ctx:
        raise ValueError(
            f"tokens were {length} long, more than the model's n_ctx of {n_ctx}; nothing is cut off silently. "
            "Shorten the text, or load the model with a larger n_ctx."
        )


def without_right_padding(model: Any, tokens: Any) -> Bool[Tensor, "batch pos"] | None:
    """False where a token is one of the pad tokens that end a text, as TransformerLens pads lists of texts; None: none is.

    A lone pad token behind a lone text, where it is the end token, too, is that text's end.
    """
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if pad is None or not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() != 2:
        return None
    real = (tokens != pad).int().flip(-1).cummax(-1).values.flip(-1).bool()
    n_padding = int((~real).sum())
    is_end = len(tokens) == 1 and n_padding == 1 and pad == model.tokenizer.eos_token_id
    return None if not n_padding or is_end else real

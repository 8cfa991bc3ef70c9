"""Checks of what callers give: counts, a text, and the model and the layers of a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_stream.analysis.kept import patterns_of


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError where `value` is no int, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} was {value!r}; expected an int >= {least}.")


def check_one_text(tokens: Any) -> None:
    """Raise TypeError for anything but the token ids of one text, `[1, pos]`."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.is_floating_point():
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"text was {found}; expected one text: a str, or its tokens [1, pos].")


def checked_model(cache: Any, model: Any) -> Any:
    """The model of a run.

    Raises:
        TypeError: No model.
    """
    model = getattr(cache, "model", None) if model is None else model
    if not hasattr(model, "blocks"):
        raise TypeError(f"model was a {type(model).__name__}; expected the HookedTransformer or TransformerBridge of the run.")
    return model


def checked_layers(cache: Any, model: Any) -> range:
    """All layers of the model, each of which must have its pattern in the cache.

    Raises:
        ValueError: Some have none.
    """
    layers, found = range(model.cfg.n_layers), patterns_of(cache)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(
            f"The cache holds no pattern of layers {missing}; expected all {len(layers)} layers, for paths go through each. "
            "(Models with layers of another kind than softmax attention can't be analysed so.)"
        )
    return layers

"""Whose code is it? What tracing replaces must be TransformerLens's or Hugging Face's own; a user's is called, or refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch.nn import Module

from tl_stream.tensors.scores import AttentionScores
from tl_stream.tensors.wrapper import SparseTensor

TRIED = 64
"""Number of tokens on which a user's own steps are tried before a model is traced."""
_LIBRARIES = {"transformer_lens", "transformers"}
_DECORATORS = _LIBRARIES | {"torch", "jaxtyping", "beartype"}


def is_own(code: Any) -> bool:
    """Whether a function, method or class is one of TransformerLens's or Hugging Face's, decorated by them or by torch at most.

    A function is known by the module in which it was written: `functools.wraps` copies names, but not that.
    """
    if isinstance(code, type):
        return _library(code.__module__) in _LIBRARIES
    layers = [_library(getattr(layer, "__globals__", {}).get("__name__", "")) for layer in _layers(code)]
    return bool(layers) and all(layer in _DECORATORS for layer in layers) and layers[-1] in _LIBRARIES


def name_of(code: Any) -> str:
    """`module.name` of a function, method or class; of anything else, that of its type."""
    code = code.func if isinstance(code, functools.partial) else code
    code = code if hasattr(code, "__qualname__") else type(code)
    return f"{code.__module__}.{code.__qualname__}"


def mentions(function: Any, *endings: str) -> bool:
    """Whether a function's code uses a name with one of these endings, or holds a function of such a name."""
    function = _function(function)
    if not isinstance(function, FunctionType):
        return False
    held = inspect.getclosurevars(function).nonlocals.values()
    return any(name.endswith(endings) for name in (*_names_in(function.__code__), *map(name_of, held)))


def functions_in(function: Any) -> list[Any]:
    """The functions of its own module, or imported there, that a function's code names, or that of one which it decorates."""
    layers = [layer for layer in _layers(function) if isinstance(layer, FunctionType)]
    named = (layer.__globals__.get(name) for layer in layers for name in _names_in(layer.__code__))
    return [each for each in named if isinstance(each, FunctionType)]


def why_not_followed(own: Iterable[Any], steps: Callable[[], Any]) -> str | None:
    """Why attention can't be traced through a user's `own` functions, which `steps()` calls; None where it can.

    `steps` gives masked attention scores, or a sparse tensor where it goes on from there.
    """
    names = ", ".join(map(name_of, own))
    try:
        with torch.no_grad():
            found = steps()
            found = found.to_sparse_scores() if isinstance(found, AttentionScores) else found
    except Exception as error:  # whatever a user's code may raise
        return f"its own {names} can't be traced ({type(error).__name__}: {error})"
    return None if isinstance(found, SparseTensor) else f"its own {names} makes what it is given dense"


def parts_of(module: Module, kind: type) -> list[Any]:
    """The modules of a kind within a module, itself included."""
    return [part for part in module.modules() if isinstance(part, kind)]


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes that code, and the functions written within it, uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _function(code: Any) -> Any:
    while isinstance(code, MethodType | functools.partial):
        code = code.__func__ if isinstance(code, MethodType) else code.func
    return code


def _layers(code: Any) -> Iterator[Any]:
    """A function and what it wraps, in turn."""
    while code is not None:
        code = _function(code)
        yield code
        code = getattr(code, "__wrapped__", None)


def _library(module: str) -> str:
    return module.partition(".")[0]

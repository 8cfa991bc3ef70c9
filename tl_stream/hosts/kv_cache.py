"""The KV cache of a model that generates: that it fills, and that a step which reads it is right.

From transformers 5.24 on, attention and recurrent layers get it as `cache`; TransformerLens's components look for the names
that it had before, so that nothing is ever cached and every step sees its own token alone. Within `served` they get it under
all names. Whether that is enough the model itself says: before its first generation here, steps that read a KV cache are
compared with one run of the same text without.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_stream.hosts.overrides import Overrides

_OLD_NAMES = ("past_key_values", "cache_params")
_GENERATORS = {"generate": "generate", "generate_stream": "generate", "hf_generate": "hf_generate"}
"""Methods that generate, and the one that is checked in place of each. (A stream comes out of the code of `generate`.)"""

_PROMPT, _STEPS = 8, 3  # tokens of the text on which a model is checked, and how many it generates
_LEAST_TOLERANCE = 0.01  # an empty cache changes logits by about their own size; TF32 rounds them by .001

_verdicts: WeakKeyDictionary[Any, dict[str, str | None]] = WeakKeyDictionary()


@contextmanager
def served(model: Any) -> Iterator[None]:
    """Meanwhile attention finds its KV cache, and the model's own methods that generate check it first.

    Raises:
        NotImplementedError: From those methods: generation with a KV cache is wrong, by `check`.
    """
    overrides = Overrides(lambda: True)
    try:
        serve(model, overrides)
        yield
    finally:
        overrides.restore()


def serve(model: Any, overrides: Overrides) -> None:
    """What `served` does, until `overrides` are restored."""
    _hand_on_caches(model, overrides)
    for name in _GENERATORS:
        if hasattr(type(model), name):
            overrides.method(model, name, partial(_checked, model, name))


def check(model: Any, method: str = "generate") -> None:
    """Compare steps that read a KV cache with one run without, on a few tokens, once for each model.

    It takes a few short runs of a copy that shares the model's weights, so that neither hooks nor an open trace see them.

    Args:
        model: A HookedTransformer or TransformerBridge.
        method: Its method that generates.

    Raises:
        NotImplementedError: They differ.
    """
    verdicts = _verdicts.setdefault(model, {})
    if method not in verdicts:
        verdicts[method] = _why_wrong(model, method)
    reason = verdicts[method]
    if reason is not None:
        raise NotImplementedError(reason)


def _checked(model: Any, name: str, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(getattr(type(model), name)).bind(model, *args, **kwargs).arguments
    if given.get("use_past_kv_cache", True):
        check(model, _GENERATORS[name])
    return generate(*args, **kwargs)


def _hand_on_caches(model: Any, overrides: Overrides) -> bool:
    """Give TransformerLens's components the cache under its old names, too, and the modules that they wrap under the new alone.

    Returns:
        Whether any module of the model calls it by the new name.
    """
    wrapped = {each: each.original_component for each in model.modules() if isinstance(each, GeneralizedComponent)}
    renamed = {each: module for each, module in wrapped.items() if module is not None and _takes_cache(module)}
    for component, module in renamed.items():
        overrides.entry(component, _with_old_names)
        overrides.entry(module, _without_old_names)
    return bool(renamed)


def _takes_cache(module: Module) -> bool:
    return "cache" in inspect.signature(type(module).forward).parameters


def _with_old_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    old = dict.fromkeys(_OLD_NAMES, kwargs["cache"]) if "cache" in kwargs else {}
    return args, kwargs | old


def _without_old_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    old = _OLD_NAMES if "cache" in kwargs else ()
    return args, {name: x for name, x in kwargs.items() if name not in old}


@torch.no_grad()
def _why_wrong(model: Any, method: str) -> str | None:
    """What is wrong with a method that generates; None where nothing is."""
    twin = _twin(model)
    if _is_right(twin, method):
        return None
    overrides = Overrides(lambda: True)  # of the copy, which is dropped
    if _hand_on_caches(twin, overrides) and _is_right(twin, method):
        _warn_once(
            f"{_versions()}: TransformerLens doesn't find the KV cache that transformers hands its attention. tl_stream "
            f"hands it on, in its contexts and own runs; elsewhere {method}() forgets the prompt after its first token "
            "(use_past_kv_cache=False helps)."
        )
        return None
    return (
        f"model can't generate with a KV cache: steps of {method}() that read one give other logits than the same text in one "
        f"run, under {_versions()}. Install other versions of these, or generate with use_past_kv_cache=False."
    )


def _is_right(model: Any, method: str) -> bool:
    """Whether steps that read a KV cache give the logits of one run without."""
    n_prompt = min(_PROMPT, model.cfg.n_ctx - _STEPS)
    if n_prompt < 1:
        return True  # there is no room for a step
    vocabulary = model.cfg.d_vocab
    prompt = (vocabulary // 2 + torch.arange(n_prompt, device=next(model.parameters()).device)) % vocabulary
    options = {} if method == "hf_generate" else {"verbose": False}
    with _unembedded(model) as steps:
        text = getattr(model, method)(prompt[None], max_new_tokens=_STEPS, do_sample=False, stop_at_eos=False, **options)
    with _unembedded(model) as rows:
        model(text[:, :-1])
    return _agree(torch.cat([step[0, -1:] for step in steps]), rows[0][0, -_STEPS:])


def _agree(a: Float[Tensor, "step d_vocab"], b: Float[Tensor, "step d_vocab"]) -> bool:
    """Whether logits are the same but for rounding; NaN says nothing about a cache."""
    tolerance = max(_LEAST_TOLERANCE, torch.finfo(b.dtype).eps ** 0.5)
    a, b = a.double(), b.double()
    return bool(b.isnan().any() or (a - b).norm() <= tolerance * (b - b.mean(-1, keepdim=True)).norm())


@contextmanager
def _unembedded(model: Any) -> Iterator[list[Tensor]]:
    """What the model unembeds meanwhile: logits `[batch, pos, d_vocab]`, forward pass by forward pass."""
    found: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _twin(model: Any) -> Any:
    """A copy with the same tensors and tokenizer and without hooks, in evaluation mode."""
    modules = {*model.modules(), *getattr(model, "original_model", model).modules()}
    held = [x for each in modules for x in (*each.__dict__.values(), *each._parameters.values(), *each._buffers.values())]
    memo: dict[int, Any] = {id(x): x for x in held if isinstance(x, Tensor)}
    memo |= {id(each): each for each in (getattr(model, "tokenizer", None), getattr(model, "processor", None))}
    for module in modules:
        memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
        if isinstance(module, HookPoint):
            memo[id(module.ctx)] = {}
    return copy.deepcopy(model, memo).eval()


def _versions() -> str:
    return " and ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers"))


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)

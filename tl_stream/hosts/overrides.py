"""Replace attributes of single instances for a while, and put back exactly what stood there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch.nn import Module
from transformer_lens.hook_points import HookPoint

_MISSING = object()


class MethodOverride:
    """A function that stands in for a method of one instance. A deep copy of the instance gets its own method back.

    Attributes:
        before: What it stands in for: the instance's, or its class's.
    """

    def __init__(self, owner: Module, name: str, function: Callable[..., Any]) -> None:
        self.function, self.before = function, standing(owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.before, memo)


def standing(owner: Any, name: str) -> Any:
    """The method `owner.name`, as it is without us."""
    found = getattr(owner, name)
    return found.before if isinstance(found, MethodOverride) else found


@contextmanager
def override_method(owner: Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`owner.name(...)` calls `function(...)` meanwhile."""
    with override_attribute(owner, name, MethodOverride(owner, name, function)):
        yield


@contextmanager
def override_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile; afterwards what stood on the instance stands there again."""
    before = owner.__dict__.get(name, _MISSING)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


@contextmanager
def override_buffer(owner: Module, name: str, value: Any) -> Iterator[None]:
    """The buffer `owner.name` is `value` meanwhile."""
    before = owner._buffers[name]
    owner._buffers[name] = value
    try:
        yield
    finally:
        owner._buffers[name] = before


class _ModuleHook:
    """A forward hook or pre-hook of one module. A deep copy of the module does nothing there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any) -> None:
    pass


@contextmanager
def entry_hook(module: Module, function: Callable[[Module, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """`function(module, args, kwargs)` is called before `module` meanwhile; what it returns, if anything, replaces both."""
    handle = module.register_forward_pre_hook(_ModuleHook(function), prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def exit_hook(module: Module, function: Callable[[Module, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """`function(module, args, output)` is called after `module` meanwhile; what it returns, if anything, replaces the output."""
    handle = module.register_forward_hook(_ModuleHook(function))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def uncompiled(root: Module, parts: Iterable[Module]) -> Iterator[None]:
    """What torch compiled around one of `parts`, in place or as a module of its own, runs as it was written meanwhile."""
    inner = set(parts)
    with ExitStack() as stack:
        for module in root.modules():
            if not inner.intersection(module.modules()):
                continue
            if module._compiled_call_impl is not None:
                stack.enter_context(override_attribute(module, "_compiled_call_impl", None))
            if "_orig_mod" in module._modules:
                stack.enter_context(override_attribute(module, "forward", module._modules["_orig_mod"]))
        yield


def first_hook(point: HookPoint, hook: Callable[[Any, HookPoint], Any]) -> AbstractContextManager[Any]:
    """`hook` changes what enters `point` meanwhile, before all of TransformerLens's hooks; `reset_hooks()` leaves it."""
    return entry_hook(point, lambda _, args, kwargs: ((hook(args[0], point),), kwargs))

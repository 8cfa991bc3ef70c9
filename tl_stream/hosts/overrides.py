"""Replace attributes of single instances for a while, and put back exactly what stood there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

from torch.nn import Module
from transformer_lens.hook_points import HookPoint

_MISSING = object()


class MethodOverride:
    """A function that stands in for a method of one instance. A deep copy of the instance gets its own method back."""

    def __init__(self, owner: Module, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function = owner, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        owner = memo.get(id(self.owner), self.owner)
        return MethodType(getattr(type(owner), self.name), owner)


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


class _EntryHook:
    """A forward pre-hook of one module. A deep copy of the module does nothing there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pass


@contextmanager
def entry_hook(module: Module, function: Callable[[Module, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """`function(module, args, kwargs)` is called before `module` meanwhile; what it returns, if anything, replaces both."""
    handle = module.register_forward_pre_hook(_EntryHook(function), prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_hook(point: HookPoint, hook: Callable[[Any, HookPoint], Any]) -> AbstractContextManager[Any]:
    """`hook` changes what enters `point` meanwhile, before all of TransformerLens's hooks; `reset_hooks()` leaves it."""
    return entry_hook(point, lambda _, args, kwargs: ((hook(args[0], point),), kwargs))

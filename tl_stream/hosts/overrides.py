"""Replace what stands in single modules for a while, and put back exactly what stood there.

Everything that tracing changes is an entry of some dict: an attribute of an instance, a buffer, a name in a registry. What
stood there is noted before it is replaced, and putting it back may be repeated, so that an exception between any two steps
loses nothing. Where the model is not traced (another thread runs it), what stood there before is called as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Module

_MISSING = object()

Entry = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""`entry(args, kwargs)`: what a module is called with instead."""


class Overrides:
    """The entries of one model that are replaced, until `restore`.

    Args:
        is_on: Whether the code that runs now is traced; elsewhere the original methods run.
    """

    def __init__(self, is_on: Callable[[], bool]) -> None:
        self.is_on = is_on
        self._before: list[tuple[dict[Any, Any], Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def put(self, where: dict[Any, Any], key: Any, value: Any) -> None:
        """`where[key]` is `value` meanwhile."""
        self._before.append((where, key, where.get(key, _MISSING)))
        where[key] = value

    def method(self, owner: Module, name: str, function: Callable[..., Any]) -> None:
        """`owner.name(...)` calls `function(original, ...)` meanwhile; `original` is what stood there, bound to `owner`."""
        self.put(owner.__dict__, name, MethodOverride(getattr(owner, name), function, self.is_on))

    def uncompiled(self, root: Module, parts: Iterable[Module]) -> None:
        """What torch compiled around one of `parts`, in place or as a module of its own, runs as it was written meanwhile."""
        inner = set(parts)
        for module in root.modules():
            if not inner.intersection(module.modules()):
                continue
            if module._compiled_call_impl is not None:
                self.put(module.__dict__, "_compiled_call_impl", None)
            if "_orig_mod" in module._modules:
                self.put(module.__dict__, "forward", module._modules["_orig_mod"])

    def entry(self, module: Module, function: Entry) -> None:
        """`module(*args, **kwargs)` is called with `function(args, kwargs)` meanwhile, before all of its hooks."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            args, kwargs = function(args, kwargs)
            return original(*args, **kwargs)

        self.method(module, "_call_impl", call)

    def restore(self) -> None:
        """Put everything back. May be interrupted, and called again."""
        for where, key, before in reversed(self._before):
            if before is _MISSING:
                where.pop(key, None)
            else:
                where[key] = before
        self._before.clear()


class MethodOverride:
    """A function that stands in for a method of one instance. A deep copy of the instance gets its own method back."""

    def __init__(self, original: Callable[..., Any], function: Callable[..., Any], is_on: Callable[[], bool]) -> None:
        self.original, self.function, self.is_on = original, function, is_on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.original, *args, **kwargs) if self.is_on() else self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)


def standing(owner: Any, name: str) -> Any:
    """The method `owner.name`, as it is without us."""
    found = getattr(owner, name)
    return found.original if isinstance(found, MethodOverride) else found

"""Contexts that Ctrl-C can't cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Uninterrupted(AbstractContextManager[T], Generic[T]):
    """A context whose entry and exit are done whole: SIGINT (Ctrl-C) waits for their end, and is raised then.

    Whoever is interrupted on the way in has not entered; on the way out, has left. (A signal that Python takes just as it calls
    `__exit__` itself leaves the context as soon as the exception and its traceback are dropped.)
    """

    def __init__(self, context: AbstractContextManager[T]) -> None:
        self.context, self.is_open = context, False

    def __enter__(self) -> T:
        try:
            return _held_back(self._open)
        except BaseException:
            _held_back(self._close, None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return _held_back(self._close, kind, error, traceback)
        except KeyboardInterrupt:  # it may have come before signals were held back
            _held_back(self._close, kind, error, traceback)
            raise

    def _open(self) -> T:
        value = self.context.__enter__()
        self.is_open = True
        return value

    def _close(self, *exception: Any) -> bool | None:
        if not self.is_open:
            return None
        result = self.context.__exit__(*exception)
        self.is_open = False
        return result


def _held_back(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; SIGINT waits until it has returned. Only the main thread gets signals."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:  # None: set by other than Python code
        return function(*args)
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        return function(*args)
    finally:
        signal.signal(signal.SIGINT, handler)
        for number in came[:1]:
            signal.raise_signal(number)

"""A check of what callers say about numbers of things."""

from __future__ import annotations

from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError where `value` is no int, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} was {value!r}; expected an int >= {least}.")

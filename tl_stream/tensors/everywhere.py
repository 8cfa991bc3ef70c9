"""The functions that every kind of sparse tensor knows alike: each is put together from others, or a method of the kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tl_stream.tensors import composite, einsum, grouped_sums, pooling, slicing, spreading

HANDLERS: dict[str, Callable[..., Any]] = {
    **composite.HANDLERS,
    **einsum.HANDLERS,
    **grouped_sums.HANDLERS,
    **pooling.HANDLERS,
    **slicing.HANDLERS,
    **spreading.HANDLERS,
}

"""What a function of torch is called, and whether it changes its argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IN_PLACE_OPERATORS = {
    "iadd": "add", "isub": "sub", "imul": "mul", "idiv": "div", "itruediv": "div", "ifloordiv": "floor_divide",
    "ipow": "pow", "imod": "remainder", "iand": "bitwise_and", "ior": "bitwise_or", "ixor": "bitwise_xor",
}  # fmt: skip


def function_name(func: Any) -> str:
    """`add` for torch.add, Tensor.add and Tensor.__add__; `iadd`, `add_`; an attribute's name, or `set` and that."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(func.__self__, "__name__", "")
        return attribute if name == "__get__" else f"set {attribute}"
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def is_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation of that name changes its first argument."""
    if name in ("setitem", "set data") or name in IN_PLACE_OPERATORS or kwargs.get("inplace"):
        return True
    return name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_")

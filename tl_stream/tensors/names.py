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


CONVERSIONS = {
    "to", "float", "double", "half", "bfloat16", "bool", "int", "long", "cpu", "cuda", "detach", "data",
}  # fmt: skip
_REDUCTIONS = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin"), ("dim", "keepdim")),
    **dict.fromkeys(("any", "all", "nansum", "logsumexp"), ("dim", "keepdim")),
    **dict.fromkeys(("var", "std"), ("dim", "unbiased", "keepdim")),
}


def normalised(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """numpy's `axis` for `dim`, and `input=` as the first argument, as torch takes them."""
    if "axis" in kwargs:
        kwargs = {**{key: value for key, value in kwargs.items() if key != "axis"}, "dim": kwargs["axis"]}
    if "input" in kwargs and not args:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    return args, kwargs


def reduction(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool, dict[str, Any]] | None:
    """`dim`, `keepdim` and the other options of a sum, mean, maximum or the like; None where it isn't one of those."""
    if name not in _REDUCTIONS:
        return None
    options = dict(zip(_REDUCTIONS[name], args[1:], strict=False)) | kwargs
    dim, keepdim = options.pop("dim", None), options.pop("keepdim", False)
    is_dim = dim is None or (isinstance(dim, int | tuple | list) and not isinstance(dim, bool))
    return (dim, keepdim, options) if is_dim else None

"""`MaskTensor`: what a model gets in place of its [batch, 1, query_pos, key_pos] attention mask; holds an `AttentionMask`.

Model code slices such masks, converts them, compares them with their least number, and in the end adds them to the
scores or fills the scores where they are True. The first three change little here; the last two note the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_stream.masking import AttentionMask
from tl_stream.tensors.wrapper import Wrapper


class MaskTensor(Wrapper):
    """Logically [batch, 1, query_pos, key_pos].

    Attributes:
        hides: Of a bool tensor: whether True says that a pair may not attend. (A float tensor holds 0 where it may.)
        bias: What a float tensor holds beside the mask, `[batch, head_index, 1, key_pos]`; None: nothing.
    """

    rank = -1  # scores and patterns know masks; masks don't know them
    what = "the attention mask while tl_stream traces"
    advice = "it can be sliced, converted, and applied to the attention scores"
    hides: bool
    bias: Tensor | None
    _make: Callable[[], AttentionMask]

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], AttentionMask],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        hides: bool = True,
        bias: Tensor | None = None,
    ) -> MaskTensor:
        """Stand for the dense form of what `make` gives, which is asked once, where it is needed."""
        self = cls.empty(tuple(shape), dtype, torch.empty(0, device=device).device)
        self._make, self.hides, self.bias = functools.cache(make), hides, bias
        return self

    @property
    def mask(self) -> AttentionMask:
        """Which pairs may attend."""
        return self._make()

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _HANDLERS[name](*args, **kwargs) if name in _HANDLERS else NotImplemented

    def like(self, dtype: torch.dtype, hides: bool = True) -> MaskTensor:
        """The same mask, told in another way."""
        return MaskTensor(self._make, self.shape, dtype, self.device, hides, self.bias)

    def part(self, rows: range, keys: range) -> MaskTensor:
        """The mask of some queries and keys."""
        make, bias = self._make, self.bias
        bias = None if bias is None else bias[..., keys.start : keys.stop]
        shape = (*self.shape[:2], len(rows), len(keys))
        return MaskTensor(lambda: make().part(rows, keys), shape, self.dtype, self.device, self.hides, bias)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MaskTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskTensor:
        return self


def _getitem(tensor: Any, key: Any) -> Any:
    key = key if isinstance(key, tuple) else (key,)
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *[slice(None)] * (5 - len(key)), *key[at + 1 :])
    key = (*key, *[slice(None)] * (4 - len(key)))
    if len(key) != 4 or not all(isinstance(part, slice) and part.step in (None, 1) for part in key):
        return NotImplemented
    texts, heads, rows, keys = (range(*part.indices(size)) for part, size in zip(key, tensor.shape, strict=True))
    if len(texts) != tensor.shape[0] or len(heads) != tensor.shape[1]:
        return NotImplemented
    return tensor if (len(rows), len(keys)) == tensor.shape[2:] else tensor.part(rows, keys)


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device).to(*args, **kwargs)
    if probe.dtype.is_floating_point != tensor.dtype.is_floating_point:
        return NotImplemented if tensor.bias is not None or probe.dtype != torch.bool else tensor.like(torch.bool)
    make, bias = tensor._make, None if tensor.bias is None else tensor.bias.to(*args, **kwargs)
    return MaskTensor(lambda: make().to(probe.device), tensor.shape, probe.dtype, probe.device, tensor.hides, bias)


def _same(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor if isinstance(tensor, MaskTensor) else NotImplemented


def _below(tensor: Any, bound: Any) -> Any:
    """`mask < x`, `mask <= x` for x below 0: where it hides."""
    additive = isinstance(tensor, MaskTensor) and tensor.dtype.is_floating_point and tensor.bias is None
    return tensor.like(torch.bool) if additive and float(bound) < 0 else NotImplemented


def _equals(tensor: Any, number: Any) -> Any:
    """`mask == 0`: where it lets through."""
    additive = tensor.dtype.is_floating_point and tensor.bias is None
    return tensor.like(torch.bool, hides=False) if additive and number == 0 else NotImplemented


def _not(tensor: Any) -> Any:
    return tensor.like(torch.bool, not tensor.hides) if tensor.dtype == torch.bool else NotImplemented


def _combined(hides: bool) -> Callable[[Any, Any], Any]:
    """`hidden | padding`, or `visible & valid`: with another mask told in the same way, or of keys `[batch, 1, 1, key_pos]`."""

    def handler(tensor: Any, other: Any) -> Any:
        if not isinstance(tensor, MaskTensor):
            tensor, other = other, tensor
        if tensor.hides != hides or tensor.dtype != torch.bool or other.dtype != torch.bool:
            return NotImplemented
        make = tensor._make
        if isinstance(other, MaskTensor):
            if other.hides != hides:
                return NotImplemented
            return MaskTensor(lambda: make().intersect(other.mask), tensor.shape, torch.bool, tensor.device, hides)
        if other.dim() != 4 or other.shape[1:3] != (1, 1):
            return NotImplemented
        shape = (other.shape[0], *tensor.shape[1:])
        return MaskTensor(lambda: make().with_padding(other[:, 0, 0] != hides), shape, torch.bool, tensor.device, hides)

    return handler


def _masked_fill(tensor: Any, where: Any, value: Any) -> Any:
    """An additive mask whose hidden entries get another number: still the same mask. Or a bias, which gets one."""
    if not isinstance(where, MaskTensor) or not where.hides or where.dtype != torch.bool or not value < 0:
        return NotImplemented
    if isinstance(tensor, MaskTensor):
        return tensor
    if tensor.dim() != 4 or tensor.shape[2] != 1 or not tensor.is_floating_point():
        return NotImplemented
    shape = (where.shape[0], tensor.shape[1], *where.shape[2:])
    return MaskTensor(where._make, shape, tensor.dtype, tensor.device, bias=tensor)


def _where(condition: Any, shown: Any, hidden: Any) -> Any:
    """`where(bool mask, 0, least number)`, or the other way round: the additive mask."""
    if not isinstance(condition, MaskTensor) or condition.dtype != torch.bool:
        return NotImplemented
    if condition.hides:
        shown, hidden = hidden, shown
    if float(shown) != 0 or float(hidden) >= 0:
        return NotImplemented
    dtype = hidden.dtype if isinstance(hidden, Tensor) else torch.get_default_dtype()
    return condition.like(dtype)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "to": _to,
    "type": _to,
    "bool": lambda tensor: _to(tensor, torch.bool),
    "float": lambda tensor: _to(tensor, torch.float32),
    **dict.fromkeys(("contiguous", "clone", "detach", "expand"), _same),
    **dict.fromkeys(("lt", "le"), _below),
    "eq": _equals,
    **dict.fromkeys(("logical_not", "bitwise_not", "invert"), _not),
    **dict.fromkeys(("or", "ror", "bitwise_or", "logical_or"), _combined(hides=True)),
    **dict.fromkeys(("and", "rand", "bitwise_and", "logical_and"), _combined(hides=False)),
    "masked_fill": _masked_fill,
    "where": _where,
}

"""A plain tensor of entries that were taken out of a sparse one, whose in-place changes go back to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SliceView(Tensor):
    """Behaves as the tensor it is, except that in-place operations also write through, as those on a torch view do.

    It remembers the buffer that was read, and where from; whatever shares the buffer's memory (`view[2:5]`) is
    a SliceView as well. Results of ordinary operations are plain tensors.
    """

    _buffer: Tensor
    _parent: Any
    _key: Any
    _version_read: int

    @classmethod
    def of(cls, buffer: Tensor, parent: Any, key: Any) -> SliceView:
        """Entries `parent[key]`, read just now."""
        return cls._share(buffer, buffer, parent, key, parent._data.version)

    @classmethod
    def _share(cls, part: Tensor, buffer: Tensor, parent: Any, key: Any, version: int) -> SliceView:
        view = part.as_subclass(cls)
        view._buffer, view._parent, view._key, view._version_read = buffer, parent, key, version
        return view

    @property
    def is_sparse_part(self) -> bool:
        """Whether this shows entries of a sparse tensor (rather than being left over from a copy)."""
        return hasattr(self, "_parent")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tl_stream.tensors.block_sparse import BlockSparseTensor, function_name

        kwargs = kwargs or {}
        if not all(issubclass(t, Tensor) and not issubclass(t, BlockSparseTensor) for t in types):
            return NotImplemented
        view = next((a for a in args if isinstance(a, SliceView) and a.is_sparse_part), None)
        target = args[0] if args and isinstance(args[0], SliceView) and args[0].is_sparse_part else None
        plain = [_plain(a) for a in args]
        name = function_name(func)
        if target is not None and _is_in_place(name):
            target._check_fresh()
            result = func(*plain, **{key: _plain(value) for key, value in kwargs.items()})
            target._commit()
            return None if name == "setitem" else target
        result = func(*plain, **{key: _plain(value) for key, value in kwargs.items()})
        if view is not None and isinstance(result, Tensor) and _shares_memory(result, view._buffer):
            return cls._share(result, view._buffer, view._parent, view._key, view._version_read)
        return result

    def _check_fresh(self) -> None:
        if self._parent._data.version != self._version_read:
            raise RuntimeError(
                "This part of a sparse tensor was read before the tensor was written to elsewhere; writing it back would "
                "undo that. Index the sparse tensor again, then write."
            )

    def _commit(self) -> None:
        self._parent[self._key] = self._buffer
        self._version_read = self._parent._data.version


def _plain(x: Any) -> Any:
    if isinstance(x, SliceView):
        return x.as_subclass(Tensor)
    if isinstance(x, tuple | list) and any(isinstance(item, SliceView) for item in x):
        return type(x)(_plain(item) for item in x)
    return x


def _is_in_place(name: str) -> bool:
    if name == "setitem":
        return True
    if name.endswith("_"):
        return name not in ("requires_grad_", "retain_grad_", "share_memory_")
    return name in ("iadd", "isub", "imul", "idiv", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor")


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.is_meta or a.numel() == 0:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

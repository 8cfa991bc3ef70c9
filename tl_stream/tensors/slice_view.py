"""A plain tensor of entries that were taken out of a sparse one, whose in-place changes go back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_stream.tensors.names import function_name, is_in_place
from tl_stream.tensors.wrapper import SparseTensor


class Source:
    """Where entries were taken out of a sparse tensor, and go back to."""

    @property
    def version(self) -> int:
        """Number of writes so far."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """The entries as they are now."""
        raise NotImplementedError

    def write(self, value: Tensor) -> None:
        """Put others in their place."""
        raise NotImplementedError


class SliceView(Tensor):
    """Behaves as the tensor it is, except that in-place operations also write through, as those on a torch view do.

    It remembers the buffer that was read, and where from; whatever shares the buffer's memory (`view[2:5]`) is
    a SliceView as well. Results of ordinary operations are plain tensors; arrays that share its memory are read-only.
    """

    _buffer: Tensor
    _source: Source
    _version_read: int

    @classmethod
    def of(cls, source: Source) -> SliceView:
        """The entries of `source`, read now."""
        buffer = source.read()
        return cls._share(buffer, buffer, source, source.version)

    @classmethod
    def _share(cls, part: Tensor, buffer: Tensor, source: Source, version: int) -> SliceView:
        view = part.as_subclass(cls)
        view._buffer, view._source, view._version_read = buffer, source, version
        return view

    @property
    def is_sparse_part(self) -> bool:
        """Whether this shows entries of a sparse tensor (rather than being left over from a copy)."""
        return hasattr(self, "_source")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, SparseTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        name = function_name(func)
        written = kwargs.get("out", args[0] if args and is_in_place(name, kwargs) else None)
        target = written if isinstance(written, SliceView) and written.is_sparse_part else None
        views = [x for x in (*args, *kwargs.values()) if isinstance(x, SliceView) and x.is_sparse_part]
        for view in views:
            view._refresh()
        result = func(*(_plain(x) for x in args), **{key: _plain(value) for key, value in kwargs.items()})
        if target is not None:
            target._commit()
            return None if name == "setitem" else target
        return views[0].follow(result) if views else result

    def follow(self, result: Any) -> Any:
        """`result`, where it shares the buffer's memory, as something that can't lose a write."""
        if isinstance(result, tuple | list) and type(result) in (tuple, list):
            return type(result)(self.follow(item) for item in result)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
        if isinstance(result, Tensor) and _shares_memory(result, self._buffer):
            return self._share(result, self._buffer, self._source, self._version_read)
        return result

    def _refresh(self) -> None:
        """Read the entries again if the sparse tensor was written to since, as a view would see them."""
        if self._source.version != self._version_read:
            self._buffer.copy_(self._source.read())
            self._version_read = self._source.version

    def _commit(self) -> None:
        self._source.write(self._buffer)
        self._version_read = self._source.version


def _plain(x: Any) -> Any:
    if isinstance(x, SliceView):
        return x.as_subclass(Tensor)
    if isinstance(x, tuple | list) and any(isinstance(item, SliceView) for item in x):
        return type(x)(_plain(item) for item in x)
    return x


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.is_meta or a.numel() == 0:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def picking(source: Callable[[Any, Callable[[Tensor], Tensor]], Source], name: str, is_view: bool) -> Callable[..., Any]:
    """A handler of a tensor's method that only picks entries; `is_view`: what torch's gives is a view.

    `source(tensor, pick)` are the entries that `pick` takes out of an ordinary tensor of the shape.
    """

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        entries = source(tensor, lambda grid: getattr(grid, name)(*args, **kwargs))
        return SliceView.of(entries) if is_view else entries.read()

    return handler

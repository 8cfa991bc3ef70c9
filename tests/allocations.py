"""Watches how large the tensors are that a piece of code makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """`numel` is the largest number of elements of any tensor that an operation made, `total` their sum.

    Views, and tensors without data (on the meta device), do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.untyped_storage().data_ptr() not in known:
                numel = leaf.untyped_storage().nbytes() // max(leaf.element_size(), 1)
                self.numel = max(self.numel, numel)
                self.total += numel
        return result

"""`AlibiBias`: stands for TransformerLens's head x T x T ALiBi tensor, and holds one slope a head."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors.block_sparse import _METADATA
from tl_stream.tensors.names import function_name


class AlibiBias(Tensor):
    """Of any length: slicing it changes nothing, and it can only be added to attention scores."""

    slopes: Float[Tensor, " head_index"]

    @staticmethod
    def __new__(cls, slopes: Float[Tensor, " head_index"], n_ctx: int) -> AlibiBias:
        """A bias for `len(slopes)` heads that reports `n_ctx` queries and keys."""
        shape = (len(slopes), n_ctx, n_ctx)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=slopes.dtype, device=slopes.device)
        self.slopes = slopes
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name == "getitem":
            return args[0]
        if name == "deepcopy":
            return None  # in a copied model: not made yet
        raise NotImplementedError(f"{name}() is not known on the ALiBi bias while tl_stream traces; it can be added to scores.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} needs the dense ALiBi bias, which is never made while tl_stream traces.")

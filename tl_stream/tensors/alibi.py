"""`AlibiBias`: stands for TransformerLens's head x T x T ALiBi tensor, and holds one slope a head."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors.wrapper import Wrapper


class AlibiBias(Wrapper):
    """Of any length: slicing it changes nothing, and it can only be added to attention scores."""

    what = "the ALiBi bias while tl_stream traces"
    advice = "it can be added to attention scores"
    slopes: Float[Tensor, " head_index"]

    @staticmethod
    def __new__(cls, slopes: Float[Tensor, " head_index"], n_ctx: int) -> AlibiBias:
        """A bias for `len(slopes)` heads that reports `n_ctx` queries and keys."""
        self = cls.empty((len(slopes), n_ctx, n_ctx), slopes.dtype, slopes.device)
        self.slopes = slopes
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "getitem":
            return args[0]
        return None if name == "deepcopy" else NotImplemented  # in a copied model: not made yet

"""`AlibiBias`: stands for TransformerLens's head x T x T ALiBi tensor, and holds one slope a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors.wrapper import Wrapper


class AlibiBias(Wrapper):
    """Of any length: slicing it changes nothing, and it can only be added to attention scores.

    Added to an ordinary tensor of scores (another thread runs the model, which isn't traced there) it is the dense bias.
    """

    what = "the ALiBi bias while tl_stream traces"
    advice = "it can be added to attention scores"
    slopes: Float[Tensor, " head_index"]
    make: Callable[[int], Tensor]

    @staticmethod
    def __new__(cls, slopes: Float[Tensor, " head_index"], n_ctx: int, make: Callable[[int], Tensor]) -> AlibiBias:
        """A bias for `len(slopes)` heads that reports `n_ctx` queries and keys; `make(n)` gives that of n, dense."""
        self = cls.empty((len(slopes), n_ctx, n_ctx), slopes.dtype, slopes.device)
        self.slopes, self.make = slopes, make
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "getitem":
            return args[0]
        if name == "add_":
            scores, (n_queries, n_keys) = args[0], args[0].shape[-2:]
            return func(scores, args[1].make(n_keys)[:, -n_queries:])
        return None if name == "deepcopy" else NotImplemented  # in a copied model: not made yet

"""`CaptureProduct`: how a model's q . k^T becomes `AttentionScores`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Scale
from tl_stream.tensors.merged_scores import MergedScores
from tl_stream.tensors.names import function_name
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.scores import AttentionScores, FireHook


class CaptureProduct(TorchFunctionMode):
    """While active, the product of queries and transposed keys is noted as `AttentionScores` instead of computed.

    It is the first product of two [batch, head_index, _, _] tensors that model code takes, by itself or in
    `scaled_dot_product_attention`; hooks, which may multiply matrices too, run while the capture is `paused`.

    Attributes:
        scores: What was captured; None: nothing yet.
        paused: Whether everything is let through.
    """

    def __init__(
        self,
        origin: Origin,
        n_heads: int,
        kv_heads: int,
        hooks: tuple[FireHook, FireHook] | None = None,
        keys: Float[Tensor, "batch kv_head_index key_pos d_head"] | None = None,
    ) -> None:
        """Heads are counted where a model merges them with the batch (BLOOM), or repeats keys for its query heads.

        `keys` are those before they are repeated, where they are known: scores refer to them, and not to a copy.
        """
        super().__init__()
        self.origin, self.n_heads, self.kv_heads, self.hooks, self.keys = origin, n_heads, kv_heads, hooks, keys
        self.scores: AttentionScores | None = None
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        name = function_name(func)
        if self.scores is None and name == "scaled_dot_product_attention" and all(_is_stack(x, 4) for x in args[:3]):
            return self._attended(*args, **(kwargs or {}))
        if self.scores is None:
            self.scores = self._captured(name, args, kwargs or {})
            if self.scores is not None:
                return MergedScores(self.scores) if name == "bmm" and args[0].dim() == 3 else self.scores
        return func(*args, **(kwargs or {}))

    def _captured(self, name: str, args: tuple, kwargs: dict) -> AttentionScores | None:
        if name in ("matmul", "bmm") and all(_is_stack(x, 4) for x in args[:2]):
            q, k = args[0], args[1].transpose(-1, -2)
        elif name == "bmm" and all(_is_stack(x, 3) for x in args[:2]) and not args[0].shape[0] % self.n_heads:
            q, k = (x.unflatten(0, (-1, self.n_heads)) for x in (args[0], args[1].transpose(1, 2)))
        elif name == "einsum" and len(args) == 3 and all(_is_stack(x, 4) for x in args[1:]):
            operands = _einsum_operands(*args)
            if operands is None:
                return None
            q, k = operands
        elif name == "baddbmm" and all(_is_stack(kwargs.get(key), 3) for key in ("batch1", "batch2")):
            return self._biased_product(args[0], **kwargs)
        else:
            return None
        if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
            return None
        return AttentionScores(Products(q, self._ungrouped(k)), self.origin, hooks=self.hooks)

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """`torch.nn.functional.scaled_dot_product_attention`, step by step."""
        self.scores = AttentionScores(Products(q, self._ungrouped(k)), self.origin, hooks=self.hooks)
        scores: Any = self.scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            rows, keys = (torch.arange(n, dtype=torch.int32, device=q.device) for n in scores.shape[-2:])
            stop = (rows + 1).clamp(max=len(keys))  # torch counts queries from the first key, whatever a KV cache holds
            scores = scores.with_mask(AttentionMask(None, stop, len(keys)))
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        pattern = torch.nn.functional.dropout(torch.softmax(scores, -1), dropout_p)
        return pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def _biased_product(self, bias: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1) -> Any:
        """`beta * bias + alpha * q @ k^T`, batch and heads merged (BLOOM)."""
        q, k = (x.unflatten(0, (-1, self.n_heads)) for x in (batch1, batch2.transpose(-1, -2)))
        scores = AttentionScores(Products(q, k), self.origin, hooks=self.hooks)
        return scores.with_mod(Scale(alpha)) + bias.unflatten(0, (-1, self.n_heads)) * beta

    def _ungrouped(self, k: Tensor) -> Tensor:
        """Keys before they were repeated for the query heads of each group."""
        if k.shape[1] <= self.kv_heads or k.shape[1] % self.kv_heads:
            return k
        groups = k.unflatten(1, (self.kv_heads, -1))
        if not bool((groups == groups[:, :, :1]).all()):
            return k
        once = groups[:, :, 0]
        return self.keys if self.keys is not None and torch.equal(once, self.keys) else once.clone()


def _is_stack(x: Any, dim: int) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.dim() == dim


def _einsum_operands(equation: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """q and k `[batch, head_index, _, d_head]` of an einsum that gives their product; None: another einsum."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    summed = "".join(set(names[0]) - set(output))
    if len(output) != 4 or len(summed) != 1:
        return None
    if output[2] in names[1]:
        names, first, second = names[::-1], second, first
    orders = output[:3] + summed, output[:2] + output[3] + summed
    if any(set(found) != set(order) for found, order in zip(names, orders, strict=True)):
        return None
    q, k = (
        x.permute([found.index(letter) for letter in order])
        for x, found, order in zip((first, second), names, orders, strict=True)
    )
    return q, k

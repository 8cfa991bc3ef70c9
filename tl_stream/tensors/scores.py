"""`AttentionScores`: q . k^T before Stream has chosen what to keep. Nothing is computed; what is done to it is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tl_stream.config import StreamConfig
from tl_stream.estimator import estimate_layout
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Alibi, Bias, Scale, ScoreMod, Tanh
from tl_stream.tensors.alibi import AlibiBias
from tl_stream.tensors.attention_ops import check_numbers, softmax
from tl_stream.tensors.block_sparse import BlockSparseScores
from tl_stream.tensors.data import ScoresData
from tl_stream.tensors.names import function_name
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.wrapper import Wrapper


class AttentionScores(Wrapper):
    """Logically [batch, head_index, query_pos, key_pos]; holds q, k, the mask and the score mods."""

    what = "attention scores that are still a product of q and k"
    advice = (
        "known are scaling by a number, tanh, adding a bias that does not vary over both query and key, and the mask; "
        "afterwards, in hook_attn_scores, the scores are sparse and know more"
    )
    products: Products
    origin: Origin
    mask: AttentionMask | None

    @staticmethod
    def __new__(cls, products: Products, origin: Origin, mask: AttentionMask | None = None) -> AttentionScores:
        """Scores of `products`; `mask` None: none applied yet."""
        q, k = products.q, products.k
        self = cls.empty((*q.shape[:3], k.shape[2]), q.dtype, q.device)
        self.products, self.origin, self.mask = products, origin, mask
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _HANDLERS[name](*args, **kwargs) if name in _HANDLERS else NotImplemented

    def with_mod(self, mod: ScoreMod) -> AttentionScores:
        """The scores with one more thing applied."""
        if isinstance(mod, Scale) and not self.products.score_mods:
            products = replace(self.products, scale=self.products.scale * mod.factor)
        else:
            products = replace(self.products, score_mods=(*self.products.score_mods, mod))
        return AttentionScores(products, self.origin, self.mask)

    def with_mask(self, mask: AttentionMask) -> AttentionScores:
        """The scores under a mask.

        Raises:
            ValueError: They have one already.
        """
        if self.mask is not None:
            raise ValueError("mask: these attention scores were masked before; expected one mask, that holds everything.")
        return AttentionScores(self.products, self.origin, mask)

    def to_sparse_scores(self) -> BlockSparseScores:
        """Let Stream choose the blocks to keep.

        Raises:
            ValueError: q or k holds NaN, or no mask was applied.
        """
        if self.mask is None:
            raise ValueError("mask: no causal mask was applied to the scores; bidirectional attention is not supported.")
        products, config = self.products, self._layer_config()
        batch, _, n_queries, n_keys = self.shape
        if not batch or not n_queries:
            raise ValueError(f"The input was of {batch} texts of {n_queries} tokens; expected at least one of each.")
        check_numbers("q", products.q, self.origin)
        check_numbers("k", products.k, self.origin)
        if self.origin.dense:
            blocks = min(config.block_q, n_queries), min(config.block_k, n_keys)
            layout = BlockLayout.full(self.mask, *blocks, *products.q.shape[:2])
        else:
            layout = estimate_layout(
                products.q, products.k, config, mask=self.mask, scale=products.scale, score_mods=products.score_mods
            )
        data = ScoresData(layout, -torch.inf, self.origin).of(products)
        return BlockSparseScores(data, dtype=self.dtype)

    def _layer_config(self) -> StreamConfig:
        """The run's config; random choices differ by layer."""
        config = self.origin.config
        return config if config.seed is None else replace(config, seed=config.seed * 1_000_003 + self.origin.layer)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AttentionScores(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.origin.layer})"


class CaptureProduct(TorchFunctionMode):
    """While active, the product of 4-D queries and transposed keys is noted as `AttentionScores` instead of computed."""

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function_name(func) == "matmul" and all(isinstance(x, Tensor) and x.dim() == 4 for x in args[:2]):
            q, k = args[0], args[1].transpose(-1, -2)
            return AttentionScores(Products(q, k), self.origin)
        return func(*args, **(kwargs or {}))


def _multiply(scores: Any, factor: Any) -> Any:
    if not isinstance(scores, AttentionScores):
        scores, factor = factor, scores
    number = _number(factor)
    return NotImplemented if number is None else scores.with_mod(Scale(number))


def _divide(scores: Any, divisor: Any) -> Any:
    number = _number(divisor)
    return NotImplemented if number is None or not isinstance(scores, AttentionScores) else scores.with_mod(Scale(1 / number))


def _tanh(scores: Any) -> Any:
    return scores.with_mod(Tanh())


def _add(scores: Any, bias: Any) -> Any:
    if not isinstance(scores, AttentionScores):
        scores, bias = bias, scores
    if isinstance(bias, AlibiBias):
        return scores.with_mod(Alibi(bias.slopes, scores.shape[-1] - scores.shape[-2]))
    if not isinstance(bias, Tensor) or isinstance(bias, AttentionScores):
        return NotImplemented
    full = bias[(None,) * (4 - bias.dim())]
    if full.shape[2] != 1 and full.shape[3] != 1:
        return NotImplemented
    return scores.with_mod(Bias(full))


def _to(scores: Any, *args: Any, **kwargs: Any) -> Any:
    products = scores.products
    q, k = products.q.to(*args, **kwargs), products.k.to(*args, **kwargs)
    if q is products.q and k is products.k:
        return scores
    return AttentionScores(replace(products, q=q, k=k, versions=()), scores.origin, scores.mask)


def _softmax(scores: Any, *args: Any, **kwargs: Any) -> Any:
    return softmax(scores.to_sparse_scores(), *args, **kwargs)


def _number(x: Any) -> float | None:
    if isinstance(x, Tensor):
        return float(x) if x.dim() == 0 and not isinstance(x, AttentionScores) and not x.requires_grad else None
    return float(x) if isinstance(x, int | float) else None


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "rmul", "imul", "multiply", "mul_"), _multiply),
    **dict.fromkeys(("div", "truediv", "true_divide", "divide", "itruediv", "idiv", "div_"), _divide),
    **dict.fromkeys(("add", "radd", "iadd", "add_"), _add),
    "tanh": _tanh,
    "to": _to,
    "softmax": _softmax,
}

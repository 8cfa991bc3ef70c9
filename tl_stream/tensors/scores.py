"""`AttentionScores`: q . k^T before Stream has chosen what to keep. Nothing is computed; what is done to it is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_stream.estimator import estimate_layout
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Alibi, Bias, Scale, ScoreMod, Tanh
from tl_stream.tensors.alibi import AlibiBias
from tl_stream.tensors.attention_ops import check_numbers, softmax
from tl_stream.tensors.block_sparse import BlockSparseScores
from tl_stream.tensors.dense_mask import HIDDEN, mask_of
from tl_stream.tensors.joined import JoinedTensor, join
from tl_stream.tensors.joined_layout import JoinedLayout, with_dense_queries
from tl_stream.tensors.mask_tensor import MaskTensor
from tl_stream.tensors.merged_scores import view
from tl_stream.tensors.names import is_in_place
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.rest import Rest
from tl_stream.tensors.scores_data import ScoresData
from tl_stream.tensors.wrapper import Wrapper

FireHook = Callable[[Tensor], Tensor]


class AttentionScores(Wrapper):
    """Logically [batch, head_index, query_pos, key_pos]; holds q, k, the mask and the score mods.

    Attributes:
        products: q and k, and what was done to their product.
        origin: Where the scores come from.
        mask: Which pairs may attend; None: no mask was applied yet.
        hooks: Where the model takes the softmax without firing them: its `hook_attn_scores` and `hook_pattern`.
    """

    what = "attention scores that are still a product of q and k"
    advice = (
        "known are scaling by a number, tanh, adding a bias that does not vary over both query and key, and the mask; "
        "afterwards, in hook_attn_scores, the scores are sparse and know more"
    )
    products: Products
    origin: Origin
    mask: AttentionMask | None
    hooks: tuple[FireHook, FireHook] | None

    @staticmethod
    def __new__(
        cls,
        products: Products,
        origin: Origin,
        mask: AttentionMask | None = None,
        hooks: tuple[FireHook, FireHook] | None = None,
    ) -> AttentionScores:
        """Scores of `products`."""
        q, k = products.q, products.k
        self = cls.empty((*q.shape[:3], k.shape[2]), q.dtype, q.device)
        self.products, self.origin, self.mask, self.hooks = products, origin, mask, hooks
        return self

    @classmethod
    def carry_out(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = _HANDLERS[name](*args, **kwargs) if name in _HANDLERS else NotImplemented
        if result is NotImplemented or not is_in_place(name, kwargs):
            return result
        return args[0]._become(result) if isinstance(args[0], AttentionScores) else NotImplemented

    def with_mod(self, mod: ScoreMod) -> AttentionScores:
        """The scores with one more thing applied."""
        if isinstance(mod, Scale) and not self.products.score_mods:
            products = replace(self.products, scale=self.products.scale * mod.factor)
        else:
            products = replace(self.products, score_mods=(*self.products.score_mods, mod))
        return AttentionScores(products, self.origin, self.mask, self.hooks)

    def with_mask(self, mask: AttentionMask) -> AttentionScores:
        """The scores under a mask, and under those they had."""
        if mask.device != self.device:  # a model spread over several devices makes its masks on the first
            mask = mask.to(self.device)
        mask = mask if self.mask is None else self.mask.intersect(mask)
        return AttentionScores(self.products, self.origin, mask, self.hooks)

    def to_sparse_scores(self) -> BlockSparseScores | JoinedTensor:
        """Let Stream choose the blocks to keep; joined where the last rows read everything.

        Raises:
            ValueError: q or k holds NaN, or no mask was applied, or one that isn't causal.
        """
        if self.mask is None and self.shape[2] == 1:  # a single query, in a step of generation, needs no mask
            return self.with_mask(AttentionMask.causal(1, self.shape[3], device=self.device)).to_sparse_scores()
        if self.mask is None:
            raise ValueError("mask: no causal mask was applied to the scores; bidirectional attention is not supported.")
        products, real = self.products, self.origin.real
        batch, _, n_queries, n_keys = self.shape
        if real is not None and self.mask.key_valid is None and real.shape == (batch, n_keys):
            self.mask = replace(self.mask, real=real.to(self.device))
        if bool((self.mask.stop > AttentionMask.causal(n_queries, n_keys, device=self.mask.device).stop).any()):
            raise ValueError("mask: it shows queries the keys after them; only causal attention can be made sparse.")
        if not batch or not n_queries:
            raise ValueError(f"The input was of {batch} texts of {n_queries} tokens; expected at least one of each.")
        check_numbers("q", products.q, self.origin)
        check_numbers("k", products.k, self.origin)
        n_dense = self.origin.config.dense_queries
        layout = with_dense_queries(self._layout(), n_dense and n_dense + self.mask.padding_behind())
        if isinstance(layout, BlockLayout):
            return self._on(layout, products)
        first, last = layout.parts
        start = first.shape[2]
        return join([self._on(first, products.rows(range(start))), self._on(last, products.rows(range(start, n_queries)))])

    def _become(self, other: AttentionScores) -> AttentionScores:
        """What an operation in place leaves: code may go on with the tensor that it changed, not with the result."""
        self.products, self.mask = other.products, other.mask
        return self

    def find_rest(self) -> Rest:
        """What lies outside any blocks that Stream may keep."""
        return Rest(self.products, self.origin.config.backend)

    def _on(self, layout: BlockLayout, products: Products) -> BlockSparseScores:
        data = ScoresData(layout, -torch.inf, self.origin).of(products)
        return BlockSparseScores(data, dtype=self.dtype)

    def _layout(self) -> BlockLayout | JoinedLayout:
        """The blocks to keep: all, those of an earlier run, or those of the estimate."""
        assert self.mask is not None
        config, products = self.origin.config, self.products
        batch, heads, n_queries, n_keys = self.shape
        if self.origin.dense or (config.decode == "exact" and n_queries == 1):
            return BlockLayout.full(self.mask, min(config.block_q, n_queries), min(config.block_k, n_keys), batch, heads)
        if config.layout_from is not None:
            return config.layout_from.block_layout(self.origin.layer).for_run(self.mask, batch, heads)
        if config.seed is not None:  # random choices differ by layer
            config = replace(config, seed=config.seed * 1_000_003 + self.origin.layer)
        return estimate_layout(
            products.q,
            products.k,
            config,
            mask=self.mask,
            scale=products.scale,
            score_mods=products.score_mods,
            layer=self.origin.layer,
            earlier=self.origin.earlier if config.block_q == 1 else None,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AttentionScores(shape={tuple(self.shape)}, dtype={self.dtype}, layer={self.origin.layer})"


def _multiply(scores: Any, factor: Any) -> Any:
    if not isinstance(scores, AttentionScores):
        scores, factor = factor, scores
    number = _number(factor)
    return NotImplemented if number is None else scores.with_mod(Scale(number))


def _divide(scores: Any, divisor: Any) -> Any:
    number = _number(divisor)
    return NotImplemented if number is None or not isinstance(scores, AttentionScores) else scores.with_mod(Scale(1 / number))


def _tanh(scores: Any) -> Any:
    return scores.with_mod(Tanh()) if scores.mask is None else NotImplemented  # what is hidden would come back, as -1


def _add(scores: Any, bias: Any) -> Any:
    if not isinstance(scores, AttentionScores):
        scores, bias = bias, scores
    if isinstance(bias, AlibiBias):
        return scores.with_mod(Alibi(bias.slopes, scores.shape[-1] - scores.shape[-2]))
    if isinstance(bias, MaskTensor) and bias.dtype.is_floating_point:
        scores = scores if bias.bias is None else scores.with_mod(Bias(bias.bias))
        return scores.with_mask(bias.mask)
    if not isinstance(bias, Tensor) or isinstance(bias, AttentionScores | MaskTensor):
        return NotImplemented
    full = bias[(None,) * (4 - bias.dim())]
    if full.shape[2] != 1 and full.shape[3] != 1:
        return _add_dense(scores, full)
    return scores.with_mod(Bias(full))


def _to(scores: Any, *args: Any, **kwargs: Any) -> Any:
    products = scores.products
    q, k = products.q.to(*args, **kwargs), products.k.to(*args, **kwargs)
    if q is products.q and k is products.k:
        return scores
    return AttentionScores(replace(products, q=q, k=k, versions=()), scores.origin, scores.mask, scores.hooks)


def _softmax(scores: Any, *args: Any, **kwargs: Any) -> Any:
    if scores.hooks is None:
        return softmax(scores.to_sparse_scores(), *args, **kwargs)
    hook_attn_scores, hook_pattern = scores.hooks
    return hook_pattern(torch.nn.functional.softmax(hook_attn_scores(scores), *args, **kwargs))


def _add_dense(scores: AttentionScores, full: Tensor) -> AttentionScores:
    """Add a `[_, _, query_pos, key_pos]` tensor, which has to be a mask: 0 where a query may read a key."""

    def visible(rows: Tensor) -> Tensor:
        shown = rows == 0
        if not bool((shown | (rows <= HIDDEN)).all()):
            raise NotImplementedError(
                f"The model adds a dense tensor of shape {tuple(full.shape)} to its attention scores that is more than a mask "
                "(0, or -inf or the least number); a bias that varies over both query and key can't be traced in linear memory."
            )
        return shown

    return scores.with_mask(mask_of(full, visible))


def _subtract(scores: Any, bias: Any) -> Any:
    return _add(scores, -bias) if isinstance(scores, AttentionScores) and isinstance(bias, Tensor) else NotImplemented


def _masked_fill(scores: Any, where: Any, value: Any) -> Any:
    """Fill with -inf, or the least number, where a mask hides."""
    return _hidden(scores, where, value, True)


def _where(condition: Any, scores: Any, value: Any) -> Any:
    """`where(visible, scores, least number)`, `scores.where(visible, least number)`, or the other way round."""
    if isinstance(condition, AttentionScores):
        condition, scores = scores, condition
    if isinstance(scores, AttentionScores):
        return _hidden(scores, condition, value, False)
    return _hidden(value, condition, scores, True)


def _hidden(scores: Any, mask: Any, value: Any, hides: bool) -> Any:
    """Scores that are `value` where the bool tensor `mask` is `hides`."""
    number = _number(value)
    if not isinstance(scores, AttentionScores) or number is None or number > HIDDEN or mask.dtype != torch.bool:
        return NotImplemented
    if isinstance(mask, MaskTensor):
        return scores.with_mask(mask.mask) if mask.hides == hides else NotImplemented
    full = mask[(None,) * (4 - mask.dim())]
    if full.shape[2] == 1 and scores.shape[2] > 1:
        return scores.with_mod(Bias(full.new_zeros(full.shape, dtype=scores.dtype).masked_fill(full == hides, number)))
    return scores.with_mask(mask_of(full, lambda rows: rows != hides))


def _maximum(scores: Any, bound: Any = None) -> Any:
    """`max(masked scores, least number)`, which changes only what is hidden."""
    number = _number(bound)
    hidden = isinstance(scores, AttentionScores) and scores.mask is not None
    return scores if hidden and number is not None and number <= torch.finfo(scores.dtype).min else NotImplemented


def _number(x: Any) -> float | None:
    if isinstance(x, Tensor):
        return float(x) if x.dim() == 0 and not isinstance(x, AttentionScores) and not x.requires_grad else None
    return float(x) if isinstance(x, int | float) else None


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "rmul", "imul", "multiply", "mul_"), _multiply),
    **dict.fromkeys(("div", "truediv", "true_divide", "divide", "itruediv", "idiv", "div_"), _divide),
    **dict.fromkeys(("add", "radd", "iadd", "add_"), _add),
    **dict.fromkeys(("sub", "isub", "sub_", "subtract"), _subtract),
    "tanh": _tanh,
    "to": _to,
    "float": lambda scores: _to(scores, torch.float32),
    "softmax": _softmax,
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "where": _where,
    **dict.fromkeys(("view", "reshape"), view),
    **dict.fromkeys(("max", "maximum"), _maximum),
}

"""One attention module of a TransformerBridge while it is traced.

The module's own forward runs. The product of its q and k is captured, whether TransformerLens's code takes it or that of
the Hugging Face module behind it, or whether the latter hands q and k to the attention interface. Hook points run with the
capture paused: a user's hook may multiply matrices too. Where TransformerLens would show the attention only after the
Hugging Face module has used it, `hook_attn_scores` and `hook_pattern` fire at the softmax instead, so that edits count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformer_lens.hook_points import HookPoint

from tl_stream.hosts.hooks import complete, first_hook, stream, watch_gradient
from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.hosts.own_code import is_own
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Scale, Tanh
from tl_stream.tensors.capture import CaptureProduct
from tl_stream.tensors.dense_mask import mask_of
from tl_stream.tensors.mask_tensor import MaskTensor
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.scores import AttentionScores

STEPS = ("_apply_reconstruct_attention_mask", "_masked_softmax")


class BridgeAttention:
    """Stream between q . k and the softmax of one attention module."""

    def __init__(self, attn: Any, origin_of: Callable[[], Origin], n_heads: int, kv_heads: int) -> None:
        self.attn, self.origin_of, self.n_heads, self.kv_heads = attn, origin_of, n_heads, kv_heads
        self.capture: CaptureProduct | None = None  # that of the call in progress
        self.fired: set[Module] = set()

    def install(self, overrides: Overrides) -> None:
        """Take the module over."""
        attn = self.attn
        first_hook(overrides, attn.hook_attn_scores, stream)
        first_hook(overrides, attn.hook_pattern, watch_gradient)
        for part in {*_hook_points(attn), *attn.submodules.values()}:
            overrides.method(part, "_call_impl", partial(self._call_part, part))
        for owner, name, buffer in _mask_buffers(attn):
            overrides.put(owner._buffers, name, _BufferMask(buffer, overrides.is_on))
        for inner in set(attn.original_component.modules()).difference(attn.submodules.values(), _hook_points(attn)):
            overrides.method(inner, "_call_impl", partial(self._call_inner, inner))
        overrides.method(attn, "forward", self._call)
        self.install_steps(overrides)
        overrides.put(attn.__dict__, "_pattern", attn._pattern)

    def install_steps(self, overrides: Overrides) -> None:
        """Replace the steps that are TransformerLens's own; a user's are called as they are."""
        for name, function in zip(STEPS, (self._apply_mask, _softmax), strict=True):
            if hasattr(self.attn, name) and is_own(standing(self.attn, name)):
                overrides.method(self.attn, name, function)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """What `transformers.AttentionInterface` asks for.

        Args:
            q: Queries `[batch, head_index, query_pos, d_head]`.
            k: Keys `[batch, kv_head_index, key_pos, d_head]`.
            v: Values `[batch, kv_head_index, key_pos, d_v]`.
            attention_mask: A `MaskTensor`, or None for causal attention.
            scaling: Factor on q . k^T; None: d_head ** -0.5.
            softcap: Scores become `softcap * tanh(scores / softcap)`.
            s_aux: Attention sinks, one logit a head.
            dropout: Share of the pattern to drop; more than 0 can't be traced.
            _: What other implementations take.

        Returns:
            z `[batch, query_pos, head_index, d_v]` and the pattern.
        """
        scores = AttentionScores(Products(q, k), self.origin).with_mod(
            Scale(q.shape[-1] ** -0.5 if scaling is None else scaling)
        )
        assert self.capture is not None
        self.capture.scores = scores
        if softcap is not None:
            for mod in (Scale(1 / softcap), Tanh(), Scale(softcap)):
                scores = scores.with_mod(mod)
        sparse = self._fire(self.attn.hook_attn_scores, self._masked(scores, attention_mask, k.shape[2], q.shape[2]))
        if s_aux is not None:
            column = s_aux.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
            weights = torch.softmax(torch.cat([sparse, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
        else:
            weights = torch.softmax(sparse, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        weights = torch.nn.functional.dropout(weights.to(q.dtype), dropout)
        pattern = self._fire(self.attn.hook_pattern, weights)
        z = pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return z.transpose(1, 2).contiguous(), pattern

    @property
    def origin(self) -> Origin:
        """That of the call in progress."""
        assert self.capture is not None
        return self.capture.origin

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with q . k^T noted."""
        before = self.capture, self.fired  # a hook may run the model, too
        hooks = partial(self._fire, self.attn.hook_attn_scores), partial(self._fire, self.attn.hook_pattern)
        capture = CaptureProduct(self.origin_of(), self.n_heads, self.kv_heads, hooks)
        self.capture, self.fired = capture, set()
        try:
            with capture:
                output = original(*args, **kwargs)
            if capture.scores is None:
                raise NotImplementedError(
                    f"The attention of layer {self.origin.layer} ({type(self.attn).__name__} around "
                    f"{type(self.attn.original_component).__name__}) took no product of q and k that could be captured; it "
                    "can't be traced."
                )
            return output
        finally:
            capture.paused = True  # should Ctrl-C have kept torch from taking it off its stack of modes
            self.capture, self.fired = before

    def _call_part(self, part: Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A hook point or projection within the module. What fired at the softmax doesn't fire again afterwards."""
        if part in self.fired:
            return args[0]
        if self.capture is None:
            return original(*args, **kwargs)
        capture = self.capture
        before, capture.paused = capture.paused, True
        try:
            result = original(*args, **kwargs)
            is_recorded = part in (self.attn.hook_attn_scores, self.attn.hook_pattern)
            return complete(args[0], result, part) if is_recorded else result
        finally:
            capture.paused = before

    def _call_inner(self, inner: Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A part of the Hugging Face module: torch's hooks on it run with the capture paused, too; its forward as before."""
        capture = self.capture
        if capture is None or capture.paused or not (inner._forward_hooks or inner._forward_pre_hooks):
            return original(*args, **kwargs)

        def resumed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            capture.paused = False
            try:
                return forward(*args, **kwargs)
            finally:
                capture.paused = True

        overrides = Overrides(lambda: True)
        overrides.method(inner, "forward", resumed)
        capture.paused = True
        try:
            return original(*args, **kwargs)
        finally:
            capture.paused = False
            overrides.restore()

    def _fire(self, point: HookPoint, x: Tensor) -> Tensor:
        result = point(x)
        self.fired.add(point)
        return result

    def _apply_mask(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self._masked(*args, **kwargs)

    def _masked(self, attn_scores: Any, attention_mask: Tensor | None, seq_len: int, q_seq_len: int | None = None) -> Tensor:
        """`_apply_reconstruct_attention_mask` without a query_pos x key_pos tensor."""
        if isinstance(attention_mask, MaskTensor):
            n_queries, n_keys = attn_scores.shape[-2:]
            rows = range(attention_mask.shape[-2] - n_queries, attention_mask.shape[-2])
            return attn_scores + attention_mask.part(rows, range(n_keys))
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[-2] > 1:
            part = attention_mask[..., -attn_scores.shape[-2] :, : attn_scores.shape[-1]]  # made by a user's mask function
            return attn_scores.where(part, -torch.inf) if part.dtype == torch.bool else attn_scores + part
        if attention_mask is not None and attention_mask.dim() != 2:
            raise NotImplementedError(
                f"attention_mask reached the attention of layer {self.origin.layer} with shape {tuple(attention_mask.shape)}, "
                "not None or [batch, pos] with 0 for padding: TransformerLens takes this one for the whole mask and shows "
                "every query the keys after it."
            )
        valid = None if attention_mask is None else attention_mask[:, :seq_len].bool()
        mask = AttentionMask.causal(q_seq_len or seq_len, seq_len, key_valid=valid, device=attn_scores.device)
        return attn_scores.with_mask(mask)


def _hook_points(module: Module) -> list[HookPoint]:
    return [point for point in module.modules() if isinstance(point, HookPoint)]


def _mask_buffers(attn: Any) -> list[tuple[Module, str, Tensor]]:
    """Square bool buffers, in which some models keep their causal mask (GPT-Neo, TransformerLens's native models)."""
    return [
        (module, name, buffer)
        for module in attn.original_component.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if isinstance(buffer, Tensor)
        and buffer.dtype == torch.bool
        and buffer.dim() >= 2
        and buffer.shape[-1] == buffer.shape[-2]
    ]


class _BufferMask:
    """Stands in the place of a mask buffer `[..., query_pos, key_pos]`: a part of it is a `MaskTensor`."""

    def __init__(self, buffer: Tensor, is_on: Callable[[], bool]) -> None:
        self.buffer, self.is_on = buffer, is_on
        self.hides = not bool(buffer.flatten()[0])  # a query may always read itself

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.buffer, memo)

    def __getitem__(self, key: Any) -> Tensor:
        part = self.buffer[key]
        if not self.is_on():
            return part
        part = part.view(part.shape[-2:])
        make = partial(mask_of, part, lambda rows: rows != self.hides)
        return MaskTensor(make, (1, 1, *part.shape), torch.bool, part.device, self.hides)


def _softmax(original: Callable[..., Any], attn_scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`_masked_softmax`: sparse patterns are 0 in rows without keys anyway."""
    return torch.softmax(attn_scores, dim=-1, dtype=dtype)

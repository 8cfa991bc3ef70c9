"""How much of a residual stream after attention each kept entry, and the stream before it, brought about.

Information-flow routes (Ferrando & Voita 2024, arXiv:2403.00824, section 2): attention adds to the residual stream x_i of a
position the vectors A_ij v_j W_O, one for each key j and head. The importance of a part p of their sum y is

    max(|y|_1 - |y - p|_1, 1e-5), over the sum of that over all parts;

the parts are these vectors and x_i. (The output's bias is in y, and is no part.) Where an MLP reads the same stream as
attention and is added with it (GPT-NeoX), what it adds is a part, too. Where their sum is divided by its root mean square
before it is added (Gemma 2 and 3), so is each of them: by the sum's, as it was in this run. So the weights of all edges into a
position sum to 1: going backwards along them is a walk, and a product of weights is the probability of its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.kept import KeptEntries, KeptRows, patterns_of
from tl_stream.fidelity.runs import wide
from tl_stream.precision import outside_autocast

EPSILON = 1e-5
CHUNK_NUMBERS = 2**18  # about what stays in a core's cache
_TOLERANCE = 0.02
_NEEDED = ("hook_pattern", "hook_v", "hook_z", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out")


def flow_names(name: str) -> bool:
    """The activations that `needle_routes` and `information_flow` need, as a `names_filter`."""
    return name.endswith(_NEEDED)


def importance(whole: Float[Tensor, "*#rows d_model"], part: Float[Tensor, "*#rows d_model"]) -> Float[Tensor, "*rows"]:
    """`max(|whole|_1 - |whole - part|_1, 1e-5)`; the two broadcast."""
    return (whole.abs().sum(-1) - (whole - part).abs().sum(-1)).clamp(min=EPSILON)


@dataclass(frozen=True, eq=False)
class RowShares:
    """The weights of the edges into some positions of one query block.

    Attributes:
        rows: The positions.
        stay: Weight of the residual stream.
        mlp: Weight of an MLP that is added beside attention; 0 where none is.
        key_pos: Position of each kept key.
        share: Weight of each head's edge from each of them; 0 where there is none.
    """

    rows: Int[Tensor, " row"]
    stay: Float[Tensor, " row"]
    mlp: Float[Tensor, " row"]
    key_pos: Int[Tensor, "head_index key"]
    share: Float[Tensor, "head_index row key"]

    def with_mlp_stayed(self) -> RowShares:
        """The same, with the MLP as a part of what stayed: neither comes from another position."""
        return replace(self, stay=self.stay + self.mlp, mlp=torch.zeros_like(self.mlp))


@dataclass(frozen=True, eq=False)
class AttentionFlow:
    """One layer's attention in one text, as parts of the residual stream.

    Attributes:
        entries: The pattern.
        v: Values, by key-value head.
        W_O: Output weights of each query head.
        before: Residual stream before attention.
        after: Residual stream after it.
        mlp: What an MLP added beside attention; None where that comes later, or there is none.
        gain: What a norm after attention multiplied each position's sum of parts by; None where there is none.
    """

    entries: KeptEntries
    v: Float[Tensor, "pos kv_head_index d_v"]
    W_O: Float[Tensor, "head_index d_v d_model"]
    before: Float[Tensor, "pos d_model"]
    after: Float[Tensor, "pos d_model"]
    mlp: Float[Tensor, "pos d_model"] | None = None
    gain: Float[Tensor, "pos d_model"] | None = None

    @classmethod
    def of(cls, cache: Any, model: Any, layer: int, text: int) -> AttentionFlow:
        """One layer of a cached run.

        Raises:
            KeyError: An activation that is needed isn't in the cache.
            ValueError: Attention doesn't add `pattern @ v @ W_O + b_O` to the residual stream, nor that under an RMS norm.
        """
        entries = KeptEntries.of(patterns_of(cache)[layer], text)
        attn = model.blocks[layer].attn
        weights = getattr(attn, "W_O", None)
        if weights is None or weights.dim() != 3 or weights.shape[0] != entries.n_heads:
            raise ValueError(
                f"The attention of layer {layer} shows no W_O [head_index, d_head, d_model]; routes can't be weighed."
            )
        by_head = [_by_head(cache, name, layer, text, entries.length, weights.shape[1]) for name in ("v", "z")]
        flow = cls(
            entries,
            by_head[0],
            weights.detach().to(by_head[0]),
            activation(cache, "resid_pre", layer, text),
            activation(cache, "resid_mid" if has_later_mlp(model) else "resid_post", layer, text),
            activation(cache, "mlp_out", layer, text) if model.cfg.parallel_attn_mlp else None,
        )
        norm = getattr(model.blocks[layer], "ln1_post", None)
        summed = flow._summed(by_head[1], getattr(attn, "b_O", None))
        flow = flow if norm is None else replace(flow, gain=_gain(norm, summed, flow.added))
        flow._check(by_head[1][-1], summed[-1], layer, cache.config.forward)
        return flow

    @property
    def added(self) -> Float[Tensor, "pos d_model"]:
        """What attention added to the residual stream."""
        return self.after - self.before - (0 if self.mlp is None else self.mlp)

    def shares(self, positions: Int[Tensor, " row"]) -> Iterator[RowShares]:
        """The weights of all edges into some positions (ascending), block by block. O(T) memory."""
        for run in self.entries.runs(positions):
            starts = torch.searchsorted(positions, run.query_pos[:, 0].contiguous()).tolist()
            stops = torch.searchsorted(positions, run.last_query, right=True).tolist()
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                yield self._block(run, i, positions[start:stop])

    def _block(self, run: KeptRows, i: int, rows: Tensor) -> RowShares:
        offset = rows - run.query_pos[i, 0]
        kept, key_pos = run.kept[:, i, offset], run.key_pos[:, i].clamp(max=self.entries.length - 1)
        whole, weight = self.after[rows], run.weight[:, i, offset]
        share = torch.stack([self._importances(rows, weight[h], key_pos[h], h) for h in range(self.entries.n_heads)])
        share = torch.where(kept, share, 0.0)
        stay = importance(whole, self.before[rows])
        mlp = torch.zeros_like(stay) if self.mlp is None else importance(whole, self.mlp[rows])
        total = stay + mlp + share.sum((0, 2))
        return RowShares(rows, stay / total, mlp / total, key_pos, share / total[:, None])

    def _importances(self, rows: Tensor, weight: Tensor, key_pos: Tensor, head: int) -> Float[Tensor, "row key"]:
        """Of one head's parts of some rows; a few rows at a time, for each takes key x d_model numbers."""
        moved = self.moved(head, key_pos)
        step = max(1, CHUNK_NUMBERS // max(moved.numel(), 1))
        found = []
        for some, shares in zip(rows.split(step), weight.split(step), strict=True):
            whole, parts = self.after[some, None], moved if self.gain is None else moved * self.gain[some, None]
            rest = torch.addcmul(whole, shares[..., None], parts, value=-1)  # `importance`, in fewer passes over memory
            found.append((whole.abs().sum(-1) - rest.abs_().sum(-1)).clamp(min=EPSILON))
        return torch.cat(found)

    @outside_autocast
    def moved(self, head: int, key_pos: Int[Tensor, " key"]) -> Float[Tensor, "key d_model"]:
        """What a head would add from some keys, were its whole attention on each and no norm after it: `v_j W_O`."""
        group = self.entries.n_heads // self.v.shape[1]
        return self.v[key_pos, head // group] @ self.W_O[head]

    @outside_autocast
    def _summed(self, z: Float[Tensor, "pos head_index d_v"], bias: Tensor | None) -> Float[Tensor, "pos d_model"]:
        """The sum of all parts of attention and the bias, before a norm."""
        return torch.einsum("phd,hdm->pm", z, self.W_O) + (0 if bias is None else bias.detach().to(z))

    @outside_autocast
    def _check(self, z: Float[Tensor, "head_index d_v"], summed: Float[Tensor, " d_model"], layer: int, forward: str) -> None:
        """That the parts are those of this model, in its last row."""
        agree = _close(summed if self.gain is None else summed * self.gain[-1], self.added[-1])
        if forward == "sparse":
            (run,) = self.entries.runs(torch.tensor([self.entries.length - 1], device=z.device))
            row, keys = self.entries.length - 1 - int(run.query_pos[0, 0]), run.key_pos[:, 0].clamp(max=self.entries.length - 1)
            kv_head = torch.arange(self.entries.n_heads, device=z.device) // (self.entries.n_heads // self.v.shape[1])
            agree &= _close(torch.einsum("hk,hkd->hd", run.weight[:, 0, row], self.v[keys, kv_head[:, None]]), z)
        if not agree:
            raise ValueError(
                f"In layer {layer} attention does not add pattern @ v @ W_O + b_O to the residual stream (it is gated, scaled "
                "or normed on the way, other than by an RMS norm ln1_post), so that its parts can't be weighed. Expected a "
                "model in which it does, as in GPT-2, Llama and Gemma 3."
            )


def _gain(
    norm: Callable[[Tensor], Tensor], summed: Float[Tensor, "pos d_model"], normed: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    """What an RMS norm multiplied each position by: its weights (it is 1 on ones), over the root mean square there."""
    weights = norm(torch.ones_like(summed[:1, None]))[0, 0]
    scaled = summed * weights
    size = (scaled * scaled).sum(-1, keepdim=True).clamp(min=torch.finfo(summed.dtype).tiny)
    return (normed * scaled).sum(-1, keepdim=True) / size * weights


def has_later_mlp(model: Any) -> bool:
    """Whether each layer's MLP reads what attention has added to, and is added after it."""
    return not (model.cfg.parallel_attn_mlp or model.cfg.attn_only)


def activation(cache: Any, name: str, layer: int, text: int) -> Float[Tensor, pos * rest]:
    """A cached activation of one text, in float32 or better.

    Raises:
        KeyError: It isn't in the cache.
    """
    try:
        found = cache[name, layer]
    except KeyError:
        raise KeyError(
            f"The cache lacks {name!r} of layer {layer}; expected it beside the pattern. Run with "
            "names_filter=tl_stream.analysis.flow_names, or without names_filter."
        ) from None
    return wide((found[text] if cache.has_batch_dim else found).detach())


def _by_head(cache: Any, name: str, layer: int, text: int, length: int, d_v: int) -> Float[Tensor, "pos heads d_v"]:
    """Values or head outputs; ValueError where they aren't `d_v` numbers for each position and head."""
    found = activation(cache, name, layer, text)
    if d_v == 0 or found.shape[0] != length or found[0].numel() % d_v:
        raise ValueError(
            f"{name!r} of layer {layer} was of shape {tuple(found.shape)}; expected [pos, head, d_head] with {length} "
            f"positions and W_O's d_head of {d_v}. (Multi-head latent attention can't be analysed so.)"
        )
    return found.flatten(1).unflatten(1, (-1, d_v))


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * b.norm() + EPSILON)

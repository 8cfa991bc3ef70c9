"""A total budget, distributed over heads and layers by the attention that each further block holds.

A head's curve is the attention that the first, the second, ... block of its budget adds in the mean over its rows: that of the
best block, the second best, and so on, but nothing where this is a row's own one, which is kept anyway. Where a step adds more
than the one before it, both are worth their mean, as they come together (the curve's least concave majorant). Then it falls,
and taking the greatest of all heads' next steps, again and again, gives the distribution that keeps the most attention in the
mean over heads. The curves are measured once, in a run with full attention, and serve any total.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.budget import Constant, PerHead
from tl_stream.cache import is_pattern
from tl_stream.config import StreamConfig, as_config, check_shares
from tl_stream.estimator import Limits, are_own, block_shares, cut_padding, in_order
from tl_stream.fidelity.runs import dense_config
from tl_stream.hosts import host_of
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.precision import outside_autocast
from tl_stream.tensors import BlockSparsePattern
from tl_stream.tensors.retained import recomputable
from tl_stream.tracing import run_with_sparse_cache


@torch.no_grad()
def distribute(
    model: Any, tokens: Any, blocks: float, *, config: StreamConfig | None = None, at_most: int = 64, **kwargs: Any
) -> PerHead:
    """A budget of `blocks` key blocks a query block in the mean over all heads, more for the heads that spread their attention.

    The model reads the text once with full attention (streamed: linear memory, quadratic time).

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        tokens: The text, as the model takes it.
        blocks: Key blocks a query block and head, in the mean over the heads of all layers but `config.dense_layers`.
        config: Blocks and estimator, by whose shares the heads are judged; None: the defaults.
        at_most: Most blocks that a head can get.
        **kwargs: As for `run_with_sparse_cache`, but no `names_filter` or `logits_to_keep`.

    Returns:
        A budget for `StreamConfig(k=...)`, at least 1 block a head.

    Raises:
        ValueError: `blocks` is below 1 or above `at_most`, the estimator is one that reckons no shares, or every
            layer is left dense.
    """
    shares = HeadShares(model, as_config(config), at_most)
    if not 1 <= blocks <= at_most:
        raise ValueError(f"blocks was {blocks}, with at_most={at_most}; expected 1 <= blocks <= at_most.")
    with shares.measured(model):
        run_with_sparse_cache(model, tokens, config=dense_config(shares.config), logits_to_keep=1, names_filter=[], **kwargs)
    return shares.budget(round(blocks * shares.n_heads))


class HeadShares:
    """What the best, the second best, ... key block of each head holds of a text's attention, and any total so distributed.

    Args:
        model: The model.
        config: Blocks, dense layers (which need no budget) and estimator.
        at_most: Most blocks that a head can get.

    Raises:
        ValueError: The estimator reckons no shares, or every layer is left dense.

    Attributes:
        n_heads: How many heads share a total: all of the layers that aren't left dense.
    """

    def __init__(self, model: Any, config: StreamConfig, at_most: int) -> None:
        check_shares(config, "to distribute a total by")
        self.config, self.at_most = config, at_most
        self.layers = host_of(model).attention_layers(model).keys() - config.dense_layer_indices(model.cfg.n_layers)
        if not self.layers:
            raise ValueError(
                f"config had dense_layers={config.dense_layers!r}, all {model.cfg.n_layers} layers of the model; "
                "expected some that are pruned, to distribute a total over."
            )
        self.n_heads: int = len(self.layers) * model.cfg.n_heads
        self.curves: dict[int, Float[Tensor, "head_index rank"]] = {}

    def measured(self, model: Any) -> AbstractContextManager[Any]:
        """Within this context the model's next full run over the text is measured, layer by layer."""
        return Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, self._note)]))

    def budget(self, total: int) -> PerHead:
        """So many blocks over all heads, where they hold the most attention."""
        names = [(layer, head) for layer, steps in self.curves.items() for head in range(len(steps))]
        steps = falling(torch.cat([each.cpu() for each in self.curves.values()])[:, 1:])
        steps = torch.cat([steps.new_full((len(names), 1), torch.inf), steps], 1)
        best = steps.flatten().topk(total).indices // self.at_most
        numbers = torch.bincount(best, minlength=len(names)).tolist()
        return PerHead(dict(zip(names, numbers, strict=True)), otherwise=max(1, round(total / self.n_heads)))

    def _note(self, pattern: Tensor, hook: Any) -> None:
        if not isinstance(pattern, BlockSparsePattern):
            return
        layer = pattern.origin.layer
        if layer in self.layers and layer not in self.curves:  # later passes are steps of generation
            self.curves[layer] = curve(pattern, self.config, self.at_most)


@outside_autocast
def curve(pattern: BlockSparsePattern, config: StreamConfig, at_most: int) -> Float[Tensor, "head_index rank"]:
    """The share of attention that the r-th key block of a budget adds, in the mean over the query blocks of each head."""
    data, products = recomputable(pattern)
    layout = data.layout
    parts = cut_padding(
        products.q, products.k, layout.mask, layout.block_q, layout.block_k, products.scale, products.score_mods
    )
    held, n_rows = torch.zeros(layout.n_heads, at_most, device=layout.device), 0
    for part in parts:
        limits = Limits(part.problem, [Constant(at_most)] * layout.n_heads)
        for run, _, candidates, reckoned in block_shares(part.problem, config, limits):
            _, shares, blocks = in_order(run, candidates, reckoned, at_most, config)
            added = shares.clamp(min=0).masked_fill(are_own(run, blocks), 0.0)
            held = held + pad(added, (0, at_most - added.shape[-1])).sum((0, 2))
        n_rows += part.problem.shape[0] * part.problem.shape[2]
    return held / n_rows


def falling(steps: Float[Tensor, "head_index rank"]) -> Float[Tensor, "head_index rank"]:
    """The slopes of the least concave majorant of the steps' sums: `min over i <= r of max over j >= r of mean(i, ..., j)`."""
    sums = pad(steps.double().cumsum(-1), (1, 0))
    length = torch.arange(1, sums.shape[-1] + 1)[None, :-1] - torch.arange(sums.shape[-1] - 1)[:, None]  # from i to j
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / length.clamp(min=1)
    means = means.masked_fill(length < 1, -torch.inf)
    greatest = means.flip(-1).cummax(-1).values.flip(-1)  # over j >= r, of each i
    return greatest.masked_fill(length < 1, torch.inf).amin(1)

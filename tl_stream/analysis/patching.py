"""Activation patching by blocks of tokens, coarse to fine: which places of a long text a difference comes from.

Patching every token of a text of T tokens takes T forwards. Here stretches are patched whole, and only those with the greatest
effect are cut into parts and patched again, down to blocks or sentences: O(log T) forwards a place that matters. A stretch in
which effects cancel out looks as if it had none; more `starts` or a larger `keep` guard against that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_stream.analysis.checks import check_count
from tl_stream.analysis.patching_result import Effect, PatchEffects
from tl_stream.analysis.refinement import Refinement
from tl_stream.config import StreamConfig, as_config
from tl_stream.hosts.hooks import as_prompt
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.tracing import sparse

Metric = Callable[[Float[Tensor, "1 pos d_vocab"]], Any]


@torch.no_grad()
def patch_by_block(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    config: StreamConfig | None = None,
    layers: int | Sequence[int] = 0,
    point: str = "hook_resid_pre",
    spans: Sequence[tuple[int, int]] | None = None,
    block: int = 32,
    starts: int = 16,
    split: int = 4,
    keep: int = 4,
    logits_to_keep: int = 1,
    batch_size: int = 4,
    progress: bool = True,
) -> PatchEffects:
    """What each stretch of the clean run's activations does to a metric when it is put into the corrupted run.

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        clean: Text or tokens `[pos]` or `[1, pos]`.
        corrupted: The same, of the same length.
        metric: A function of the logits `[1, logits_to_keep, d_vocab]` that gives one number.
        config: How sparsely the runs attend; None: the defaults. Each run chooses its own blocks, unless `layout_from` says
            which; `k` as large as there are blocks gives the dense model.
        layers: Layer index or indices; each is patched by itself.
        point: Which activation of a layer, `[batch, pos, ...]`: `"hook_resid_pre"`, `"hook_mlp_out"`, `"attn.hook_z"`, ...
        spans: The finest stretches `(start, stop)`, such as sentences, in order; None: blocks.
        block: Tokens a block.
        starts: With how many stretches of the text to begin, at most.
        split: Into how many parts a stretch is cut.
        keep: How many stretches of each layer are cut at each step: those with the greatest effect, up or down.
        logits_to_keep: Of how many last positions the metric sees the logits.
        batch_size: How many patched runs are made at once.
        progress: Show a progress bar, whose total is the number of forwards, known beforehand (`PatchEffects.planned`).

    Returns:
        The effect of every stretch that was patched.

    Raises:
        TypeError: A metric that doesn't give a number, or inputs that are neither text nor tokens.
        ValueError: Lengths that differ, more than one text, a layer or a point that the model doesn't have, spans that are
            empty, out of the text or out of order, numbers below 1, or a metric that is the same for both texts.
    """
    pair = [as_prompt(model, x) for x in (clean, corrupted)]
    _check_texts(*pair)
    n_tokens = pair[0].shape[1]
    refinement = Refinement.of(n_tokens, spans, block, starts, split, keep)
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    names = {layer: _hook_name(model, layer, point) for layer in layers}
    check_count("batch_size", batch_size)
    check_count("logits_to_keep", logits_to_keep)
    run = _Run(model, pair[1], metric, as_config(config), logits_to_keep)
    kept: dict[str, Tensor] = {}
    with Uninterrupted(model.hooks(fwd_hooks=[(name, partial(_note, kept, name)) for name in names.values()])):
        (clean_metric,) = run.metrics(pair[0])
    (corrupted_metric,) = run.metrics(pair[1])
    if clean_metric == corrupted_metric:
        raise ValueError(f"metric gave {clean_metric} for both texts; expected texts between which it differs.")
    found: list[Effect] = []
    planned = 2 + len(layers) * refinement.n_patches
    with tqdm(desc="patch_by_block", total=planned, initial=2, unit="forward", disable=not progress) as bar:
        for layer, name in names.items():
            stretches = refinement.first()
            while stretches:
                metrics = run.patched(name, kept[name], [refinement.tokens(x) for x in stretches], batch_size, bar)
                effects = [(value - corrupted_metric) / (clean_metric - corrupted_metric) for value in metrics]
                for stretch, value, effect in zip(stretches, metrics, effects, strict=True):
                    found.append(Effect(layer, *refinement.tokens(stretch), refinement.is_finest(stretch), value, effect))
                stretches = refinement.next(stretches, [abs(effect) for effect in effects])
    exact_for = "the dense model" if run.config.forward == "exact" else "the sparse model"
    return PatchEffects(tuple(found), point, clean_metric, corrupted_metric, n_tokens, planned, exact_for)


class _Run:
    """Runs of the corrupted text."""

    def __init__(self, model: Any, text: Int[Tensor, "1 pos"], metric: Metric, config: StreamConfig, n_logits: int) -> None:
        self.model, self.text, self.metric, self.config, self.n_logits = model, text, metric, config, n_logits

    def metrics(self, texts: Int[Tensor, "batch pos"]) -> list[float]:
        """The metric of each text, under whatever hooks there are."""
        with sparse(self.model, self.config, logits_to_keep=self.n_logits):
            logits = self.model(texts)
        return [_number(self.metric(each[None])) for each in logits]

    def patched(
        self, name: str, clean: Float[Tensor, "1 pos ..."], spans: list[tuple[int, int]], batch_size: int, bar: Any
    ) -> list[float]:
        """The metric with the clean activations in each of some spans."""
        found = []
        for i in range(0, len(spans), batch_size):
            group = spans[i : i + batch_size]

            def patch(x: Tensor, hook: Any, group: Any = group) -> Tensor:
                x = x.clone()
                for text, (start, stop) in enumerate(group):
                    x[text, start:stop] = clean[0, start:stop]
                return x

            with Uninterrupted(self.model.hooks(fwd_hooks=[(name, patch)])):
                found += self.metrics(self.text.expand(len(group), -1))
            bar.update(len(group))
        return found


def _note(kept: dict[str, Tensor], name: str, x: Tensor, hook: Any) -> None:
    kept[name] = x.clone()  # not by hook.name: a bridge's hook points have several names


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise TypeError(f"metric gave {found}; expected one number for the logits of one text.")
    if value != value:
        raise ValueError("metric gave NaN; expected a number. Look for NaN or inf in the logits.")
    return float(value)


def _hook_name(model: Any, layer: int, point: str) -> str:
    name = f"blocks.{layer}.{point}"
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layers had {layer}; expected indices from 0 to {model.cfg.n_layers - 1}.")
    if name not in model.hook_dict or point.endswith(("hook_pattern", "hook_attn_scores")):
        raise ValueError(f"point was {point!r}; expected an activation of a block by position, such as 'hook_resid_pre'.")
    return name


def _check_texts(clean: Tensor, corrupted: Tensor) -> None:
    if clean.shape != corrupted.shape or len(clean) != 1:
        raise ValueError(
            f"clean was of shape {tuple(clean.shape)} and corrupted of {tuple(corrupted.shape)}; expected one text "
            "each, of the same length."
        )

"""Every feature of a run crossed with every analysis: each cell is right by an oracle, or refused by name.

The oracle is the dense model whose scores are masked with `block_layout.to_dense()` (`Reference`); analyses are written out
once more over its dense patterns. Low precision is compared with the run's own `to_dense()`.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_information_flow import expected_graph
from test_routes import all_paths
from torch import Tensor
from zoo import HAS_HOOKED, build, mask_hooks, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig, analysis, viz
from tl_stream.analysis import AnchorSettings
from tl_stream.budget import Linear, PerHead, Sqrt, TopP

LENGTH, PADDING = 29, 6
BASE = StreamConfig(block_q=4, block_k=4, k=2, beam=1, max_dense=0)
Arguments = tuple[Any, dict[str, Any]]
EVERY_RERUN = ("cut_edges", "fidelity", "find_budget", "distribute", "suppression", "patch_by_block", "gradients")


# The features of a run


@dataclass(frozen=True)
class Feature:
    """How a run differs from a plain one.

    Attributes:
        config: Fields of `StreamConfig`.
        variant: The model (`zoo.VARIANTS`).
        dtype: Its dtype.
        given: From the model to what it is given.
        real: Which tokens are real, by text.
        then: What is done with the cache.
        autocast: The dtype of autocast.
        tolerance: Of numbers, relative to their size.
        reruns: Of the analyses that run the model themselves, those to try: not all where the feature bears on the cache alone,
            or only on the choice of blocks.
        refused: By analysis, how it is refused.
    """

    config: dict[str, Any] = field(default_factory=dict)
    variant: str = "gqa"
    dtype: torch.dtype = torch.float64
    given: Callable[[Any], Arguments] = lambda model: (tokens(LENGTH) % 9, {})
    real: Callable[[], Tensor] = lambda: torch.ones(2, LENGTH, dtype=torch.bool)
    then: Callable[[Any, Path], Any] = lambda cache, folder: cache
    autocast: torch.dtype | None = None
    tolerance: float = 1e-6
    reruns: tuple[str, ...] = EVERY_RERUN
    refused: dict[str, str] = field(default_factory=dict)


def padded(side: str) -> Callable[[Any], Arguments]:
    def given(model: Any) -> Arguments:
        return tokens(LENGTH) % 9, {"attention_mask": reality(side).long()}

    return given


def reality(side: str) -> Tensor:
    """The first text is padded."""
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, slice(None, PADDING) if side == "left" else slice(-PADDING, None)] = False
    return real


def continued(n: int) -> Callable[[Any], Arguments]:
    """The last `n` tokens, the others being in a KV cache."""

    def given(model: Any) -> Arguments:
        if not HAS_HOOKED:
            pytest.skip("KV caches of bridges are those of transformers: tests/test_families.py has them")
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        text, past = tokens(LENGTH) % 9, TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(text[:, :-n], past_kv_cache=past, attention_mask=torch.ones_like(text[:, :-n]))
        return text[:, -n:], {"past_kv_cache": past, "attention_mask": torch.ones_like(text[:, -n:])}

    return given


def saved(cache: Any, folder: Path) -> Any:
    cache.save(folder / "cache.safetensors")
    return SparseActivationCache.load(folder / "cache.safetensors", cache.model)


WHOLE = r"expected (that|those) of a whole text|tokens were of shape \(2, \d+\); expected \(2, 29\)"
OF_A_TEXT = ("head_scores", "needle_routes", "information_flow", "over_squashing", "sentence_matrix", "vertical_scores",
             "receiver_heads", "compare_routes", "random_edges", "coarsen", "viz.Bins", "viz.heads_view")  # fmt: skip
FLOWS = ("information_flow", "needle_routes", "compare_routes")
IN_PART = dict.fromkeys(OF_A_TEXT, WHOLE)
NO_MASK = dict.fromkeys(
    ("suppression", "find_budget", "patch_by_block", "find_flips"), "unexpected keyword argument 'attention_mask'"
)
EXACT = dict.fromkeys(("recheck", "find_budget", "suppression", "find_flips"), "forward='exact'")
FROM_A_CACHE: dict[str, Any] = {"reruns": ("gradients",), "refused": {**IN_PART, "recheck": "text was of shape"}}
LOW: dict[str, Any] = {"reruns": ("fidelity", "distribute", "patch_by_block"), "tolerance": 3e-2}


def only(filtered: Any) -> Callable[[Any], Arguments]:
    """A cache of some activations."""
    return lambda model: (tokens(LENGTH) % 9, filtered)


FEATURES: dict[str, Feature] = {
    "plain": Feature(reruns=(*EVERY_RERUN, "find_flips")),
    "everything kept": Feature({"k": 1000}),
    "forward exact": Feature({"forward": "exact"}, refused=EXACT, reruns=(*EVERY_RERUN, "find_flips")),
    "dense queries": Feature({"dense_queries": 3}, reruns=(*EVERY_RERUN, "find_flips")),
    "dense queries, everything kept": Feature({"dense_queries": 3, "k": 1000}),
    "all queries dense": Feature({"dense_queries": LENGTH}, reruns=("cut_edges", "suppression")),
    "dense layers": Feature({"dense_layers": (1,)}),
    "all layers dense": Feature({"dense_layers": 3}, reruns=("distribute",), refused={"distribute": "had dense_layers=3"}),
    "Sqrt": Feature({"k": Sqrt(0.6)}, reruns=()),
    "Linear": Feature({"k": Linear(0.3)}, reruns=()),
    "TopP": Feature({"k": TopP(0.6)}, reruns=(*EVERY_RERUN, "find_flips"), refused={"find_flips": "config.k was TopP"}),
    "PerHead": Feature({"k": PerHead({0: 3, (1, 2): 1}, otherwise=2)}, reruns=()),
    "block_q 1": Feature({"block_q": 1, "block_k": 1, "k": 5}),
    "wide key blocks": Feature({"block_q": 2, "block_k": 8, "k": 1}, reruns=()),
    "wide query blocks": Feature({"block_q": 8, "block_k": 3}, reruns=("gradients",)),
    "dual": Feature({"estimator": "dual", "leaf_queries": 2, "keep_sink": True}, reruns=()),
    "random": Feature(
        {"estimator": "random", "seed": 3},
        reruns=("patch_by_block", "distribute"), refused={"distribute": "estimator='random', which reckons no shares"},
    ),
    "reference backend": Feature({"backend": "reference"}, reruns=("gradients",)),
    "no rotary, no groups": Feature(variant="standard", reruns=("gradients",)),
    "windows": Feature(variant="local"),
    "soft-cap": Feature(variant="soft-capped", reruns=()),
    "ALiBi": Feature(variant="alibi", reruns=("suppression",)),
    "sinks": Feature(variant="sinks", reruns=("suppression",)),
    "left padding": Feature(given=padded("left"), real=lambda: reality("left"), refused=NO_MASK,
                            reruns=(*EVERY_RERUN, "find_flips")),
    "right padding": Feature(given=padded("right"), real=lambda: reality("right"), refused=NO_MASK),
    "padding and dense queries": Feature({"dense_queries": 2}, given=padded("left"), real=lambda: reality("left"),
                                         reruns=("cut_edges", "fidelity", "gradients")),
    "right padding and dense queries": Feature({"dense_queries": 2}, given=padded("right"), real=lambda: reality("right"),
                                               reruns=("cut_edges", "fidelity")),
    "padding, forward exact": Feature({"forward": "exact"}, given=padded("left"), real=lambda: reality("left"), refused=EXACT,
                                      reruns=("cut_edges", "fidelity", "gradients")),
    "steps from a KV cache": Feature(given=continued(12), **FROM_A_CACHE),
    "one step from a KV cache": Feature(given=continued(1), **FROM_A_CACHE),
    "one exact step": Feature({"decode": "exact"}, given=continued(1), **FROM_A_CACHE),
    "bfloat16": Feature(dtype=torch.bfloat16, **LOW),
    "bfloat16 autocast": Feature(dtype=torch.float32, autocast=torch.bfloat16, **LOW),
    "float16 autocast": Feature(dtype=torch.float32, autocast=torch.float16, **LOW),
    "saved and loaded": Feature(then=saved, reruns=()),
    "dense queries, saved and loaded": Feature({"dense_queries": 3}, then=saved, reruns=()),
    "a deep copy": Feature(then=lambda cache, folder: copy.deepcopy(cache), reruns=()),
    "patterns alone": Feature(given=only({"names_filter": tl_stream.cache.is_pattern}), reruns=(),
                              refused=dict.fromkeys(FLOWS, "cache lacks 'v' of layer 2")),
    "one layer": Feature(
        given=only({"names_filter": lambda name: name.startswith("blocks.1.")}), reruns=(),
        refused={**dict.fromkeys(FLOWS, r"no pattern of layers \[0, 2\]"), "stack_activation": "hook_pattern"},
    ),
    "some rows": Feature(given=only({"pos_slice": slice(3, 20)}), reruns=(),
                         refused={**IN_PART, "recheck": "reread was of the last 1 positions.* without pos_slice"}),
    "no batch": Feature(given=lambda model: (tokens(LENGTH, 1) % 9, {"remove_batch_dim": True}), reruns=(),
                        real=lambda: torch.ones(1, LENGTH, dtype=torch.bool), refused={"apply_slice_to_batch_dim": "batch"}),
    "logits of the end": Feature(given=only({"logits_to_keep": 1}), reruns=()),
}  # fmt: skip


# A run and its oracle


@dataclass(frozen=True, eq=False)
class Reference:
    """What a run is compared with, under the names of a cache; all of it dense.

    Attributes:
        activations: By (name, layer).
        full: The softmax over all keys of the same queries and keys, by layer.
        keep: The layouts, by layer.
        logits: Of all positions.
    """

    activations: Any
    full: dict[int, Tensor]
    keep: dict[int, Tensor]
    logits: Tensor

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        return self.activations[key]

    def block_layout(self, layer: int) -> Tensor:
        return self.keep[layer]


@dataclass(frozen=True, eq=False)
class Traced:
    """A run with a feature; `cells` look at its first text where they look at one."""

    feature: Feature
    model: Any
    tokens: Any
    kwargs: dict[str, Any]
    config: StreamConfig
    cache: Any
    logits: Tensor

    @functools.cached_property
    def real(self) -> Tensor:
        return self.feature.real()

    @property
    def first(self) -> int:
        """The first real token of the first text."""
        return int(self.real[0].int().argmax())

    @property
    def last(self) -> int:
        """Its last real token."""
        return int(self.real[0].nonzero().max())

    def of_text(self, logits: Tensor) -> Tensor:
        """Without those of padding, for which Hugging Face reads everything where TransformerLens reads nothing."""
        return logits[self.real[:, -logits.shape[1] :]]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(self.first + a, self.first + b) for a, b in ((1, 5), (5, 6), (7, 11), (11, 15), (16, 20))]

    @property
    def layers(self) -> list[int]:
        return sorted(self.cache.patterns)

    def pattern(self, layer: int) -> Any:
        """The cached one, with a batch dimension."""
        found = self.cache["pattern", layer]
        return found if found.ndim == 4 else found[None]

    @functools.cached_property
    def reference(self) -> Reference:
        return own_reference(self) if self.low else masked_reference(self)

    @property
    def low(self) -> bool:
        """Whether rounding would swamp what the dense model's own run tells: then the oracle goes by the run's activations."""
        return self.feature.tolerance > 1e-3

    @functools.cached_property
    def wide_model(self) -> Any:
        """The model, whose weights the oracle multiplies with what is wide."""
        return copy.deepcopy(self.model).double() if self.low else self.model

    @property
    def options(self) -> dict[str, Any]:
        """What every run of the text takes: of the keywords, those that aren't about the cache."""
        return {name: x for name, x in self.kwargs.items() if name == "attention_mask"}

    def run(self, config: StreamConfig, text: Any = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Another run of the model, under the same autocast."""
        with autocast(self.feature):
            return self.model.run_with_sparse_cache(self.tokens if text is None else text, config=config, **kwargs)

    def dense(self, hooks: Any = (), text: Any = None, **kwargs: Any) -> Tensor:
        """The dense model's logits."""
        with autocast(self.feature), self.model.hooks(fwd_hooks=list(hooks)):
            return self.model(self.tokens if text is None else text, **(self.options | kwargs))


def autocast(feature: Feature) -> Any:
    return torch.autocast("cpu", feature.autocast or torch.bfloat16, enabled=feature.autocast is not None)


def given(feature: Feature, model: Any) -> Arguments:
    with autocast(feature):
        return feature.given(model)


@functools.cache
def built(variant: str, dtype: torch.dtype) -> Any:
    model = build(variant, torch.float32 if dtype == torch.bfloat16 else dtype)
    return model.to(dtype)


@functools.cache
def traced(name: str, folder: Path) -> Traced:
    feature = FEATURES[name]
    model = built(feature.variant, feature.dtype)
    config = replace(BASE, **feature.config)
    text, kwargs = given(feature, model)
    with torch.no_grad(), autocast(feature):
        logits, cache = model.run_with_sparse_cache(text, config=config, **kwargs)
    (folder / name).mkdir()
    return Traced(feature, model, text, kwargs, config, feature.then(cache, folder / name), logits)


ABOUT_THE_CACHE = ("names_filter", "pos_slice", "remove_batch_dim", "logits_to_keep")


def masked_reference(t: Traced) -> Reference:
    """The dense model under the layouts; of a `forward="exact"` run the dense model, cut to what was recorded."""

    def arguments() -> Arguments:
        text, kwargs = t.feature.given(t.model)
        return text, {name: x for name, x in kwargs.items() if name not in ABOUT_THE_CACHE}

    text, kwargs = arguments()
    _, cache = t.model.run_with_sparse_cache(text, config=t.config, **kwargs)  # all layers and rows
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    full: dict[int, Tensor] = {}

    def note(scores: Tensor, hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        sinks = getattr(t.model.blocks[layer].attn, "sinks", None)
        column = [] if sinks is None else [sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)]
        scores = scores.masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)  # as Hugging Face hides
        full[layer] = torch.cat([scores, *column], -1).softmax(-1)[..., : scores.shape[-1]].nan_to_num(0.0)

    exact = t.config.forward == "exact"
    notes = [(f"blocks.{layer}.attn.hook_attn_scores", note) for layer in keep]
    text, kwargs = arguments()  # an empty KV cache again
    with torch.no_grad(), t.model.hooks(fwd_hooks=[*notes, *([] if exact else [*mask_hooks(cache), NOTHING_READ])]):
        logits, activations = t.model.run_with_cache(text, **kwargs)
    if exact:
        for layer in keep:
            activations.cache_dict[f"blocks.{layer}.attn.hook_pattern"] = activations["pattern", layer] * keep[layer]
            scores = activations["attn_scores", layer].masked_fill(~keep[layer], -torch.inf)
            activations.cache_dict[f"blocks.{layer}.attn.hook_attn_scores"] = scores
    return Reference(activations, full, keep, logits)


def own_reference(t: Traced) -> Reference:
    """The run's own numbers made dense: rounding makes those of another run others."""
    activations = {name: x.double() for name, x in t.cache.items()}
    for layer in t.layers:
        activations[f"blocks.{layer}.attn.hook_pattern"] = t.pattern(layer).to_dense().double()
    full = {layer: t.cache.exact_rows(layer, range(LENGTH)) for layer in t.layers}
    keep = {layer: t.cache.block_layout(layer).to_dense() for layer in t.layers}
    return Reference(tl_stream.cache.ActivationCache(activations, t.model), full, keep, t.logits)


# The analyses: each gives what it found, and what was expected.

Found = list[tuple[Any, Any]]


def shown_pattern(t: Traced) -> Found:
    rows = slice(3, 20) if "pos_slice" in t.kwargs else slice(None)
    pairs = [(t.pattern(layer).to_dense(), t.reference["pattern", layer][..., rows, :]) for layer in t.layers]
    scores = [layer for layer in t.layers if f"blocks.{layer}.attn.hook_attn_scores" in t.cache and t.feature.tolerance < 1e-3]
    for layer in scores:
        found = t.cache["attn_scores", layer].to_dense()
        expected = t.reference["attn_scores", layer].masked_fill(~t.reference.keep[layer], -torch.inf)[..., rows, :]
        pairs.append((found.exp().view(expected.shape), expected.exp()))
    return pairs


def shown_logits(t: Traced) -> Found:
    return [(t.of_text(t.logits), t.of_text(t.reference.logits[:, -t.logits.shape[1] :]))]


def allowed(t: Traced, layer: int) -> Tensor:
    """What may be read at all, by text: written out, not taken from the layouts."""
    n_keys, n_rows = t.reference.keep[layer].shape[-1], t.reference.keep[layer].shape[-2]
    query, key = torch.arange(n_keys)[n_keys - n_rows :, None], torch.arange(n_keys)
    pairs = (key <= query) & ((query - key < 9) | (t.feature.variant != "local") | (layer == 1))
    valid = torch.ones(len(t.reference.keep[layer]), n_keys, dtype=torch.bool)
    return pairs & (t.real if "attention_mask" in t.kwargs else valid)[:, None]


def pruned(t: Traced) -> Found:
    kept = sum(int(t.reference.keep[layer].sum()) for layer in t.layers)
    pairs = sum(int(allowed(t, layer).sum()) for layer in t.layers) * 4
    return [(t.cache.pruned, 1 - kept / pairs)]


def retained(t: Traced, layer: int) -> Tensor:
    """`[batch, head_index, query_pos]`, 1 for rows that may read nothing."""
    return 1 - (t.reference.full[layer] * ~t.reference.keep[layer]).sum(-1)


def retained_mass(t: Traced) -> Found:
    rows = slice(3, 20) if "pos_slice" in t.kwargs else slice(None)
    expected = {layer: retained(t, layer)[..., rows] for layer in t.layers}
    return [(t.cache.patterns[layer].retained_mass().view(expected[layer].shape), expected[layer]) for layer in t.layers]


def exact_rows(t: Traced) -> Found:
    first = 3 if "pos_slice" in t.kwargs else 0
    rows = [0] if t.pattern(t.layers[0]).shape[-2] == 1 else [0, 7, 11]
    expected = {layer: t.reference.full[layer][:, :, [row + first for row in rows]] for layer in t.layers}
    return [(t.cache.exact_rows(layer, rows).view(expected[layer].shape), expected[layer]) for layer in t.layers]


def audited(t: Traced) -> Found:
    audit, shift = t.cache.audit(sample=10**6), 3 if "pos_slice" in t.kwargs else 0
    pairs: Found = []
    for answer in audit.answers:
        n_rows = t.reference.keep[t.layers[0]].shape[-2]
        row = int(t.real[answer.text, -n_rows:].nonzero().max()) if not shift else 19
        mass = torch.stack([retained(t, layer)[answer.text, :, row] for layer in t.layers]).mean()
        pairs += [(answer.rows, (row - shift,)), (answer.retained[0], mass)]
    for head in audit.heads:
        mass = retained(t, head.layer)[head.text, head.head]
        reads = allowed(t, head.layer)[head.text].any(-1)
        n_rows = len(reads)
        counted = reads & t.real[head.text, -n_rows:]
        counted = counted[3:20] if shift else counted
        mass = mass[3:20] if shift else mass
        pairs += [((head.mean_low, head.mean_high), (mass[counted].mean(),) * 2)]
    return pairs


def lead(logits: Tensor, token: Tensor) -> Tensor:
    others = torch.cat([logits[:token], logits[token + 1 :]])
    return (logits[token] - others.max()).float()


def rechecked(t: Traced) -> Found:
    """The dense model under the blocks of twice the budget, the answer's row reading everything."""
    with autocast(t.feature):
        audit = tl_stream.recheck(t.model, t.tokens, t.cache, sample=0, dense_queries=0, **t.options)
    rows = max(t.config.dense_queries, 1)
    logits, more = t.run(replace(t.config, k=t.config.budget.doubled(), dense_queries=rows), **t.options)
    if not t.low:
        logits = t.dense(masks({layer: more.block_layout(layer).to_dense() for layer in more.patterns}))
    pairs: Found = []
    for answer in audit.answers:
        row = int(t.real[answer.text].nonzero().max())
        token = t.reference.logits[answer.text, row].argmax()
        pairs.append((answer.reread, (lead(logits[answer.text, row], token),)))
        pairs.append((answer.lead, (lead(t.reference.logits[answer.text, row], token),)))
    return pairs


def masks(keep: dict[int, Tensor]) -> list[Any]:
    """Hooks for the dense model, as `zoo.mask_hooks`, of any layouts."""

    def mask(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(~keep[int(hook.name.split(".")[1])], -torch.inf)

    return [*[(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in keep], NOTHING_READ]


def nothing_read(pattern: Tensor, hook: Any) -> Tensor:
    return pattern.nan_to_num(0.0)


NOTHING_READ = (tl_stream.cache.is_pattern, nothing_read)  # in rows that keep nothing; HookedTransformer does so itself


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compared(t: Traced) -> Found:
    found = tl_stream.fidelity(t.model, t.tokens, t.config, new_tokens=0, **t.options)
    notes: dict[int, Tensor] = {}
    hooks = [(tl_stream.cache.is_pattern, lambda x, hook: notes.__setitem__(int(hook.name.split(".")[1]), x))]
    dense = t.dense(hooks)
    divergence = kl(dense, t.reference.logits)[t.real]
    pairs: Found = [(found.output.kl_mean, divergence.mean()), (found.pruned, t.cache.pruned)]
    for head in found.heads:
        mass = 1 - (notes[head.layer][:, head.head] * ~t.reference.keep[head.layer][:, head.head]).sum(-1)
        pairs.append((head.retained_mean, mass[t.real].mean()))
    return pairs


def searched(t: Traced) -> Found:
    config = replace(t.config, k=1)
    found = tl_stream.find_budget(
        t.model, t.tokens, metric="kl", threshold=0.0, config=config, high=2, progress=False, **t.options
    )
    dense, pairs = t.dense()[:, -1], []
    for tried in found.evaluations:
        logits, cache = t.run(replace(config, k=tried.budget))
        pairs += [(tried.value, kl(dense, logits[:, -1]).max()), (tried.pruned, cache.pruned)]
    return pairs


def distributed(t: Traced) -> Found:
    budget = tl_stream.distribute(t.model, t.tokens, 2, config=t.config, at_most=4, **t.options)
    names = [(layer, head) for layer in range(3) if layer not in t.config.dense_layer_indices(3) for head in range(4)]
    return [(sum(budget.of_head(*name).blocks(100) for name in names), 2 * len(names))]


def by_head(scores: Any, name: str) -> Tensor:
    return torch.tensor([getattr(head, name) for head in scores.heads], dtype=torch.float64)


def head_scored(t: Traced) -> Found:
    needle, answer = slice(t.first + 1, t.first + 9), slice(t.first + 12, t.last + 1)
    found = analysis.head_scores(t.cache, t.tokens, needle=needle, answer=answer)
    rows: list[list[Any]] = []
    for text in range(len(t.tokens)):
        token, real = t.tokens[text], t.real[text]
        first = int(real.int().argmax())
        key, query = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
        before = torch.cat([token[:1], token[:-1]])
        for layer in t.layers:
            counted = real & t.reference.keep[layer][text].any(-1).any(0)
            for p in t.reference["pattern", layer][text].double():
                p = p[counted]
                at = {
                    "previous_token": key == query - 1,
                    "duplicate_token": (token == token[:, None]) & (key < query),
                    "induction": (before == token[:, None]) & (key > first) & (key <= query),
                }
                scores = {name: float((p * where[counted]).sum() / p.sum()) for name, where in at.items()}
                scores["sink"] = float(p[:, first].mean())
                scores["entropy"] = float(-torch.special.xlogy(p, p).sum(-1).mean())
                whole = t.reference["pattern", layer][text, len(rows) % 4]
                best = [(i, int(whole[i - 1].argmax())) for i in range(answer.start, answer.stop)]
                copied = [needle.start <= k < needle.stop and token[k] == token[i] and whole[i - 1, k] > 0 for i, k in best]
                rows.append([*scores.values(), sum(copied) / 8])
    names = ("previous_token", "duplicate_token", "induction", "sink", "entropy", "retrieval")
    return [(torch.stack([by_head(found, name) for name in names], -1), torch.tensor(rows, dtype=torch.float64))]


def flowed(t: Traced) -> Found:
    found = analysis.information_flow(t.cache, t.model, t.last, threshold=0.02)
    expected = expected_graph(t.reference, t.wide_model, t.last, 0.02, 0)
    return edges_of({edge[:5]: edge.weight for edge in found.edges}, expected, 0.02)


def edges_of(found: dict[Any, float], expected: dict[Any, float], least: float) -> Found:
    """Of both; what is just below the threshold in one of them is in neither."""
    names = sorted(found.keys() | expected.keys(), key=str)
    return [(found.get(name, least), expected.get(name, least)) for name in names]


def routed(t: Traced) -> Found:
    source = range(t.first + 2, t.first + 6)
    found = analysis.needle_routes(t.cache, source, t.last, model=t.model, top=20, follow=1.0)
    mine = {(route.source_pos, *(edge.entry for edge in route.edges)): route.score for route in found.routes}
    expected = {path: x for path, x in all_paths(t.reference, t.wide_model, t.last).items() if path[0] in source}
    best = sorted(expected.values(), reverse=True)[:20]
    return [
        (found.found, sum(expected.values())),
        *((score, expected.get(path, 0.0)) for path, score in mine.items()),
        *zip(sorted(mine.values(), reverse=True), best, strict=True),
    ]


def routes_compared(t: Traced) -> Found:
    a, b = (analysis.needle_routes(t.cache, range(t.first + i, t.first + 6), t.last, model=t.model) for i in (1, 3))
    found = analysis.compare_routes([a, b], [b])
    pairs: Found = [(found.found_successful, (a.found + b.found) / 2), (found.found_failed, b.found)]
    for head in found.heads:
        of = [routes.flow_by_head.get((head.layer, head.head), 0.0) for routes in (a, b)]
        pairs.append((head.difference, (of[0] + of[1]) / 2 - of[1]))
    return pairs


def drawn(t: Traced) -> Found:
    n = sum(int(t.reference.keep[layer][0].sum()) for layer in t.layers)
    found = analysis.random_edges(t.cache, n)
    with pytest.raises(ValueError, match=f"expected 0 to {n}"):
        analysis.random_edges(t.cache, n + 1)
    expected = {(layer, *entry) for layer in t.layers for entry in t.reference.keep[layer][0].nonzero().tolist()}
    return [(len(expected ^ set(found)), 0)]


def cut(t: Traced) -> Found:
    edges = analysis.random_edges(t.cache, 30, seed=1)
    same = t.config if t.config.forward == "exact" else replace(t.config, layout_from=t.cache)
    with autocast(t.feature), tl_stream.sparse(t.model, same), t.model.hooks(fwd_hooks=analysis.cut_edges(edges)):
        found = t.model(t.tokens, **t.options)
    keep = {layer: x.clone() for layer, x in t.reference.keep.items()}
    if t.config.forward == "exact":
        keep = {layer: allowed(t, layer)[:, None].expand(x.shape).clone() for layer, x in keep.items()}
    for layer, head, query, key in edges:
        keep[layer][:, head, query, key] = False
    return [(t.of_text(found), t.of_text(t.dense(masks(keep))))]


def path_sums(t: Traced) -> Found:
    found = analysis.over_squashing(t.cache, [t.last, 12])
    product = torch.eye(LENGTH, dtype=torch.float64)
    for layer in t.layers:
        product = (t.reference["pattern", layer][0].double().mean(0) + torch.eye(LENGTH)) @ product
    return [(found.bounds, product[[t.last, 12]])]


def sentence_means(t: Traced, layer: int) -> Tensor:
    pattern = t.reference["pattern", layer][0].double()
    return torch.stack([torch.stack([pattern[:, a:b, c:d].mean((1, 2)) for c, d in t.spans], -1) for a, b in t.spans], 1)


def matrices(t: Traced) -> Found:
    return [(analysis.sentence_matrix(t.cache, layer, t.spans), sentence_means(t, layer)) for layer in t.layers]


def coarsened(t: Traced) -> Found:
    found = {layer: t.cache.patterns[layer].coarsen(t.spans) for layer in t.layers}
    return [(x.view(-1, 4, 5, 5)[0], sentence_means(t, layer)) for layer, x in found.items()]


def vertical(t: Traced, settings: AnchorSettings) -> Tensor:
    means = [sentence_means(t, layer) for layer in t.layers]
    scored = range(5 - settings.proximity)
    return torch.stack([torch.stack([x[:, j + settings.proximity :, j].mean(-1) for j in scored], -1) for x in means])


def verticals(t: Traced) -> Found:
    settings = AnchorSettings(proximity=2)
    found = analysis.vertical_scores(t.cache, t.spans, settings=settings)
    return [(found.values[..., :3], vertical(t, settings)), (found.values[..., 3:].isnan().all(), True)]


def receivers(t: Traced) -> Found:
    settings = AnchorSettings(proximity=1, n_heads=2)
    found = analysis.receiver_heads(analysis.vertical_scores(t.cache, t.spans, settings=settings), settings=settings)
    x = vertical(t, settings)
    x = x - x.mean(-1, keepdim=True)
    kurtosis = (x**4).mean(-1) / (x**2).mean(-1) ** 2 - 3
    return [(found.kurtosis, kurtosis)]


def suppressed(t: Traced) -> Found:
    text, settings = t.tokens[:1], AnchorSettings(temperature=1.0, log=False)
    found = analysis.suppression(t.model, text, t.spans, config=t.config, settings=settings, progress=False, **t.options)
    _, cache = t.run(t.config, text)
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    base, rows = t.dense(masks(keep), text)[0], []
    for start, stop in t.spans[:-1]:
        without = {layer: x.clone() for layer, x in keep.items()}
        for x in without.values():
            x[..., start:stop] = False
        divergence = kl(base, t.dense(masks(without), text)[0])
        rows.append([float(divergence[a:b].mean()) if a >= stop else math.nan for a, b in t.spans])
    return [(found.effects[:, :-1].nan_to_num(-1.0), torch.tensor(rows).T.nan_to_num(-1.0))]


def last_logit(logits: Tensor) -> Tensor:
    return logits[0, -1, 3]


def patched(t: Traced) -> Found:
    clean, corrupted = t.tokens[:1], (t.tokens[:1] + 1) % 9
    with autocast(t.feature):
        found = analysis.patch_by_block(
            t.model, clean, corrupted, last_logit, config=t.config, block=15, starts=2, progress=False, **t.options
        )  # fmt: skip
    pairs: Found = []
    for effect in found.effects:
        mixed = corrupted.clone()
        mixed[:, effect.start : effect.stop] = clean[:, effect.start : effect.stop]
        pairs.append((effect.metric, last_logit(t.run(t.config, mixed)[0])))
    return pairs


def flipped(t: Traced) -> Found:
    with autocast(t.feature):
        found = analysis.find_flips(
            t.model, list(t.tokens[:1]), t.config, trials=2, n_tokens=1, vocabulary=[1, 2], progress=False, **t.options
        ).prompts[0]  # fmt: skip
    logits, cache = t.run(t.config, t.tokens[:1])
    answer = int(t.dense(text=t.tokens[:1])[0, -1].argmax())
    same = int(logits[0, -1].argmax()) == answer
    return [(found.answer[0], answer), (found.sparse.same, same), (found.sparse.pruned, cache.pruned)]


def stacked(t: Traced) -> Found:
    expected = torch.stack([t.reference["pattern", layer] for layer in t.layers])
    found = t.cache.stack_activation("pattern").to_dense()
    rows = slice(3, 20) if "pos_slice" in t.kwargs else slice(None)
    expected = expected[..., rows, :]
    return [(found.view(expected.shape), expected)]


def sliced(t: Traced) -> Found:
    part = t.cache.apply_slice_to_batch_dim(0)
    rows = slice(3, 20) if "pos_slice" in t.kwargs else slice(None)
    return [(part["pattern", layer].to_dense(), t.reference["pattern", layer][0][..., rows, :]) for layer in t.layers]


def remembered(t: Traced) -> Found:
    return [(sum(t.cache.memory().values()), t.cache.nbytes), (t.cache.nbytes > 0, True)]


def binned(t: Traced) -> Found:
    bins = viz.Bins.of(t.cache.block_layout(t.layers[0]), 5)
    pairs: Found = []
    for layer in t.layers:
        dense = t.reference["pattern", layer][0].double()
        parts = [list(bins.tokens(i)) for i in range(len(bins))]
        mass = torch.stack([dense[..., part].sum(-1) for part in parts], -1)
        for how in ("mean", "max"):
            expected = torch.stack([getattr(mass[:, part], {"mean": "mean", "max": "amax"}[how])(1) for part in parts], 1)
            pairs.append((bins.square(t.pattern(layer)[0], how), expected))
    return pairs


def viewed(t: Traced) -> Found:
    layer = t.layers[-1]
    page = viz.heads_view(t.cache, [(layer, 1)], ["w"] * LENGTH, max_bins=5).local_src
    (shown,) = re.findall(r'"attention": (\[\[\[.*?\]\]\])', page)
    bins = viz.Bins.of(t.cache.block_layout(layer), 5)
    return [(torch.tensor(eval(shown)[0]), bins.square(t.reference["pattern", layer][0, 1].double(), "mean").round(decimals=4))]


def differentiated(t: Traced) -> Found:
    """The gradient of a loss by each pattern."""
    text, kwargs = given(t.feature, t.model)
    logits, cache = t.run(t.config, text, **kwargs)
    loss = t.of_text(logits).double().square().sum()
    found = torch.autograd.grad(loss, [cache.patterns[layer] for layer in t.layers])
    notes: dict[int, Tensor] = {}

    def note(pattern: Tensor, hook: Any) -> None:
        notes[int(hook.name.split(".")[1])] = pattern

    keep = t.reference.keep if t.config.forward == "sparse" else {}
    text, kwargs = given(t.feature, t.model)
    kwargs = {name: x for name, x in kwargs.items() if name not in ABOUT_THE_CACHE}
    logits = t.dense([*masks(keep), (tl_stream.cache.is_pattern, note)], text, **kwargs)[:, -logits.shape[1] :]
    expected = torch.autograd.grad(t.of_text(logits).double().square().sum(), [notes[layer] for layer in t.layers])
    rows = slice(3, 20) if "pos_slice" in t.kwargs else slice(None)
    return [
        (x.to_dense().view(y[..., rows, :].shape), (y * t.reference.keep[layer])[..., rows, :])
        for x, y, layer in zip(found, expected, t.layers, strict=True)
    ]


OF_THE_CACHE: dict[str, Callable[[Traced], Found]] = {
    "pattern and scores": shown_pattern, "logits": shown_logits, "pruned": pruned, "retained_mass": retained_mass,
    "exact_rows": exact_rows, "audit": audited, "stack_activation": stacked, "apply_slice_to_batch_dim": sliced,
    "memory": remembered, "coarsen": coarsened, "head_scores": head_scored, "information_flow": flowed, "needle_routes": routed,
    "compare_routes": routes_compared, "random_edges": drawn, "over_squashing": path_sums, "sentence_matrix": matrices,
    "vertical_scores": verticals, "receiver_heads": receivers, "viz.Bins": binned, "viz.heads_view": viewed,
    "recheck": rechecked,
}  # fmt: skip
OF_THE_MODEL: dict[str, Callable[[Traced], Found]] = {
    "cut_edges": cut, "fidelity": compared, "find_budget": searched, "distribute": distributed, "suppression": suppressed,
    "patch_by_block": patched, "find_flips": flipped, "gradients": differentiated,
}  # fmt: skip
ANALYSES = OF_THE_CACHE | OF_THE_MODEL
CELLS = [(f, a) for f, feature in FEATURES.items() for a in (*OF_THE_CACHE, *feature.reruns)]


REFUSALS = (ValueError, TypeError, NotImplementedError, KeyError, AssertionError)  # the last one is TransformerLens's


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(("feature", "name"), CELLS, ids=[f"{f}-{a}" for f, a in CELLS])
def test_cell(feature: str, name: str, folder: Path) -> None:
    t = traced(feature, folder)
    message = t.feature.refused.get(name)
    with torch.set_grad_enabled(name == "gradients"), warnings.catch_warnings():
        if message is not None:
            with pytest.raises(REFUSALS, match=message):
                ANALYSES[name](t)
            return
        pairs = ANALYSES[name](t)
    assert pairs
    for found, expected in pairs:
        a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= t.feature.tolerance * max(1.0, float(b.abs().max()))


NOT_OF_A_RUN = {"sentences", "line_split", "paper_split", "rule_tag", "resampling_importance", "flow_names"}
ELSEWHERE = {"needle_grid"}  # makes its own texts, and takes a tokenizer: tests/test_needle_grid.py crosses it with configs


def test_the_matrix_has_every_analysis_and_every_setting() -> None:
    functions = {name for name in analysis.__all__ if name[0].islower()}
    assert functions <= ANALYSES.keys() | NOT_OF_A_RUN | ELSEWHERE
    assert {"fidelity", "find_budget", "distribute", "recheck"} <= ANALYSES.keys()
    settings = {name for feature in FEATURES.values() for name in feature.config}
    assert settings | {"beam", "exact_below", "compile", "max_dense", "layout_from"} >= StreamConfig.__dataclass_fields__.keys()

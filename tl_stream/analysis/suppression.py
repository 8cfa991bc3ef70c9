"""Attention suppression: what the model's predictions lose when nothing can read a sentence any more.

1. The model reads the text once: its next-token distributions p, and with a config the key blocks that it keeps.
2. For each sentence j it reads the text again, in the same blocks, with the columns of j at -inf before the softmax, in all
   layers and heads: distributions q_j. Several sentences are elements of one batch, each with its own columns.
3. M[i, j] is the mean, over the rows of sentence i, of KL(p || q_j) over the whole vocabulary, or of log(KL + 1e-9).

(Bogdan et al. 2025, arXiv:2506.19143, section 5.) One forward pass a sentence; O(T) memory for each element of a batch,
whatever the vocabulary: logits are made, and compared, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_stream.analysis.checks import check_count, check_one_text
from tl_stream.analysis.figures import sentence_heatmap
from tl_stream.analysis.segments import Segments
from tl_stream.analysis.settings import PAPER, AnchorSettings
from tl_stream.cache import SparseActivationCache, is_pattern
from tl_stream.config import StreamConfig
from tl_stream.fidelity.runs import dense_config, wide
from tl_stream.hosts.hooks import to_all_tokens
from tl_stream.hosts.unembedding import logits_of, runs, without_logits
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.tensors.hidden_keys import hide_keys
from tl_stream.tracing import run_with_sparse_cache, sparse

_FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class Suppression:
    """The effect of every suppressed sentence on every later one.

    Attributes:
        effects: `effects[i, j]`, of suppressing sentence j on target i; NaN where i doesn't come after j, or j was not
            suppressed.
        sentences: The sentences.
        targets: Where effects were measured: the sentences too, unless others were asked for.
        settings: What the numbers are: KL in nats or log(KL + 1e-9), at which temperature.
        pruned: Share of the token pairs that the model dropped.
        exact_for: The model that the numbers are exact for.
    """

    effects: Float[Tensor, "target sentence"]
    sentences: Segments
    targets: Segments
    settings: AnchorSettings
    pruned: float
    exact_for: str

    @property
    def scores(self) -> Float[Tensor, " sentence"]:
        """Mean effect of each sentence on all later targets; NaN where there is none."""
        return self.effects.nanmean(0)

    def top_sources(self, target: int, n: int) -> list[int]:
        """The `n` sentences whose suppression affects a target most, the strongest first."""
        row = self.effects[target].nan_to_num(-torch.inf)
        number = min(n, int(self.effects[target].isfinite().sum()))
        return row.topk(number).indices.tolist()

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a pair: target, source, effect."""
        target, source = self.effects.isfinite().nonzero().T
        effect = self.effects[target, source]
        return pandas.DataFrame({"target": target.tolist(), "source": source.tolist(), "effect": effect.tolist()})

    def plot(self) -> go.Figure:
        """A heatmap: suppressed sentences across, affected ones down."""
        what = "log(KL + 1e-9)" if self.settings.log else "KL in nats"
        title = f"Effect of suppressing a sentence on later ones ({what}),<br>exact for {self.exact_for}"
        return sentence_heatmap(self.effects, (self.targets.labels, self.sentences.labels), title, ("affected", "suppressed"))

    def __repr__(self) -> str:
        number = int(self.scores.isfinite().sum())
        return f"Suppression({number} of {len(self.sentences)} sentences, pruned={self.pruned:.4f}, for {self.exact_for})"


@torch.no_grad()
def suppression(
    model: Any,
    text: str | Int[Tensor, "1 pos"],
    sentences: Sequence[Any],
    *,
    config: StreamConfig | None = None,
    sources: Iterable[int] | None = None,
    targets: Sequence[Any] | None = None,
    batch_size: int = 8,
    settings: AnchorSettings = PAPER,
    progress: bool = True,
) -> Suppression:
    """Suppress sentences one by one and measure the effect on the sentences after each.

    The sparse model keeps, for all suppressed sentences, the blocks that it kept on the whole text: it is one fixed model.
    A row left without any key (its blocks held nothing but the sentence) attends to nothing: its head output is 0, where
    torch's softmax would give NaN. The rows of a suppressed sentence can't read it either; later rows don't see the difference.

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        text: One text, or its tokens.
        sentences: With their token spans, ascending: `sentences(text, model)`, a task's, or spans (see `Segments.of`).
        config: The sparse model; None: the dense one, streamed, in O(T) memory and O(T^2) time a sentence.
        sources: Suppress these sentences only (indices); None: all but the last, which nothing follows.
        targets: Measure the effect on these rows instead of on each sentence: spans, as `sentences`. The row that predicts a
            token is the one before it.
        batch_size: Sentences suppressed in one forward pass.
        settings: Temperature and log.
        progress: Show a progress bar.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A single sentence; sentences that are empty, overlap or lie outside the text; a source that doesn't exist; a
            batch_size below 1; `forward="exact"`; NaN in the logits; or as `tl_stream.sparse`.
    """
    tokens = to_all_tokens(model, text) if isinstance(text, str) else text
    segments, chosen = _check(model, tokens, sentences, config, sources, batch_size)
    measured = segments if targets is None else Segments.of(targets, tokens.shape[1])
    tokens = tokens.to(model.cfg.device)
    base, cache = _read(model, tokens, config)
    same = replace(config, layout_from=cache) if config is not None else dense_config(StreamConfig())
    effects = torch.full((len(measured), len(segments)), torch.nan, dtype=torch.float64)
    with tqdm(total=len(chosen), desc="suppression", unit="sentence", disable=not progress) as bar:
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            without = _read_without(model, tokens, same, segments, batch)
            effects[:, batch] = measured.means(_divergence(model, tokens, base, without, settings)).T.cpu()
            bar.update(len(batch))
    later = measured.starts()[:, None] >= segments.starts() + segments.lengths()
    what = "the dense model" if config is None else "the sparse model of these kept blocks"
    return Suppression(effects.masked_fill(~later, torch.nan), segments, measured, settings, cache.pruned, what)


def _read(
    model: Any, tokens: Int[Tensor, "1 pos"], config: StreamConfig | None
) -> tuple[Float[Tensor, "1 pos d_model"], SparseActivationCache]:
    """What the unembedding is given on the whole text, and what was kept."""
    with without_logits(model) as given:
        _, cache = run_with_sparse_cache(
            model,
            tokens,
            config=dense_config(StreamConfig()) if config is None else config,
            names_filter=is_pattern,
        )
    assert isinstance(cache, SparseActivationCache)
    return given[0], cache


def _read_without(
    model: Any, tokens: Int[Tensor, "1 pos"], config: StreamConfig, segments: Segments, batch: list[int]
) -> Float[Tensor, "batch pos d_model"]:
    """What the unembedding is given with each sentence of a batch suppressed."""
    hidden = torch.zeros(len(batch), tokens.shape[1], dtype=torch.bool, device=tokens.device)
    for i, source in enumerate(batch):
        hidden[i, segments.spans[source].slice] = True
    hide = [(_is_scores, lambda scores, hook: hide_keys(scores, hidden.to(scores.device)))]
    with sparse(model, config), without_logits(model) as given, Uninterrupted(model.hooks(fwd_hooks=hide)):
        model(tokens.expand(len(batch), -1))
    return given[0]


def _divergence(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    base: Float[Tensor, "1 pos d_model"],
    without: Float[Tensor, "batch pos d_model"],
    settings: AnchorSettings,
) -> Float[Tensor, "batch pos"]:
    """KL(p || q_j) of every row, or its log, for each suppressed sentence of a batch."""
    parts = []
    for run in runs(model, *without.shape[:2]):
        logits = (logits_of(model, resid[:, run], tokens.expand(len(resid), -1)) for resid in (base, without))
        parts.append(_kl(*((wide(x) / settings.temperature).log_softmax(-1) for x in logits)))
    kl = torch.cat(parts, -1)
    if bool(kl.isnan().any()):
        raise ValueError("The logits hold NaN; expected numbers. Look for NaN in the weights, or in what a hook returns.")
    return (kl + _FLOOR).log() if settings.log else kl


def _kl(p: Float[Tensor, "1 pos d_vocab"], q: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch pos"]:
    """KL of log-probabilities, in float64: where p is 0 nothing is added."""
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1, dtype=torch.float64).clamp(min=0.0)


def _is_scores(name: str) -> bool:
    return name.endswith("attn.hook_attn_scores")


def _check(
    model: Any, tokens: Any, sentences: Sequence[Any], config: Any, sources: Iterable[int] | None, batch_size: Any
) -> tuple[Segments, list[int]]:
    check_one_text(tokens)
    if config is not None and not isinstance(config, StreamConfig):
        raise TypeError(f"config was a {type(config).__name__}; expected a tl_stream.StreamConfig, or None: the dense model.")
    if config is not None and config.forward == "exact":
        raise ValueError("config had forward='exact', which leaves the model dense; for the dense model pass config=None.")
    check_count("batch_size", batch_size)
    segments = Segments.of(sentences, tokens.shape[1])
    if len(segments) < 2:
        raise ValueError("sentences were 1; expected at least 2: the effect is that of a sentence on later ones.")
    return segments, segments.chosen("sources", range(len(segments) - 1) if sources is None else sources)

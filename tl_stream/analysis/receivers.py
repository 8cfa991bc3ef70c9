"""Vertical scores and receiver heads: which earlier sentences heads keep coming back to (arXiv:2506.19143, section 4).

1. Vertical score: how much the sentences that come `proximity` or more after sentence j read it, in one head.
2. A head whose vertical scores are peaked (kurtosis over sentences, averaged over traces) is a receiver head.
3. A sentence's score is its mean vertical score over the receiver heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_stream.analysis.segments import Segments
from tl_stream.analysis.sentence_patterns import distant_means, whole_pattern
from tl_stream.analysis.settings import PAPER, AnchorSettings
from tl_stream.cache import SparseActivationCache

Head = tuple[int, int]
FEWEST = 4  # values whose kurtosis says something: it is the same for any three, and for any two


@dataclass(frozen=True, eq=False)
class VerticalScores:
    """How much later sentences read each sentence, on one trace.

    Attributes:
        values: By layer, head and sentence; NaN for the last `proximity` sentences.
        layers: The layers.
        segments: The sentences.
        pruned: Share of the token pairs that were not kept.
        exact_for: What the numbers are exact for.
    """

    values: Float[Tensor, "layer head_index sentence"]
    layers: tuple[int, ...]
    segments: Segments
    pruned: float
    exact_for: str

    @property
    def kurtosis(self) -> Float[Tensor, "layer head_index"]:
        """Fisher's kurtosis over sentences, biased (0 for a normal law); NaN where all values are equal but for rounding.

        Of n values it is at most n - 5 + 1 / (n - 1), where only one isn't like the others; -1.5 of any three, -2 of any two.
        """
        values = self.values[..., self._scored]
        mean = values.mean(-1, keepdim=True)
        deviation = values - mean
        variance = (deviation**2).mean(-1)
        is_constant = variance <= (torch.finfo(values.dtype).resolution * mean[..., 0]) ** 2
        return ((deviation**4).mean(-1) / variance**2 - 3).masked_fill(is_constant, torch.nan)

    @property
    def scored(self) -> int:
        """How many sentences have scores."""
        return int(self._scored.sum())

    @property
    def _scored(self) -> Bool[Tensor, " sentence"]:
        return ~self.values.isnan().any(0).any(0)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a layer, head and sentence: layer, head, sentence, score."""
        rows = [
            {"layer": layer, "head": head, "sentence": sentence, "score": score}
            for layer, heads in zip(self.layers, self.values.tolist(), strict=True)
            for head, scores in enumerate(heads)
            for sentence, score in enumerate(scores)
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> go.Figure:
        """A heatmap: sentences across, heads down; each head's scores relative to its greatest."""
        flat = self.values.flatten(0, 1).cpu()
        shares = flat / flat.nan_to_num(0.0).amax(-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        names = [_name((layer, head)) for layer in self.layers for head in range(self.values.shape[1])]
        heatmap = go.Heatmap(
            z=shares.numpy(),
            y=names,
            customdata=[list(self.segments.labels)] * len(names),
            hovertemplate="%{y}<br>%{customdata}<br>%{z:.3f} of the head's greatest<extra></extra>",
            colorscale="Viridis",
        )
        title = f"How much later sentences read each sentence, exact for {self.exact_for}"
        figure = go.Figure(heatmap).update_layout(title=title, template="plotly_white", xaxis_title="sentence")
        return figure.update_yaxes(autorange="reversed")


@dataclass(frozen=True, eq=False)
class ReceiverHeads:
    """The heads that focus on few sentences, over all traces.

    Attributes:
        heads: `(layer, head_index)`, the greatest kurtosis first.
        kurtosis: Mean over the traces on which it is defined, by layer and head; NaN where it is on none.
        by_trace: Kurtosis on each trace.
        layers: The layers.
        exact_for: What the numbers are exact for.
    """

    heads: tuple[Head, ...]
    kurtosis: Float[Tensor, "layer head_index"]
    by_trace: Float[Tensor, "trace layer head_index"]
    layers: tuple[int, ...]
    exact_for: str

    def sentence_scores(self, vertical: VerticalScores) -> Float[Tensor, " sentence"]:
        """Mean vertical score of each sentence over these heads, on one trace; NaN for the last few sentences.

        Raises:
            ValueError: The trace has other layers.
        """
        if vertical.layers != self.layers:
            raise ValueError(f"vertical had the layers {vertical.layers}; expected {self.layers}, those of these heads.")
        return torch.stack([vertical.values[self.layers.index(layer), head] for layer, head in self.heads]).mean(0)

    @property
    def reliability(self) -> float:
        """Pearson's r, over heads, of the mean kurtosis on every other trace and that on the rest.

        Raises:
            ValueError: Fewer than two traces.
        """
        if len(self.by_trace) < 2:
            raise ValueError("reliability needs at least 2 traces; pass more to receiver_heads().")
        halves = torch.stack([self.by_trace[start::2].nanmean(0).flatten() for start in (0, 1)])
        return float(torch.corrcoef(halves[:, ~halves.isnan().any(0)])[0, 1])

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head: layer, head, kurtosis, whether it is a receiver head."""
        rows = [
            {"layer": layer, "head": head, "kurtosis": value, "is_receiver": (layer, head) in self.heads}
            for layer, values in zip(self.layers, self.kurtosis.tolist(), strict=True)
            for head, value in enumerate(values)
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Kurtosis of every head; receiver heads stand out."""
        table = self.to_dataframe()
        names = [_name((layer, head)) for layer, head in zip(table["layer"], table["head"], strict=True)]
        colours = ["#d9480f" if receives else "#1f4fd8" for receives in table["is_receiver"]]
        title = f"Kurtosis of vertical scores, mean over {len(self.by_trace)} traces, exact for {self.exact_for}"
        figure = go.Figure(go.Bar(x=names, y=table["kurtosis"], marker_color=colours))
        return figure.update_layout(title=title, template="plotly_white", xaxis_title="head", yaxis_title="kurtosis")


@torch.no_grad()
def vertical_scores(
    cache: SparseActivationCache, sentences: Sequence[Any], *, text: int = 0, settings: AnchorSettings = PAPER
) -> VerticalScores:
    """`v_j`: mean over the sentences i >= j + proximity of the sentence matrix's `A[i, j]`, for every cached head.

    O(T) memory for constant k. Exact for the sparse model; of a `forward="exact"` run, for the recorded entries of the dense
    model (the rest counts as 0).

    Args:
        cache: A run's cache with patterns.
        sentences: Ascending sentences or spans (see `Segments.of`).
        text: Which text of the batch.
        settings: `proximity` is used.

    Raises:
        KeyError: The cache holds no pattern.
        ValueError: Not more sentences than `proximity`, or as `sentence_matrix`.
    """
    layers = tuple(sorted(cache.patterns))
    if not layers:
        raise KeyError("cache held no pattern; run with hook_pattern among names_filter.")
    segments = Segments.of(sentences, whole_pattern(cache, layers[0], text).shape[-1])
    if len(segments) <= settings.proximity:
        raise ValueError(
            f"sentences were {len(segments)} with a proximity of {settings.proximity}; expected more sentences than that: no "
            "other sentence is far enough behind. Take a longer trace, or a smaller proximity."
        )
    values = [distant_means(whole_pattern(cache, layer, text), segments, settings.proximity) for layer in layers]
    return VerticalScores(torch.stack([x.cpu() for x in values]), layers, segments, cache.pruned, _exact_for(cache))


def receiver_heads(traces: VerticalScores | Sequence[VerticalScores], *, settings: AnchorSettings = PAPER) -> ReceiverHeads:
    """The heads with the greatest kurtosis of their vertical scores, averaged over traces.

    Args:
        traces: The vertical scores of one trace or of several.
        settings: `n_heads` is used; where fewer heads have a kurtosis, these are taken.

    Raises:
        ValueError: No traces, traces of different layers, heads or kinds of run, one with fewer than 4 scored sentences (the
            kurtosis of any three numbers is the same), or no head whose scores differ from sentence to sentence.
    """
    each = [traces] if isinstance(traces, VerticalScores) else list(traces)
    kinds = {(trace.layers, trace.values.shape[1], trace.exact_for) for trace in each}
    if len(kinds) != 1:
        raise ValueError(f"traces were of {len(kinds)} kinds (layers, heads, what they are exact for); expected one.")
    least = min(each, key=lambda trace: trace.scored)
    if least.scored < FEWEST:
        raise ValueError(
            f"traces had one with scores of {least.scored} sentences ({len(least.segments)} in all); expected at least "
            f"{FEWEST}: the kurtosis of fewer numbers is always the same. Take a longer trace, or a smaller proximity."
        )
    by_trace = torch.stack([trace.kurtosis for trace in each])
    mean = by_trace.nanmean(0)
    number = min(settings.n_heads, int(mean.isfinite().sum()))
    if not number:
        raise ValueError("traces gave every head the same score for all sentences; expected some head that tells them apart.")
    order = mean.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:number].tolist()
    layers = each[0].layers
    heads = tuple((layers[i // mean.shape[1]], i % mean.shape[1]) for i in order)
    return ReceiverHeads(heads, mean, by_trace, layers, each[0].exact_for)


def _exact_for(cache: SparseActivationCache) -> str:
    if not cache.pruned:
        return "the dense model"
    return "the sparse model" if cache.config.forward == "sparse" else "the recorded entries of the dense model"


def _name(head: Head) -> str:
    return f"L{head[0]}H{head[1]}"

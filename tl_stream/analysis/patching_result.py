"""What patching by block found."""

from __future__ import annotations

from dataclasses import dataclass

import pandas
import plotly.graph_objects as go
from rich.table import Table

from tl_stream.audit import records


@dataclass(frozen=True)
class Effect:
    """One stretch of tokens in one layer.

    Attributes:
        layer: Layer index.
        start: First token.
        stop: One past the last one.
        finest: Whether this is one of the finest stretches, not cut further.
        metric: The metric of the corrupted text with the clean activations there.
        effect: (metric - corrupted metric) / (clean metric - corrupted metric): 1 restores the clean one, 0 does nothing.
    """

    layer: int
    start: int
    stop: int
    finest: bool
    metric: float
    effect: float


@dataclass(frozen=True)
class PatchEffects:
    """What `patch_by_block` found.

    Attributes:
        effects: Every stretch that was patched: by layer, coarse ones first.
        point: The activation that was patched.
        clean: The clean text's metric.
        corrupted: The corrupted text's.
        n_tokens: Length of the texts.
        planned: How many forwards were announced: the most that could be needed.
        exact_for: What the numbers are exact for.
    """

    effects: tuple[Effect, ...]
    point: str
    clean: float
    corrupted: float
    n_tokens: int
    planned: int
    exact_for: str

    @property
    def n_forwards(self) -> int:
        """How many forwards were made, the two unpatched ones included."""
        return len(self.effects) + 2

    @property
    def finest(self) -> tuple[Effect, ...]:
        """The finest stretches that were reached, the greatest effect first, up or down."""
        return tuple(sorted((each for each in self.effects if each.finest), key=lambda each: -abs(each.effect)))

    def table(self, most: int = 10) -> Table:
        """The finest stretches with the greatest effects."""
        cells = [(each.layer, f"{each.start} to {each.stop - 1}", each.metric, each.effect) for each in self.finest[:most]]
        caption = (
            f"Clean {self.clean:.3f}, corrupted {self.corrupted:.3f}; {self.n_forwards} forwards. Exact for {self.exact_for}."
        )
        return records.table(f"{self.point} patched", ("layer", "tokens", "metric", "effect"), cells, caption)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a stretch."""
        return records.dataframe(self.effects)

    def plot(self) -> go.Figure:
        """The effect along the text, a line of steps a layer: where a stretch was cut, that of its parts."""
        made = go.Figure()
        for layer in dict.fromkeys(each.layer for each in self.effects):
            along: list[float | None] = [None] * self.n_tokens
            for each in self.effects:  # coarse ones first
                if each.layer == layer:
                    along[each.start : each.stop] = [each.effect] * (each.stop - each.start)
            corners = [i for i in range(self.n_tokens) if i in (0, self.n_tokens - 1) or along[i] != along[i - 1]]
            made.add_scatter(
                x=corners, y=[along[i] for i in corners], name=f"layer {layer}", mode="lines", line_shape="hv"
            )  # fmt: skip
        return made.update_layout(
            title=f"What patching {self.point} restores, by block",
            xaxis_title="token",
            yaxis_title="effect (1: the clean metric)",
            template="plotly_white",
        )

    def __repr__(self) -> str:
        best = self.finest[0] if self.finest else None
        top = (
            ""
            if best is None
            else f", greatest effect {best.effect:.3f} at tokens {best.start} to {best.stop - 1}, layer {best.layer}"
        )
        return f"PatchEffects({self.n_forwards} forwards{top})"

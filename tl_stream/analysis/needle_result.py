"""What a needle study found: accuracy by depth and length, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy
import pandas
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tl_stream.audit import records
from tl_stream.budget import Budget
from tl_stream.config import StreamConfig
from tl_stream.pairs import percent_pruned


@dataclass(frozen=True)
class NeedleCell:
    """One length, depth and budget: means over the sampled texts.

    Attributes:
        length: Tokens of the prompt.
        depth: Where in the haystack the needle lies, 0 to 1.
        budget: Name of the budget.
        samples: Number of texts.
        accuracy_dense: Score of the dense model's greedy answers (`Task.score`), wherever they stand in what it generates.
        accuracy_sparse: Score of the sparse model's.
        pruned: Share of the prompts' token pairs that were dropped, over all layers and heads; of a layer with a sliding
            window, of its pairs.
        pruned_causal: The same of all causal pairs: what windows hide counts, too.
        needle_retained: Share that was kept of the dense model's attention to the needle, from the rows that decide the
            answer's tokens, over all layers and heads.
    """

    length: int
    depth: float
    budget: str
    samples: int
    accuracy_dense: float
    accuracy_sparse: float
    pruned: float
    pruned_causal: float
    needle_retained: float


@dataclass(frozen=True)
class NeedleGrid:
    """A needle study.

    `accuracy_sparse` and `pruned` are exact for the sparse model, the one whose attention is masked with the kept blocks.
    `accuracy_dense` and the attention in `needle_retained` are the dense model's.

    Attributes:
        task: Name of the task.
        lengths: Lengths of the prompts, ascending.
        depths: Depths of the needle, ascending.
        budgets: The budgets, or whole configs, by name.
        samples: Texts a cell.
        config: Everything else about the sparse runs of budgets.
        cells: All results, by length, depth and budget.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    budgets: dict[str, Budget | StreamConfig]
    samples: int
    config: StreamConfig = field(repr=False)
    cells: tuple[NeedleCell, ...] = field(repr=False)

    def to_dataframe(self) -> pandas.DataFrame:
        """A row a cell."""
        return records.dataframe(self.cells)

    def accuracy(self, budget: str | None = None) -> Float[numpy.ndarray, "depth length"]:
        """Mean scores of the sparse model with one budget; None: of the dense model.

        Raises:
            ValueError: No budget of that name.
        """
        name = next(iter(self.budgets)) if budget is None else budget
        if name not in self.budgets:
            raise ValueError(f"budget was {budget!r}; expected one of {', '.join(map(repr, self.budgets))}, or None.")
        cells = {
            (c.depth, c.length): c.accuracy_dense if budget is None else c.accuracy_sparse
            for c in self.cells
            if c.budget == name
        }
        return numpy.array([[cells[depth, length] for length in self.lengths] for depth in self.depths])

    def pruned(self, budget: str) -> float:
        """Mean pruned share over all cells of a budget."""
        return float(numpy.mean([cell.pruned for cell in self.cells if cell.budget == budget]))

    def pruned_causal(self, budget: str) -> float:
        """The same of all causal pairs."""
        return float(numpy.mean([cell.pruned_causal for cell in self.cells if cell.budget == budget]))

    def plot(self) -> go.Figure:
        """Heat maps of the accuracy: rows depth, columns length; the dense model's, then one for each budget."""
        names: list[str | None] = [None, *self.budgets]
        titles = ["dense" if name is None else f"{name}<br>{self._pruned(name)} pruned" for name in names]
        figure = make_subplots(1, len(names), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.02)
        for column, name in enumerate(names, 1):
            figure.add_trace(self._heatmap(self.accuracy(name)), 1, column)
        figure.update_xaxes(title="prompt tokens", type="category")
        figure.update_yaxes(type="category", autorange="reversed")
        figure.update_yaxes(title="needle depth", col=1)
        texts = f"{self.samples} text{'s' if self.samples > 1 else ''} a cell"
        figure.update_layout(
            title=f"{self.task}: retrieval accuracy, {texts}; exact for the sparse model",
            coloraxis={"cmin": 0, "cmax": 1, "colorscale": "Viridis", "colorbar": {"title": "accuracy"}},
            template="plotly_white",
            width=max(600, 140 + 280 * len(names)),
            height=170 + 45 * len(self.depths) + 60,
            margin={"t": 120},
        )
        return figure

    def _pruned(self, budget: str) -> str:
        return percent_pruned(self.pruned(budget), self.pruned_causal(budget))

    def _heatmap(self, accuracy: Any) -> go.Heatmap:
        return go.Heatmap(
            z=accuracy,
            x=[f"{length:,}" for length in self.lengths],
            y=[f"{depth:.0%}" if round(depth * 100, 6).is_integer() else f"{depth:.3g}" for depth in self.depths],
            text=[[f"{value:.2g}" for value in row] for row in accuracy],
            texttemplate="%{text}",
            hovertemplate="%{x} tokens, depth %{y}: %{z:.3f}<extra></extra>",
            coloraxis="coloraxis",
        )

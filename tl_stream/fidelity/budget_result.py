"""What a search for the smallest budget found, and everything that it tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from tl_stream.config import StreamConfig
from tl_stream.pairs import percent_pruned

Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """One budget that was tried.

    Attributes:
        budget: The number that was tried, of what the search went over (`BudgetSearch.over`).
        pruned: Share of the prompt's token pairs that were dropped, over all layers and heads; of a layer with a sliding
            window, of its pairs.
        pruned_causal: The same of all causal pairs: what windows hide counts, too.
        matched: Whether the criterion was met.
        value: What the metric gave; None where generated tokens were compared.
        tokens: What was generated, by text; None where a metric was computed.
    """

    budget: int
    pruned: float
    pruned_causal: float
    matched: bool
    value: float | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class BudgetSearch:
    """The smallest budget found that meets a criterion.

    Attributes:
        config: The config with that budget; None: no budget of the range met the criterion.
        evaluations: Everything that was tried, by ascending budget.
        criterion: What had to be met, in words.
        over: What the budgets are numbers of: `"k"`, `"total"`, `"top_p"`, or `"budget"` for a function.
        dense_tokens: What the dense model generates, by text; None where a metric was computed.
    """

    config: StreamConfig | None
    evaluations: tuple[Evaluation, ...]
    criterion: str
    over: str
    dense_tokens: Tokens | None = None

    @property
    def best(self) -> Evaluation | None:
        """The smallest budget that met the criterion, and what it gave; None: none did."""
        return next((each for each in self.evaluations if each.matched), None)

    @property
    def is_monotone(self) -> bool:
        """Whether no budget failed that was larger than one that met the criterion, among those tried."""
        matched = [each.matched for each in self.evaluations]
        return matched == sorted(matched)

    def table(self) -> Table:
        """The evaluations, for printing."""
        shows = "value" if self.dense_tokens is None else "tokens"
        table = Table(self.over, "pruned", "met", shows, title=self.criterion, min_width=len(self.criterion) + 2)
        for each in self.evaluations:
            shown = f"{each.value:.4g}" if each.tokens is None else "; ".join(" ".join(map(str, row)) for row in each.tokens)
            pruned, style = percent_pruned(each.pruned, each.pruned_causal), "bold" if each is self.best else None
            table.add_row(str(each.budget), pruned, "yes" if each.matched else "no", shown, style=style)
        found = "no budget met the criterion" if self.best is None else f"smallest that met it: {self.best.budget}"
        table.caption = found if self.is_monotone else f"{found}; larger ones failed: the criterion is not monotone"
        return table

    def __rich__(self) -> Table:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "over": self.over,
            "budget": None if self.best is None else self.best.budget,
            "criterion": self.criterion,
            "is_monotone": self.is_monotone,
            "dense_tokens": self.dense_tokens,
            "config": None if self.config is None else self.config.to_json(),
            "evaluations": [asdict(each) for each in self.evaluations],
        }

"""What an audit found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas
from rich.table import Table

from tl_stream.audit import records
from tl_stream.audit.verdict import DOUBT

_ESTIMATE = "Estimates (~) are no bounds; beside them their mean error in the rows that are known exactly."


@dataclass(frozen=True)
class HeadAudit:
    """One head in one text. Retained mass is the share of a row's full softmax, of the run's own q and k, on kept keys.

    Attributes:
        text: Index in the batch.
        layer: Layer index.
        head: Head index.
        retained: Retained mass of each chosen row, exact.
        mean_low: Lower end of the confidence interval for the mean over all rows.
        mean_high: Its upper end.
        mean_estimated: That mean, estimated from a few of the dropped keys of every row.
        estimate_error: Mean absolute error of this estimate in the chosen and the drawn rows.
        reasons: Why not to trust what this head's pattern shows; empty: no reason found.
    """

    text: int
    layer: int
    head: int
    retained: tuple[float, ...]
    mean_low: float
    mean_high: float
    mean_estimated: float
    estimate_error: float
    reasons: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Whether no reason was found not to trust this head's pattern."""
        return not self.reasons


@dataclass(frozen=True)
class RowsAudit:
    """The chosen rows of one text.

    Attributes:
        text: Index in the batch.
        rows: Query positions, as the cached patterns number them.
        retained: Retained mass of each row, mean over all cached layers and heads, exact.
        lead: By how much the logit of the run's own most likely next token exceeds all others, in each row; None: it isn't
            known for all of them (the run gave no logits, or the rows are too far from the text's end).
        reread: The lead of these same tokens in a recheck (`tl_stream.recheck`), in each row; negative: another token is more
            likely there. None: there was none.
        chances: The chance that dense attention says otherwise, in each row: that its most likely next token is another one,
            given the text up to there. From the most that is known: `reread`, or `lead` and what was lost, or that alone.
    """

    text: int
    rows: tuple[int, ...]
    retained: tuple[float, ...]
    lead: tuple[float, ...] | None
    reread: tuple[float, ...] | None
    chances: tuple[float, ...]

    @property
    def flip_chance(self) -> float:
        """The chance that dense attention says otherwise in any of these rows; NaN where no row counts."""
        return 1 - math.prod(1 - chance for chance in self.chances) if self.chances else math.nan

    @property
    def trusted(self) -> bool:
        """Whether that chance is at most `tl_stream.audit.verdict.DOUBT`."""
        return self.flip_chance <= DOUBT

    @property
    def said(self) -> str:
        """The verdict in words."""
        if not self.rows:
            return "no chosen row counts: all of them are padding"
        rows = f"row {self.rows[0]}" if len(self.rows) == 1 else f"rows {self.rows[0]} to {self.rows[-1]}"
        source = "from this run alone, which tells little: recheck it" if self.reread is None else "rechecked"
        return f"{self.flip_chance:.0%} chance that dense attention says otherwise in {rows} ({source})"


@dataclass(frozen=True)
class Audit:
    """What `SparseActivationCache.audit` found.

    Attributes:
        heads: One entry for each text, layer and head.
        answers: The chosen rows of each text.
        sample: How many further rows of each layer were drawn.
        confidence: Of each interval, on its own.
    """

    heads: tuple[HeadAudit, ...]
    answers: tuple[RowsAudit, ...]
    sample: int
    confidence: float

    @property
    def doubtful(self) -> tuple[HeadAudit, ...]:
        """The heads with a reason not to trust them."""
        return tuple(head for head in self.heads if not head.trusted)

    def table(self) -> Table:
        """A rich table, one row a head."""
        interval = f"all rows, {self.confidence:.0%} interval"
        header = ("text", "layer", "head", "chosen rows, least", interval, "all rows, estimate", "error", "verdict")
        cells = [
            (
                head.text,
                head.layer,
                head.head,
                min(head.retained, default=None),
                f"{head.mean_low:.3f} to {head.mean_high:.3f}",
                f"~{head.mean_estimated:.2f}",
                head.estimate_error,
                "; ".join(head.reasons) or "no reason to doubt",
            )
            for head in self.heads
        ]
        answers = "\n".join(f"Text {answer.text}: {answer.said}" for answer in self.answers)
        return records.table("Retained mass of the full softmax", header, cells, f"{answers}\n{_ESTIMATE}")

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head."""
        return records.dataframe(self.heads)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        plain = records.record(self)
        return {
            **plain,
            "heads": [records.record(x) for x in self.heads],
            "answers": [{**records.record(x), "flip_chance": x.flip_chance} for x in self.answers],
        }

    def __repr__(self) -> str:
        answers = "; ".join(f"Text {answer.text}: {answer.said}" for answer in self.answers)
        return f"Audit({len(self.doubtful)} of {len(self.heads)} heads doubtful; {answers})"

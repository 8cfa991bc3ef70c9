"""What an audit found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas
import torch
from rich.table import Table

from tl_stream.audit import records
from tl_stream.audit.verdict import lost_per_lead

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
        lead: By how much the run's own most likely next token is more probable than the second, in each row; None: it isn't
            known for all of them (the run gave no logits, or the rows are too far from the text's end).
        reread: The lead of these same tokens where these rows read everything, in each row; negative: another token is more
            probable there. None: not rechecked (`tl_stream.recheck` does it).
        reasons: Why not to trust what the model computes there; empty: no reason found.
    """

    text: int
    rows: tuple[int, ...]
    retained: tuple[float, ...]
    lead: tuple[float, ...] | None
    reread: tuple[float, ...] | None
    reasons: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Whether no reason was found not to trust these rows."""
        return not self.reasons

    @property
    def doubt(self) -> tuple[float, ...] | None:
        """Lost mass / lead of each row, what the verdict goes by where the lead is known: small where little is lost, and
        where the model is sure enough for that not to matter. The lead is the lesser one, if rows were reread."""
        if self.lead is None:
            return None
        reread = None if self.reread is None else torch.tensor(self.reread)
        return tuple(lost_per_lead(torch.tensor(self.retained), torch.tensor(self.lead), reread).tolist())


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
        answers = "\n".join(self._said(answer) for answer in self.answers)
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
        return {**plain, "heads": [records.record(x) for x in self.heads], "answers": [records.record(x) for x in self.answers]}

    def __repr__(self) -> str:
        answers = "; ".join(self._said(answer) for answer in self.answers)
        return f"Audit({len(self.doubtful)} of {len(self.heads)} heads doubtful; {answers})"

    @staticmethod
    def _said(answer: RowsAudit) -> str:
        return f"Text {answer.text}: " + ("; ".join(answer.reasons) or f"no reason to doubt {_listed(answer.rows)}")


def _listed(rows: tuple[int, ...]) -> str:
    return f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"

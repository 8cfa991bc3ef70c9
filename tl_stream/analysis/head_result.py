"""What `head_scores` found."""

from __future__ import annotations

from dataclasses import dataclass

import pandas
from rich.table import Table

from tl_stream.analysis.kept import exact_for
from tl_stream.audit import records

KINDS = ("previous_token", "duplicate_token", "induction", "sink", "entropy", "retrieval")


@dataclass(frozen=True)
class HeadScore:
    """One head in one text; `tl_stream.analysis.head_scores` says what each score is.

    Attributes:
        text: Index in the batch.
        layer: Layer index.
        head: Head index.
        previous_token: Share of attention on the token before.
        duplicate_token: Share on earlier tokens like the query's.
        induction: Share on tokens that follow one like the query's.
        sink: Mean attention to the first token.
        entropy: Mean entropy of a row, in nats.
        retrieval: Copied answer tokens by needle token; None where no needle was named.
    """

    text: int
    layer: int
    head: int
    previous_token: float
    duplicate_token: float
    induction: float
    sink: float
    entropy: float
    retrieval: float | None


@dataclass(frozen=True)
class HeadScores:
    """The scores of all heads.

    Attributes:
        heads: One entry for each text, layer and head.
        forward: The forward of the run.
    """

    heads: tuple[HeadScore, ...]
    forward: str

    @property
    def exact_for(self) -> str:
        """The model whose numbers these are, exactly."""
        return exact_for(self.forward)

    def top(self, kind: str, n: int = 5) -> tuple[HeadScore, ...]:
        """The heads with the highest score of a kind.

        Raises:
            ValueError: No such kind of score, or one that wasn't computed.
        """
        if kind not in KINDS:
            raise ValueError(f"kind was {kind!r}; expected one of {', '.join(KINDS)}.")
        if any(getattr(head, kind) is None for head in self.heads):
            raise ValueError(f"kind was {kind!r}, which needs a needle and an answer; pass both to head_scores.")
        return tuple(sorted(self.heads, key=lambda head: -getattr(head, kind))[:n])

    def table(self) -> Table:
        """A rich table, one row a head."""
        header = ("text", "layer", "head", *KINDS)
        cells = [[getattr(head, name) for name in header] for head in self.heads]
        return records.table("Head scores", header, cells, f"Exact for {self.exact_for}.")

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head."""
        return records.dataframe(self.heads)

    def __repr__(self) -> str:
        return f"HeadScores({len(self.heads)} heads, exact for {self.exact_for})"

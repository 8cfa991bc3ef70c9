"""When retained mass is too little to trust, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

# A head that keeps less than this shows less than half of what it reads.
HEAD_THRESHOLD = 0.5
# Of the mean over all layers and heads in a row. Chosen by benchmarks/audit_roc.py on the bundled model: on texts that didn't
# choose it, it flags 88 % of the answers that the sparse run flipped and 15 % of the others (area under the ROC curve: 0.94).
# 0.7 would flag 97 % and 36 %, 0.5 64 % and 3 %. Another model may need another threshold.
ROW_THRESHOLD = 0.63


def head_reasons(exact: Float[Tensor, " row"], rows: Sequence[int], mean_high: float, confidence: float) -> tuple[str, ...]:
    """Why not to trust a head's pattern.

    Args:
        exact: Retained mass of the chosen rows.
        rows: Their positions.
        mean_high: Upper end of the interval for the mean over all rows.
        confidence: Of that interval.
    """
    reasons = []
    if len(exact) and float(exact.min()) < HEAD_THRESHOLD:
        reasons.append(f"row {rows[int(exact.argmin())]} keeps {float(exact.min()):.0%} of what it reads")
    if mean_high < HEAD_THRESHOLD:
        reasons.append(f"all rows keep {mean_high:.0%} on average at most ({confidence:.0%} confidence)")
    return tuple(reasons)


def rows_reasons(mass: Float[Tensor, " row"], rows: Sequence[int]) -> tuple[str, ...]:
    """Why not to trust what the model computes in the chosen rows.

    Args:
        mass: Retained mass of each, mean over layers and heads.
        rows: Their positions.
    """
    if not len(mass):
        return ("no chosen row counts: all of them are padding",)
    least = float(mass.min())
    if least >= ROW_THRESHOLD:
        return ()
    return (
        f"row {rows[int(mass.argmin())]} keeps {least:.1%} over all heads, below {ROW_THRESHOLD:.0%}: "
        "the dense model may answer otherwise",
    )

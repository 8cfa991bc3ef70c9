"""When retained mass is too little to trust, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# A head that keeps less than this shows less than half of what it reads.
HEAD_THRESHOLD = 0.5
# Of a row: its retained mass, mean over all layers and heads; where the run's logits are known, `lost_per_lead`. Chosen by
# benchmarks/audit_roc.py on the bundled model (default, recency and random blocks): those that flag the most flipped answers
# and at most a tenth of the others. What they do on texts that didn't choose them, with the paper's choice of blocks, too, and
# rechecked: docs/measurements.md. Another model may need others.
ROW_THRESHOLD = 0.585
DOUBT_THRESHOLD = 0.43


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


def lost_per_lead(
    mass: Float[Tensor, " row"], lead: Float[Tensor, " row"], reread: Float[Tensor, " row"] | None = None
) -> Float[Tensor, " row"]:
    """Lost mass / the lesser lead: 0 where nothing is lost, however unsure the model is; infinite without any lead."""
    lost = (1 - mass).clamp(min=0)
    least = lead if reread is None else torch.minimum(lead, reread)
    return torch.where(lost > 0, lost / least.clamp(min=0), lost)


def rows_reasons(
    mass: Float[Tensor, " row"],
    lead: Float[Tensor, " row"] | None,
    reread: Float[Tensor, " row"] | None,
    rows: Sequence[int],
) -> tuple[str, ...]:
    """Why not to trust what the model computes in the chosen rows.

    Args:
        mass: Retained mass of each, mean over layers and heads.
        lead: By how much the most likely next token is more probable than the second, in each; None: not known.
        reread: The same token's lead where these rows read everything; None: not known.
        rows: Their positions.
    """
    if not len(mass):
        return ("no chosen row counts: all of them are padding",)
    if lead is None:
        worst = int(mass.argmin())
        doubtful, why = float(mass[worst]) < ROW_THRESHOLD, f"below {ROW_THRESHOLD:.1%}"
    else:
        doubt = lost_per_lead(mass, lead, reread)
        worst = int(doubt.argmax())
        doubtful, why = float(doubt[worst]) > DOUBT_THRESHOLD, _unsure(lead, reread, worst)
    if not doubtful:
        return ()
    return (f"row {rows[worst]} keeps {float(mass[worst]):.1%} over all heads, {why}; the dense model may answer otherwise",)


def _unsure(lead: Float[Tensor, " row"], reread: Float[Tensor, " row"] | None, row: int) -> str:
    if reread is not None and float(reread[row]) <= 0:
        return "and its next token is another one when it reads everything"
    by = (
        f"{float(lead[row]):.1%}"
        if reread is None
        else f"{float(lead[row]):.1%}, or {float(reread[row]):.1%} when it reads everything"
    )
    return f"and its next token leads by {by}: more than {DOUBT_THRESHOLD:g} of that is lost"

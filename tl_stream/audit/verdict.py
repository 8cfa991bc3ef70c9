"""The chance that dense attention says otherwise than a sparse run did, and the words for it.

A logistic function of what is known, from most to least:

1. The lead that the run's next token has in a recheck (`tl_stream.recheck`), against how far that moved it. Negative: the
   recheck says something else.
2. The lead in the run itself, and the share of attention that it lost.
3. That share alone.

The coefficients are from `benchmarks/verdict.py`: maximum likelihood on next tokens of SmolLM2-135M-Instruct (`verdict.jsonl`).
How well they are calibrated on models that did not choose them is in docs/measurements.md: well with a recheck; without one
they say little more than how unsure the model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# A head that keeps less than this shows less than half of what it reads.
HEAD_THRESHOLD = 0.5
# An answer is doubted where the chance that dense attention says otherwise is above this.
DOUBT = 0.2


@dataclass(frozen=True)
class Logistic:
    """A chance whose log-odds are `intercept + slopes . x`."""

    intercept: float
    slopes: tuple[float, ...]

    def __call__(self, *known: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        odds = torch.stack([slope * x.double() for slope, x in zip(self.slopes, known, strict=True)]).sum(0)
        return (self.intercept + odds).sigmoid()


RECHECKED = Logistic(0.06, (-4.42,))  # of `settled`
ALONE = Logistic(2.76, (-0.86, 2.45))  # of the lead, log(lost mass)
BY_MASS = Logistic(2.01, (2.89,))  # of log(lost mass)


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


def settled(lead: Float[Tensor, " row"], reread: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """The lead in a recheck against how far that moved it: what moved far may move on. Of several forms the best on SmolLM2."""
    return reread / (0.05 + (reread - lead).abs()).sqrt()


def flip_chances(
    lost: Float[Tensor, " row"], lead: Float[Tensor, " row"] | None, reread: Float[Tensor, " row"] | None
) -> Float[Tensor, " row"]:
    """The chance that dense attention gives another most likely next token; 0 where nothing was lost.

    Args:
        lost: The share of attention that was lost, of each row.
        lead: By how much the logit of the run's next token exceeds all others; None: not known.
        reread: The same token's lead in a recheck; None: there was none.
    """
    if lead is not None and reread is not None:
        chances = RECHECKED(settled(lead, reread))
    elif lead is not None:
        chances = ALONE(lead, lost.log())
    else:
        chances = BY_MASS(lost.log())
    return torch.where(lost > 0, chances, 0.0)

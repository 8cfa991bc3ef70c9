"""A confidence interval for the mean of numbers in [0, 1] of which some were drawn without replacement, whatever they are.

Betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", arXiv:2010.09686, section
5: sampling without replacement). For each candidate mean m, a gambler who starts with 1 bets on the draws. Before draw t, were
m the mean of all N numbers, the next one would be expected to be

    m_t = (N m - sum of the draws so far) / (N - number of draws so far),

so that the wealth prod_t (1 + lambda_t (x_t - m_t)) is a fair game whatever the numbers are, and exceeds 1 / alpha with
probability at most alpha (Ville). The interval is every m at which the wealth never did: no normal theory, right at any sample
size and any skew. Half of the wealth bets that the mean is greater than m, half that it is smaller.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_CANDIDATES = 501
_BOLDNESS = 0.75  # the most of its wealth that a bet risks


def mean_interval(
    draws: Float[Tensor, "*series draw"], population: int, confidence: float = 0.95
) -> tuple[Float[Tensor, "*series"], Float[Tensor, "*series"]]:
    """Lower and upper bound for the mean of all numbers, each series for itself.

    O(draws) time a series, with 501 candidate means. The bounds are rounded outward to the candidates.

    Args:
        draws: Numbers in [0, 1], drawn uniformly without replacement, in the order of the draws. The same draws may serve many
            series; each interval holds with `confidence` on its own, not all of them together.
        population: How many numbers there are in all.
        confidence: Probability, over the draws, with which an interval covers the mean.

    Raises:
        ValueError: More draws than numbers, numbers outside [0, 1], or a confidence outside (0, 1).
    """
    _check(draws, population, confidence)
    if not population:
        return draws.new_zeros(draws.shape[:-1]), draws.new_ones(draws.shape[:-1])
    x = draws.double().clamp(0.0, 1.0)
    n, total = x.shape[-1], x.sum(-1)
    # What is certain: the draws themselves, and that every other number lies in [0, 1].
    low, high = total / population, (total + population - n) / population
    if n in (0, population):
        return low, high
    candidates = torch.linspace(0, 1, _CANDIDATES, dtype=x.dtype, device=x.device)
    inside = _log_wealth(x, candidates, population, confidence) < math.log(1 / (1 - confidence))
    possible = inside & (candidates >= low[..., None]) & (candidates <= high[..., None])
    step = 1 / (_CANDIDATES - 1)
    first, last = possible.double().argmax(-1), possible.flip(-1).double().argmax(-1)
    some = possible.any(-1)
    lower = torch.where(some, (first * step - step).clamp(min=0.0), low)
    upper = torch.where(some, (1 - last * step + step).clamp(max=1.0), high)
    return torch.maximum(lower, low), torch.minimum(upper, high)


def _log_wealth(
    x: Float[Tensor, "*series draw"], candidates: Float[Tensor, " m"], population: int, confidence: float
) -> Float[Tensor, "*series m"]:
    """The most that the wealth ever was, as a logarithm, at each candidate mean."""
    n = x.shape[-1]
    seen = torch.zeros_like(x[..., :1])
    mean, spread = torch.full_like(seen, 0.5), torch.full_like(seen, 0.25)  # of half a draw's weight before the first
    up = torch.zeros(*x.shape[:-1], len(candidates), dtype=x.dtype, device=x.device)
    down, most = up.clone(), up.clone()
    for t in range(n):
        draw = x[..., t : t + 1]
        expected = ((population * candidates - seen) / (population - t)).clamp(1e-12, 1 - 1e-12)
        bet = (2 * math.log(2 / (1 - confidence)) / (n * spread)).sqrt()
        up = up + torch.log1p(torch.minimum(bet, _BOLDNESS / expected) * (draw - expected))
        down = down + torch.log1p(-torch.minimum(bet, _BOLDNESS / (1 - expected)) * (draw - expected))
        most = torch.maximum(most, torch.logaddexp(up, down) - math.log(2))
        seen = seen + draw
        mean = (0.5 + seen) / (t + 2)
        spread = (spread * (t + 1) + (draw - mean) ** 2) / (t + 2)
    return most


def _check(draws: Tensor, population: int, confidence: float) -> None:
    if draws.shape[-1] > population:
        raise ValueError(
            f"population was {population}, with {draws.shape[-1]} draws; expected at least as many numbers as draws."
        )
    slack = 1e-4  # of float32 sums
    if draws.numel() and not (-slack <= float(draws.min()) and float(draws.max()) <= 1 + slack):
        raise ValueError(f"draws were in [{float(draws.min())}, {float(draws.max())}]; expected numbers in [0, 1].")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence was {confidence}; expected a probability between 0 and 1, such as 0.95.")

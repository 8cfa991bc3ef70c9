"""The settings of thought-anchor analyses, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass

from tl_stream.analysis.checks import check_count


@dataclass(frozen=True)
class AnchorSettings:
    """How sentences are scored (Bogdan et al. 2025, arXiv:2506.19143).

    Args:
        proximity: A sentence's vertical score averages over the sentences that come at least so many after it.
        n_heads: How many receiver heads there are.
        temperature: The logits are divided by it before distributions are compared.
        log: Whether the divergence of each token is taken as log(KL + 1e-9) before it is averaged over a sentence; else KL.

    Raises:
        ValueError: A number out of range.
    """

    proximity: int = 4
    n_heads: int = 20
    temperature: float = 0.6
    log: bool = True

    def __post_init__(self) -> None:
        check_count("proximity", self.proximity)
        check_count("n_heads", self.n_heads)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature was {self.temperature!r}; expected a number above 0.")


PAPER = AnchorSettings()
"""The paper's settings."""

"""How many token pairs sparse attention keeps: of those that the masks allow, and of all causal ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Pairs:
    """Counts of (query, key) pairs, over texts, heads, and whatever layers and runs were added.

    Attributes:
        kept: Pairs that are kept.
        allowed: Pairs that the masks allow: causal ones, within a sliding window or chunk where there is one, without padding.
        causal: Pairs that they would allow without windows and chunks. (Of the keys that a layer still has: the KV cache of a
            sliding window may have dropped earlier ones.)
    """

    kept: int = 0
    allowed: int = 0
    causal: int = 0

    @classmethod
    def of(cls, layouts: Iterable[Any]) -> Pairs:
        """The counts of some layouts."""
        pairs = cls()
        for layout in layouts:
            pairs.add(layout)
        return pairs

    def add(self, layout: Any) -> None:
        """Count a `BlockLayout` or `JoinedLayout`, too."""
        self.kept += layout.n_kept_pairs
        self.allowed += layout.n_pairs
        is_causal = layout.mask.start is None
        causal = layout.n_pairs if is_causal else replace(layout.mask, start=None).n_pairs(layout.batch) * layout.n_heads
        self.causal += causal

    @property
    def pruned(self) -> float:
        """1 - kept pairs / pairs that the masks allow; 0 where they allow none."""
        return 1.0 - self.kept / self.allowed if self.allowed else 0.0

    @property
    def pruned_causal(self) -> float:
        """1 - kept pairs / all causal pairs; 0 where there are none. Without windows the same as `pruned`."""
        return 1.0 - self.kept / self.causal if self.causal else 0.0


def percent_pruned(pruned: float, pruned_causal: float) -> str:
    """`pruned` in per cent, for people; where windows hide pairs, `pruned_causal` beside it."""
    return f"{pruned:.1%}" if pruned == pruned_causal else f"{pruned:.1%} ({pruned_causal:.1%} of all causal pairs)"

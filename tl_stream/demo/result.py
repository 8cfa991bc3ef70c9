"""What the demo found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HeadReading:
    """How one head reads the needle while the answer is generated, one figure for each token of the answer.

    Attributes:
        layer: Layer index.
        head: Head index.
        needle_mass_sparse: Probability mass on the needle sentence in the sparse model.
        needle_mass_dense: The same in the dense model.
        retained_mass: Share of the full softmax of the sparse run's own q and k that lies on the kept keys.
    """

    layer: int
    head: int
    needle_mass_sparse: tuple[float, ...]
    needle_mass_dense: tuple[float, ...]
    retained_mass: tuple[float, ...]


@dataclass(frozen=True)
class DemoResult:
    """One needle, asked for densely and sparsely.

    Attributes:
        tokens: Length of the prompt.
        depth: Where the needle lies, 0 to 1.
        seed: Of the text.
        expected: The number that the needle gives.
        answer_dense: What the model generates greedily with full attention.
        answer_sparse: The same with sparse attention.
        pruned: Share of the causal token pairs that the sparse run drops, over all layers and heads.
        cache_bytes_dense: Bytes held by the patterns of the dense run.
        cache_bytes_sparse: Bytes held by those of the sparse run.
        seconds_dense: Time of the dense forward pass over the prompt with all patterns cached (nothing unembedded).
        seconds_sparse: Time of the sparse one, likewise; Stream's estimate included.
        retained_mass_mean: Share of the full softmax kept in the rows that generate the answer: mean over all heads.
        retained_mass_least: The least share of any head and answer token.
        heads: Heads that read the needle in either model, the strongest first; the strongest one where none does.
        html: The page written.
    """

    tokens: int
    depth: float
    seed: int
    expected: str
    answer_dense: str
    answer_sparse: str
    pruned: float
    cache_bytes_dense: int
    cache_bytes_sparse: int
    seconds_dense: float
    seconds_sparse: float
    retained_mass_mean: float
    retained_mass_least: float
    heads: tuple[HeadReading, ...]
    html: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

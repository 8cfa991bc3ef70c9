"""What `over_squashing` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas
from jaxtyping import Float
from torch import Tensor

from tl_stream.analysis.kept import exact_for
from tl_stream.analysis.spans import Span, checked_span

DEPTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, eq=False)
class PathSums:
    """Bounds on what each token can do to each target.

    Attributes:
        targets: Positions that are reached.
        bounds: The path sum from each token; all of a target's together are 2 ** n_layers where rows of attention sum to 1.
        n_layers: Number of layers.
        forward: The forward of the run.
    """

    targets: tuple[int, ...]
    bounds: Float[Tensor, "target pos"]
    n_layers: int
    forward: str

    @property
    def exact_for(self) -> str:
        """The model whose numbers these are, exactly."""
        return exact_for(self.forward)

    def of(self, source_span: Span) -> Float[Tensor, " target"]:
        """The bounds of all tokens of a span together.

        Raises:
            TypeError, ValueError: Not a span of the text.
        """
        span = checked_span("source_span", source_span, self.bounds.shape[1])
        return self.bounds[:, span.start : span.stop].sum(-1)

    def to_dataframe(self, depths: Sequence[float] = DEPTHS) -> pandas.DataFrame:
        """One row a target and depth: the mean bound of the tokens around the depth (0: the first token, 1: the target).

        A depth stands for the tokens that are nearer to it than to any other; `length` counts the tokens up to the target.

        Raises:
            ValueError: Depths that don't ascend from 0 or more to 1 or less.
        """
        ascending = all(a < b for a, b in pairwise(depths))
        if not depths or not ascending or depths[0] < 0 or depths[-1] > 1:
            raise ValueError(f"depths were {list(depths)}; expected ascending numbers between 0 and 1.")
        rows = [row for i, target in enumerate(self.targets) for row in self._rows(i, target, depths)]
        return pandas.DataFrame(rows, columns=["length", "depth", "bound"])

    def _rows(self, i: int, target: int, depths: Sequence[float]) -> list[tuple[int, float, float]]:
        between = [(a + b) / 2 for a, b in pairwise(depths)]
        edges = [0, *(round(x * (target + 1)) for x in between), target + 1]
        parts = [(start, max(stop, start + 1)) for start, stop in pairwise(edges)]
        means = [float(self.bounds[i, start:stop].mean()) for start, stop in parts]
        return [(target + 1, depth, mean) for depth, mean in zip(depths, means, strict=True)]

    def __repr__(self) -> str:
        size = f"{self.bounds.shape[1]} tokens, {self.n_layers} layers"
        return f"PathSums(targets={self.targets}, {size}; exact for {self.exact_for})"

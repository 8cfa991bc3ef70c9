"""Coarse to fine over a text: stretches of its finest parts, cut where it seems worth while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_stream.analysis.checks import check_count

Stretch = tuple[int, int]  # from this part to before that one


@dataclass(frozen=True)
class Refinement:
    """How a text is refined.

    Attributes:
        parts: The finest parts, as token spans, in order.
        size: Finest parts in a stretch of the first step, a power of `split`.
        split: Into how many stretches one is cut.
        keep: How many are cut at each step.
    """

    parts: tuple[tuple[int, int], ...]
    size: int
    split: int
    keep: int

    @classmethod
    def of(
        cls, n_tokens: int, spans: Sequence[tuple[int, int]] | None, block: int, starts: int, split: int, keep: int
    ) -> Refinement:
        """Begin with at most `starts` stretches of the given spans, or of blocks.

        Raises:
            ValueError: Spans that are empty, out of the text or out of order; a number that is too small.
        """
        for name, value, least in (("block", block, 1), ("starts", starts, 1), ("split", split, 2), ("keep", keep, 1)):
            check_count(name, value, least)
        if spans is None:
            spans = [(start, min(start + block, n_tokens)) for start in range(0, n_tokens, block)]
        _check_spans(spans, n_tokens)
        size = 1
        while -(-len(spans) // size) > starts:
            size *= split
        return cls(tuple((int(start), int(stop)) for start, stop in spans), size, split, keep)

    @property
    def n_patches(self) -> int:
        """How many stretches will be tried at most (fewer where a stretch at the end can't be cut as often)."""
        count = tried = len(self.first())
        size = self.size
        while size > 1:
            count = min(self.keep, count) * self.split
            tried += count
            size //= self.split
        return tried

    def first(self) -> list[Stretch]:
        """The stretches of the first step."""
        return self._cut(0, len(self.parts), self.size)

    def next(self, stretches: list[Stretch], scores: list[float]) -> list[Stretch]:
        """The parts of the best of some stretches, in order; none where they are the finest."""
        best = sorted(range(len(stretches)), key=lambda i: -scores[i])[: self.keep]
        cut = (stretches[i] for i in sorted(best) if not self.is_finest(stretches[i]))
        return [part for stretch in cut for part in self._cut(*stretch, self._size_below(stretch))]

    def is_finest(self, stretch: Stretch) -> bool:
        """Whether a stretch is a single finest part."""
        return stretch[1] - stretch[0] == 1

    def tokens(self, stretch: Stretch) -> tuple[int, int]:
        """A stretch as a token span."""
        return self.parts[stretch[0]][0], self.parts[stretch[1] - 1][1]

    def _size_below(self, stretch: Stretch) -> int:
        size = 1
        while size * self.split < stretch[1] - stretch[0]:
            size *= self.split
        return size

    def _cut(self, start: int, stop: int, size: int) -> list[Stretch]:
        return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def _check_spans(spans: Any, n_tokens: int) -> None:
    if not len(spans):
        raise ValueError("spans was empty; expected at least one (start, stop), or None for blocks.")
    before = 0
    for start, stop in spans:
        if not before <= start < stop <= n_tokens:
            raise ValueError(
                f"spans had ({start}, {stop}) after {before}; expected start < stop, in order, within the text's {n_tokens} "
                "tokens."
            )
        before = stop

"""`Segments`: the sentences of one text as token spans, and sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.tasks import Span

_LABEL_LETTERS = 60


@dataclass(frozen=True)
class Segments:
    """Sentences in order, none empty, none overlapping; tokens between them belong to none.

    Attributes:
        spans: Token span of each.
        labels: A few words for each, for plots and tables.
        n_tokens: Length of the text in tokens.
    """

    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    n_tokens: int

    @classmethod
    def of(cls, sentences: Sequence[Any], n_tokens: int) -> Segments:
        """Check sentences and take their spans.

        Args:
            sentences: `Sentence`s (of `tl_stream.analysis` or `tl_stream.tasks`), `Span`s, slices, or pairs (start, stop).
            n_tokens: Length of the text.

        Raises:
            TypeError: Something else among them.
            ValueError: None at all, an empty one, one outside the text, or two that overlap or are out of order.
        """
        spans = tuple(_span(each) for each in sentences)
        if not spans:
            raise ValueError("sentences were none; expected at least one sentence with its token span.")
        for i, span in enumerate(spans):
            if span.stop <= span.start:
                raise ValueError(f"sentences[{i}] was the empty span {span.start}:{span.stop}; leave out empty sentences.")
            if span.start < 0 or span.stop > n_tokens:
                raise ValueError(
                    f"sentences[{i}] was the span {span.start}:{span.stop}, outside the text's tokens 0:{n_tokens}; expected "
                    "token positions (BOS counted) of this very text."
                )
            if i and span.start < spans[i - 1].stop:
                raise ValueError(
                    f"sentences[{i}] was the span {span.start}:{span.stop}, which begins before sentences[{i - 1}] ends (at "
                    f"{spans[i - 1].stop}); expected ascending spans that don't overlap."
                )
        labels = (f"{i}: {getattr(each, 'text', '')[:_LABEL_LETTERS]}".rstrip(": ") for i, each in enumerate(sentences))
        return cls(spans, tuple(labels), n_tokens)

    def __len__(self) -> int:
        return len(self.spans)

    def owners(self, device: torch.device | str | None = None) -> Int[Tensor, " pos"]:
        """The sentence of each token; `len(self)` for tokens of none."""
        owner = torch.full((self.n_tokens,), len(self), device=device)
        for i, span in enumerate(self.spans):
            owner[span.slice] = i
        return owner

    def starts(self, device: torch.device | str | None = None) -> Int[Tensor, " sentence"]:
        """First token of each sentence."""
        return torch.tensor([span.start for span in self.spans], device=device)

    def lengths(self, device: torch.device | str | None = None) -> Int[Tensor, " sentence"]:
        """Tokens of each sentence."""
        return torch.tensor([len(span) for span in self.spans], device=device)

    def means(self, x: Float[Tensor, "*rows pos"]) -> Float[Tensor, "*rows sentence"]:
        """Mean over the tokens of each sentence."""
        total = x.new_zeros(*x.shape[:-1], len(self) + 1).index_add_(-1, self.owners(x.device), x)
        return total[..., :-1] / self.lengths(x.device)

    def chosen(self, name: str, indices: Iterable[int] | None) -> list[int]:
        """Indices of some sentences, ascending; None: all.

        Raises:
            ValueError: None of them, or one that doesn't exist.
        """
        found = sorted({*indices}) if indices is not None else list(range(len(self)))
        if not found or not 0 <= found[0] <= found[-1] < len(self):
            raise ValueError(f"{name} was {indices!r}; expected indices of sentences, 0 to {len(self) - 1}.")
        return found


def _span(sentence: Any) -> Span:
    span = getattr(sentence, "span", sentence)
    if isinstance(span, Span):
        return span
    bounds = (span.start, span.stop) if isinstance(span, slice) and span.step in (None, 1) else span
    if isinstance(bounds, tuple) and len(bounds) == 2 and all(isinstance(x, int) for x in bounds):
        return Span(*bounds)
    raise TypeError(
        f"sentences held {sentence!r}; expected sentences with a span, tl_stream.tasks.Span, slices, or pairs (start, stop)."
    )

"""How much of the full softmax a cached sparse run kept, and what not to trust, without any dense run.

1. Chosen rows (the last ones, say) exactly, from q and k.                                            O(T d) a row and head
2. Rows drawn without replacement from the others, exactly; an interval for the mean over all rows (`interval`). Rows that
   dropped nothing are known to keep everything, and aren't drawn.
3. Every row, by a few of the keys that it dropped (`estimate`): an estimate, with its error in the rows of 1 and 2.
4. A verdict on every head; and on the chosen rows the chance that dense attention says otherwise (`verdict`). It may be told
   what a recheck says there (`tl_stream.recheck`, one more sparse run).

All of that compares with the softmax of the sparse run's own q and k. In the first layer those are the dense model's; later
ones already carry what earlier layers lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.audit.estimate import estimated_mass
from tl_stream.audit.interval import mean_interval
from tl_stream.audit.result import Audit, HeadAudit, RowsAudit
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.audit.verdict import flip_chances, head_reasons
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.retained import kept_lse


@torch.no_grad()
def audit(
    patterns: Mapping[int, BlockSparseTensor | JoinedTensor],
    rows: int | Sequence[int] = 1,
    sample: int = 64,
    *,
    lead: Float[Tensor, "batch pos"] | None = None,
    reread: Float[Tensor, "text row"] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Audit:
    """See `SparseActivationCache.audit`, which hands its patterns (by layer) over.

    Raises:
        ValueError: No patterns, an argument out of range, or a `reread` of other texts or rows than the chosen ones.
        IndexError: A row out of range.
        TypeError: A pattern was written to.
    """
    _check(patterns, rows, sample)
    batch = next(iter(patterns.values())).block_layout.batch
    if reread is not None and len(reread) != batch:
        raise ValueError(
            f"reread was of shape {tuple(reread.shape)}; expected [{batch}, row], a row of numbers for each text of the cache."
        )
    heads: list[HeadAudit] = []
    answers: list[RowsAudit] = []
    for text in range(batch):
        layers = {layer: _Layer.of(pattern, text, rows) for layer, pattern in sorted(patterns.items())}
        known = (None if each is None else each[text] for each in (lead, reread))
        answers.append(_rows_audit(text, layers, *known))
        for layer, part in layers.items():
            heads += part.heads(text, layer, sample, confidence, torch.Generator().manual_seed(seed))
    return Audit(heads=tuple(heads), answers=tuple(answers), sample=sample, confidence=confidence)


class _Layer(NamedTuple):
    """One layer of one text.

    Attributes:
        softmax: The pattern's rows.
        lse: Log-sum-exp of each row over its kept keys, `[1, head_index, query_pos]`.
        chosen: The rows asked for, as positions.
        exact: Their retained mass.
        others: The other rows that count.
        estimate: Estimated retained mass of every row.
    """

    softmax: SoftmaxRows
    lse: Float[Tensor, "1 head_index query_pos"]
    chosen: Int[Tensor, " row"]
    exact: Float[Tensor, "head_index row"]
    others: Int[Tensor, " other"]
    estimate: Float[Tensor, "head_index query_pos"]

    @classmethod
    def of(cls, pattern: BlockSparseTensor | JoinedTensor, text: int, rows: int | Sequence[int]) -> _Layer:
        softmax = SoftmaxRows.of(pattern).text(text)
        lse = kept_lse(pattern)[text : text + 1]
        shown = torch.arange(softmax.shown.start, softmax.shown.stop, device=softmax.layout.device)
        counted = shown[softmax.counted()[0, shown]]
        chosen = counted[-rows:] if isinstance(rows, int) else _picked(shown, rows)
        others = counted[~torch.isin(counted, chosen)]
        return cls(softmax, lse, chosen, softmax.retained(chosen)[0], others, estimated_mass(softmax, lse)[0])

    @property
    def counted(self) -> Int[Tensor, " row"]:
        """All rows that count."""
        return torch.cat([self.others, self.chosen])

    def heads(self, text: int, layer: int, sample: int, confidence: float, generator: torch.Generator) -> list[HeadAudit]:
        """What there is to say of each head."""
        pruned = self.others[self.softmax.prunes()[0, self.others]]
        drawn = pruned[torch.randperm(len(pruned), generator=generator)[:sample].to(pruned.device)]
        draws = self.softmax.retained(drawn)[0]
        low, high = self._mean_bounds(*mean_interval(draws.cpu(), len(pruned), confidence), len(pruned))
        known = torch.cat([self.chosen, drawn])
        error = (self.estimate[:, known] - torch.cat([self.exact, draws], -1)).abs().mean(-1)
        return [
            HeadAudit(
                text=text,
                layer=layer,
                head=head,
                retained=tuple(self.exact[head].tolist()),
                mean_low=float(low[head]),
                mean_high=float(high[head]),
                mean_estimated=float(self.estimate[head, self.counted].mean()),
                estimate_error=float(error[head]),
                reasons=head_reasons(self.exact[head], self._numbers, float(high[head]), confidence),
            )
            for head in range(len(low))
        ]

    def _mean_bounds(self, low: Tensor, high: Tensor, n_pruned: int) -> tuple[Tensor, Tensor]:
        """Bounds for the mean over all rows: the chosen ones are known, and those that dropped nothing keep everything."""
        known = self.exact.sum(-1).cpu() + (len(self.others) - n_pruned)
        total = len(self.others) + len(self.chosen)
        return tuple((known + bound * n_pruned) / total for bound in (low, high))  # type: ignore[return-value]

    @property
    def _numbers(self) -> list[int]:
        """The chosen rows as the pattern numbers them."""
        return (self.chosen - self.softmax.shown.start).tolist()


def _rows_audit(
    text: int, layers: dict[int, _Layer], lead: Float[Tensor, " pos"] | None, reread: Float[Tensor, " row"] | None
) -> RowsAudit:
    """The chosen rows, over all layers and heads.

    A row that read everything itself still has in it what earlier rows lost: it counts as all rows do on average.
    """
    mass = torch.stack([part.exact.mean(0) for part in layers.values()]).mean(0)
    first = next(iter(layers.values()))
    length = first.softmax.layout.mask.query_length
    lead, again = (_at(each, first.chosen, length) for each in (lead, reread))
    if reread is not None and again is None:
        raise ValueError(
            f"reread was of the last {len(reread)} positions, but the chosen rows of text {text} are {first._numbers} of "
            f"{length}; expected these among them. Rows of padding count (pad on the left), and those that the cache leaves "
            "out (run without pos_slice)."
        )
    if reread is not None and lead is None:
        raise ValueError("reread was given, but the cache knows no next tokens of these rows; expected a run with logits.")
    overall = torch.stack([part.estimate[:, part.counted].mean() for part in layers.values()]).mean()
    chances = flip_chances(1 - torch.where(mass < 1, mass, overall), lead, again)
    return RowsAudit(text, tuple(first._numbers), *map(_floats, (mass, lead, again, chances)))


def _floats(x: Tensor | None) -> Any:
    return None if x is None else tuple(x.tolist())


def _at(lead: Float[Tensor, " pos"] | None, rows: Int[Tensor, " row"], length: int) -> Float[Tensor, " row"] | None:
    """What is known of the last positions of a text of some length, at its rows; None where it isn't known of all."""
    if lead is None:
        return None
    index = rows - (length - len(lead))
    return None if bool((index < 0).any()) else lead.to(rows.device)[index]


def _picked(shown: Tensor, rows: Sequence[int]) -> Tensor:
    n = len(shown)
    if any(not -n <= row < n for row in rows):
        raise IndexError(f"rows were {list(rows)}; expected query positions from 0 to {n - 1} (or from -{n}, from the end).")
    return shown[list(dict.fromkeys(row % n for row in rows))]


def _check(patterns: Mapping[int, BlockSparseTensor | JoinedTensor], rows: int | Sequence[int], sample: int) -> None:
    if not patterns:
        raise ValueError("The cache holds no pattern; expected hook_pattern among names_filter.")
    if (rows if isinstance(rows, int) else len(rows)) < 1:
        raise ValueError(f"rows was {rows!r}; expected how many of the last rows (an int >= 1), or positions.")
    if sample < 0:
        raise ValueError(f"sample was {sample}; expected how many further rows to draw, an int >= 0.")

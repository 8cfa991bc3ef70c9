"""A fidelity report: how near a sparse run came to the dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas
from rich.console import Group
from rich.table import Table

from tl_stream.audit import records
from tl_stream.pairs import percent_pruned


@dataclass(frozen=True)
class HeadFidelity:
    """One head, over all texts and compared rows. Everything is 1 where nothing was lost.

    Attributes:
        layer: Layer index.
        head: Head index.
        retained_mean: Share of the dense model's attention that lies on the kept blocks: mean over rows.
        retained_5th: Its 5th percentile over rows.
        retained_least: The worst row.
        worst_row: Which one, as a query position.
        block_recall: Share kept of the key blocks that the dense model reads most (as many as were kept), mean over query
            blocks.
        entry_recall: Share kept of the 32 keys that the dense model reads most, mean over rows.
        top_kept: Share of rows whose most-read key was kept.
        top_same: Share of rows whose most-read key is the same in both.
        pattern_cosine: Cosine similarity of the dense and the sparse row, mean over rows.
        output_cosine: Cosine similarity of the head's output z, mean over rows.
    """

    layer: int
    head: int
    retained_mean: float
    retained_5th: float
    retained_least: float
    worst_row: int
    block_recall: float
    entry_recall: float
    top_kept: float
    top_same: float
    pattern_cosine: float
    output_cosine: float


@dataclass(frozen=True)
class OutputFidelity:
    """The models' outputs, over all positions of all texts.

    Attributes:
        kl_mean: KL(dense || sparse) of the next-token distributions, in nats, mean over positions.
        kl_greatest: The worst position's.
        kl_last: The last position's, mean over texts.
        top_1: Share of positions at which both find the same token most likely.
        top_1_last: Share of texts for which they do at the last position.
        loss_dense: Mean next-token cross-entropy of the dense model, in nats; None where there is no next token.
        loss_sparse: The sparse model's.
        next_n: Share of the generated tokens before the first that differs, mean over texts; None: nothing was generated.
        new_tokens: How many were generated.
    """

    kl_mean: float
    kl_greatest: float
    kl_last: float
    top_1: float
    top_1_last: float
    loss_dense: float | None
    loss_sparse: float | None
    next_n: float | None
    new_tokens: int


@dataclass(frozen=True)
class LayerFidelity:
    """Cosine similarity of the residual stream after a layer, dense and sparse.

    Attributes:
        layer: Layer index.
        prompt_mean: Mean over the prompt's positions.
        prompt_least: The worst of them.
        generated: In the rows that give each new token, each model reading what it said itself; step 0 is the prompt's last
            row. Mean over texts.
        forced: Likewise, both reading the dense model's tokens, in one pass: these rows share their blocks with their query
            block, where a step of generation chooses its own.
    """

    layer: int
    prompt_mean: float
    prompt_least: float
    generated: tuple[float, ...]
    forced: tuple[float, ...]


@dataclass(frozen=True)
class Fidelity:
    """What `fidelity` found.

    Attributes:
        tokens: Length of the texts.
        texts: How many there are.
        rows: How many rows of each pattern were compared.
        pruned: Share of the token pairs that the sparse run dropped, over all layers and heads; of a layer with a sliding
            window, of its pairs.
        pruned_causal: The same of all causal pairs: what windows hide counts, too.
        heads: By layer and head.
        layers: By layer.
        output: The logits and the generated text.
    """

    tokens: int
    texts: int
    rows: int
    pruned: float
    pruned_causal: float
    heads: tuple[HeadFidelity, ...]
    layers: tuple[LayerFidelity, ...]
    output: OutputFidelity

    def table(self) -> Group:
        """Rich tables: heads, layers, output."""
        return Group(self._heads_table(), self._layers_table(), self._output_table())

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head."""
        return records.dataframe(self.heads)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        parts = {"heads": [records.record(x) for x in self.heads], "layers": [records.record(x) for x in self.layers]}
        return {**records.record(self), **parts, "output": records.record(self.output)}

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        mean = sum(head.retained_mean for head in self.heads) / max(1, len(self.heads))
        return (
            f"Fidelity({self.texts} x {self.tokens} tokens, pruned={self.pruned:.4f}, retained mass {mean:.3f}, "
            f"KL {self.output.kl_mean:.3g}, top-1 {self.output.top_1:.1%}, next-n {self.output.next_n})"
        )

    def _heads_table(self) -> Table:
        header = ("layer", "head", "kept: mean", "5th pct", "least (row)", "top blocks", "top 32 keys", "top key kept",
                  "same top key", "cos pattern", "cos z")  # fmt: skip
        cells = [
            (x.layer, x.head, x.retained_mean, x.retained_5th, f"{x.retained_least:.3f} ({x.worst_row})", x.block_recall,
             x.entry_recall, x.top_kept, x.top_same, x.pattern_cosine, x.output_cosine)
            for x in self.heads
        ]  # fmt: skip
        pruned = percent_pruned(self.pruned, self.pruned_causal)
        title = f"Heads against the dense model: {self.rows:,} of {self.tokens:,} rows, pruned pairs: {pruned}"
        return records.table(title, header, cells)

    def _layers_table(self) -> Table:
        steps = range(len(self.layers[0].generated) if self.layers else 0)
        header = ("layer", "prompt: mean", "least", "along", *(f"+{step}" for step in steps))
        cells = []
        for x in self.layers:
            cells.append((x.layer, x.prompt_mean, x.prompt_least, "own text", *x.generated))
            if steps:
                cells.append(("", "", "", "dense text", *x.forced))
        return records.table("Cosine similarity of the residual stream, on the prompt and along new tokens", header, cells)

    def _output_table(self) -> Table:
        x = self.output
        generated = "-" if x.next_n is None else f"{x.next_n:.0%} of {x.new_tokens} tokens before the first that differs"
        cells = [
            (
                "KL(dense || sparse), nats: mean, greatest, last position",
                f"{x.kl_mean:.3g}, {x.kl_greatest:.3g}, {x.kl_last:.3g}",
            ),
            ("same most likely token: all positions, last position", f"{x.top_1:.1%}, {x.top_1_last:.0%}"),
            ("loss, nats a token: dense, sparse", f"{_figure(x.loss_dense)}, {_figure(x.loss_sparse)}"),
            ("generated alike", generated),
        ]
        return records.table("Output", ("measure", "value"), cells)


def _figure(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"

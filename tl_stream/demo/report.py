"""The demo's result for people: figures, a table of heads, and the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tl_stream.cache import SparseActivationCache
from tl_stream.demo.answer import READS
from tl_stream.demo.result import DemoResult, HeadReading
from tl_stream.tasks import NeedleTask
from tl_stream.viz import Bins, Section, heads_view, row_strip, write_page
from tl_stream.viz.heads import Head, head_name, head_pattern

_HEADS_DRAWN = 12


def figures(result: DemoResult) -> list[tuple[str, str]]:
    """What was measured, and how much it is."""
    smaller = result.cache_bytes_dense / result.cache_bytes_sparse
    faster = result.seconds_dense / result.seconds_sparse
    kept, least = result.retained_mass_mean, result.retained_mass_least
    return [
        ("Text", f"{result.tokens:,} tokens, needle at depth {result.depth:g}, seed {result.seed}"),
        ("Expected answer", result.expected),
        ("Dense answer", _judged(result.answer_dense, result.expected)),
        ("Sparse answer", _judged(result.answer_sparse, result.expected)),
        ("Token pairs pruned", f"{result.pruned:.1%}, over all layers and heads"),
        ("Pattern cache, dense", _megabytes(result.cache_bytes_dense)),
        ("Pattern cache, sparse", f"{_megabytes(result.cache_bytes_sparse)} ({smaller:.0f} times less)"),
        ("Cached forward pass, dense", f"{result.seconds_dense:.2f} s"),
        ("Cached forward pass, sparse", f"{result.seconds_sparse:.2f} s ({faster:.1f} times faster)"),
        ("Attention kept, answer's rows", f"mean {kept:.1%}, worst head and token {least:.1%}"),
    ]


def heads_table(result: DemoResult) -> list[tuple[str, ...]]:
    """Header and rows, one a head; each pair is the answer's first token, and the token where it is most (or least)."""
    header = ("Head", "Sparse: 1st / most", "Dense: 1st / most", "Kept: 1st / least")
    return [header, *(_table_row(reading) for reading in result.heads)]


def write_report(
    path: Path, result: DemoResult, cache: SparseActivationCache, task: NeedleTask, strings: Sequence[str]
) -> None:
    """Write the page: the figures, the heads that read the needle, and where they read.

    Args:
        path: File to write; it appears whole or not at all.
        result: What to report.
        cache: The sparse run's patterns.
        task: The text.
        strings: Its tokens, with the spaces before them.

    Raises:
        ValueError: `path` can't be written.
    """
    heads = [(reading.layer, reading.head) for reading in result.heads[:_HEADS_DRAWN]]
    marks = {"needle": task.needle.slice, "question": task.question.slice}
    sections = [
        _run_section(result, cache, "".join(strings[task.needle.slice]).strip()),
        _heads_section(result),
        _strip_section(cache, heads, marks),
        _view_section(cache, heads, marks, strings),
    ]
    write_page(path, f"A needle in {result.tokens:,} tokens", sections)


def _run_section(result: DemoResult, cache: SparseActivationCache, needle: str) -> Section:
    config = cache.config
    return Section(
        "The run",
        f"The needle: “{needle}” The model was asked for its number, once with full attention and once with Stream "
        f"choosing {config.k} blocks of {config.block_k} keys for each {config.block_q} queries and head, and keeping the "
        "queries' own.",
        [("Figure", "Value"), *figures(result)],
    )


def _heads_section(result: DemoResult) -> Section:
    return Section(
        "The heads that read the needle",
        "Share of attention on the needle sentence, in the row that generates the answer's first token and in the one "
        f"where it is most. Listed from {READS:.0%} on, in either model. Kept: how much of the full softmax of the "
        "sparse run's own queries and keys lies on the kept blocks.",
        heads_table(result),
    )


def _strip_section(cache: SparseActivationCache, heads: Sequence[Head], marks: dict[str, slice]) -> Section:
    bins = Bins.of(cache.block_layout(heads[0][0]))
    last_rows = torch.stack([bins.mass(head_pattern(cache, head))[-1] for head in heads])
    return Section(
        "Where the answer position reads",
        "The last prompt token, which gives the answer's first token, in the sparse run. Each strip is a head; left to "
        f"right is the text in blocks of {bins.size} tokens.",
        row_strip(last_rows, [head_name(head) for head in heads], bins, marks),
    )


def _view_section(
    cache: SparseActivationCache, heads: Sequence[Head], marks: dict[str, slice], strings: Sequence[str]
) -> Section:
    bins = Bins.of(cache.block_layout(heads[0][0]))
    places = ", ".join(f"{name} {_numbers(bins.touched(part))}" for name, part in marks.items())
    return Section(
        "The heads' patterns, block by block",
        f"The sparse run. Rows read columns, {bins.size} tokens each; a cell is the greatest probability mass that any "
        f"single query of the row's block puts on the column's block. Blocks by number: {places}. Hover for the text.",
        heads_view(cache, heads, strings, marks=marks, over_queries="max"),
    )


def _table_row(reading: HeadReading) -> tuple[str, ...]:
    pairs = (
        (reading.needle_mass_sparse[0], max(reading.needle_mass_sparse)),
        (reading.needle_mass_dense[0], max(reading.needle_mass_dense)),
        (reading.retained_mass[0], min(reading.retained_mass)),
    )
    return head_name((reading.layer, reading.head)), *(f"{first:.1%} / {extreme:.1%}" for first, extreme in pairs)


def _numbers(blocks: range) -> str:
    """`63-64`, or `63` for a single one."""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"


def _judged(answer: str, expected: str) -> str:
    return f"{answer} ({'right' if answer == expected else 'wrong'})"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"

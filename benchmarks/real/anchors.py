"""The thought-anchor study of a real model, which `benchmarks/paper.py anchors --json JSON` wrote, as rows and tables.

    PYTHONPATH=benchmarks python -m real.anchors JSON ROWS

Each row of the study's tables is appended to ROWS with the model's name and versions, but for its scores and heads; a study
whose traces are there already is refused. Traces are told by their digests and the name of their files: the rows hold their
first words only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from paper_studies.loading import InputError
from rich.console import Console
from rich.table import Table

from real.common import append, rows
from tl_stream.audit import records

PARTS = ("traces", "fidelity", "receivers", "suppression")
LEFT_OUT = ("scores", "receiver heads")
PUBLISHED = "published: DeepSeek-R1-Distill-Qwen-1.5B, about 10,000 tokens (arXiv:2510.19875)"
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what benchmarks/paper.py anchors wrote")
    parser.add_argument("rows", type=Path, help="rows of all studies, JSON lines")
    options = parser.parse_args()
    try:
        added(json.loads(options.json.read_text(encoding="utf-8")), options.rows)
    except InputError as error:
        parser.error(str(error))
    for table in (traces_table, fidelity_table, receivers_table, suppression_table):
        Console(width=200).print(table(rows(options.rows)))
    return 0


def added(study: Row, path: Path) -> None:
    """Append a study's rows.

    Raises:
        InputError: A study of random weights, of something else, or one that is there already.
    """
    if study["study"] != "anchors" or study["dry_run"]:
        raise InputError(f"JSON was of {study['study']}, dry_run={study['dry_run']}; expected anchors, of a real model.")
    about = {"model": Path(study["model"]).name, "study": [row["digest"] for row in study["traces"]]}
    if any(about.items() <= row.items() for row in rows(path)):
        raise InputError(f"ROWS had a study of {about['model']} on these traces already; remove its rows to replace them.")
    for part in PARTS:
        for row in study[part]:
            kept = {name: value for name, value in row.items() if name not in LEFT_OUT}
            if "trace" in kept:
                kept["trace"] = Path(kept["trace"]).stem
            append(path, {**about, "part": part, **kept, "versions": study["versions"]})


def traces_table(found: list[Row]) -> Table:
    """What was read."""
    names = ("model", "trace", "tokens", "sentences", "of sentences", "repeated")
    header = ("model", "trace", "tokens", "sentences", "tokens of sentences", "sentences said before")
    return records.table("Traces", header, [[row[name] for name in names] for row in of(found, "traces")])


def fidelity_table(found: list[Row]) -> Table:
    """What the sparse models keep of the dense one."""
    names = ("model", "trace", "run", "k", "pruned", "mass kept", "worst head", "KL", "same top token", "next two")
    return records.table("Sparse models of the traces", names, [[row[name] for name in names] for row in of(found, "fidelity")])


def receivers_table(found: list[Row]) -> Table:
    """Vertical scores and receiver heads against the dense model's; lists are by trace."""
    names = ("model", "run", "pruned", "of the dense model's", "Spearman, kurtosis", "of heads", "scored sentences")
    listed = ("Spearman, own heads", "Spearman, dense heads", "Spearman, all heads")
    cells = [[*(said(row[name]) for name in (*names, *listed))] for row in of(found, "receivers")]
    header = ("model", "run", "pruned", "receiver heads found", *names[4:], *listed)
    published = [PUBLISHED, "paper", "97 to 99 %", "most", *[None] * 6]
    return records.table("Receiver heads", header, [*cells, published])


def suppression_table(found: list[Row]) -> Table:
    """Effects of suppressed sentences against the dense model's."""
    names = ("model", "run", "tokens", "suppressed", "pruned", "Spearman, sentence scores", "Spearman, all pairs",
             "same top source", "seconds")  # fmt: skip
    return records.table("Suppressed sentences", names, [[row[name] for name in names] for row in of(found, "suppression")])


def of(found: list[Row], part: str) -> list[Row]:
    return [row for row in found if row["part"] == part]


def said(value: Any) -> Any:
    """A list, one number a trace, in words."""
    if not isinstance(value, list):
        return value
    return " / ".join("-" if each is None else f"{each:.2f}" if isinstance(each, float) else str(each) for each in value)


if __name__ == "__main__":
    raise SystemExit(main())

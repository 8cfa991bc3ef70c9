"""docs/real_models.md, from page.md beside this file and the rows that the studies left: no number in a table is typed in.

    PYTHONPATH=benchmarks python -m real.report [--rows FOLDER] [--page FILE]

A line `@ STUDY.TABLE FILE` in page.md stands for the table that a module of this folder makes of a file of rows.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from rich.table import Table

from real.common import rows

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "real_models.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE / "rows", metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="what is written (%(default)s)")
    options = parser.parse_args()
    lines = (HERE / "page.md").read_text(encoding="utf-8").splitlines()
    options.page.write_text("\n".join(written(line, options.rows) for line in lines) + "\n", encoding="utf-8")


def written(line: str, folder: Path) -> str:
    """A line of page.md, or the table that it stands for."""
    if not line.startswith("@ "):
        return line
    _, table, file = line.split()
    study, _, name = table.partition(".")
    found = rows(folder / file)
    return markdown(getattr(import_module(f"real.{study}"), name)(found)) if found else f"({file} has no rows yet.)"


def markdown(table: Table) -> str:
    """A table as Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    rule = "|" + "|".join(" ---: " if column.justify == "right" else " --- " for column in table.columns) + "|"
    return "\n".join([f"{table.title}:", "", head, rule, *lines])


if __name__ == "__main__":
    main()

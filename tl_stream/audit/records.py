"""Rows of results as a table for people, a pandas DataFrame, and plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pandas
from rich.table import Table


def record(row: Any) -> dict[str, Any]:
    """A dataclass as a dict of its fields; tensors become lists."""
    return {field.name: _plain(getattr(row, field.name)) for field in fields(row)}


def dataframe(rows: Sequence[Any]) -> pandas.DataFrame:
    """Dataclasses as rows, fields as columns."""
    return pandas.DataFrame([record(row) for row in rows])


def table(title: str, header: Sequence[str], cells: Sequence[Sequence[Any]], caption: str | None = None) -> Table:
    """A table whose floats are written with three digits."""
    made = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    for name in header:
        made.add_column(name, justify="left" if cells and isinstance(cells[0][len(made.columns)], str) else "right")
    for row in cells:
        made.add_row(*(_written(cell) for cell in row))
    return made


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _written(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)

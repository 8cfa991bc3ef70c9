"""Finished cells of a needle study in a file of JSON lines, so that an interrupted study goes on where it was.

The first line holds the settings, each further one a cell, with its budget and a digest of its prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tl_stream import budget
from tl_stream.analysis.needle_result import NeedleCell
from tl_stream.budget import Budget
from tl_stream.config import StreamConfig
from tl_stream.tasks import Task

Rule = Budget | StreamConfig
_FORMAT = "tl_stream.needle_grid/1"


class CellStore:
    """Reads and appends cells; without a path it remembers nothing.

    Args:
        path: The file; made where there is none.
        settings: What all cells depend on, as JSON has it.

    Raises:
        ValueError: The file is of another kind, or its study had other settings.
        OSError: The file can't be read or written.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[tuple[int, float, str], dict[str, Any]] = {}
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path, settings)
        else:
            self._append({"format": _FORMAT, "settings": settings})

    def find(self, length: int, depth: float, name: str, rule: Rule, tasks: Sequence[Task]) -> NeedleCell | None:
        """The finished cell, or None; a cell without one of today's figures isn't one.

        Raises:
            ValueError: It was computed with another budget of this name, or on other texts.
        """
        row = self._rows.get((length, depth, name))
        names = [each.name for each in fields(NeedleCell)]
        if row is None or not row.keys() >= set(names):
            return None
        for what, found, expected in (
            (f"the budget {name!r}", row["rule"], as_json(rule)),
            (f"the texts (task, tokenizer) of {length} tokens at depth {depth}", row["prompts"], digest(tasks)),
        ):
            if found != expected:
                raise _changed(self.path, what, found, expected)
        return NeedleCell(**{name: row[name] for name in names})

    def add(self, cell: NeedleCell, rule: Rule, tasks: Sequence[Task]) -> None:
        """Write a finished cell."""
        if self.path is not None:
            self._append({**asdict(cell), "rule": as_json(rule), "prompts": digest(tasks)})

    def _append(self, row: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # an interrupted write leaves a last line without an end
        try:
            first, *rows = [json.loads(line) for line in whole.splitlines()]
            is_ours = first["format"] == _FORMAT
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise ValueError(f"path: {str(path)!r} holds no needle study; expected a file that needle_grid began, or none.")
        for name, value in settings.items():
            if first["settings"].get(name) != value:
                raise _changed(path, name, first["settings"].get(name), value)
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self._rows = {(row["length"], row["depth"], row["budget"]): row for row in rows}


def as_json(rule: Rule) -> Any:
    """A budget, or a whole config with its estimator's name, as JSON has it."""
    if isinstance(rule, Budget):
        return budget.to_json(rule)
    estimator = getattr(rule.estimator, "__qualname__", rule.estimator)
    layers = list(rule.dense_layers) if isinstance(rule.dense_layers, tuple) else rule.dense_layers
    return {**rule.to_json(), "estimator": estimator, "dense_layers": layers}


def digest(tasks: Sequence[Task]) -> str:
    """Tells texts and answers apart."""
    return hashlib.sha256(json.dumps([[task.prompt, task.answer] for task in tasks]).encode()).hexdigest()[:16]


def _changed(path: Path | None, what: str, found: Any, expected: Any) -> ValueError:
    return ValueError(
        f"path: {str(path)!r} holds a study in which {what} differ: it has {found}, this call {expected}. Expected the same "
        "settings as before; name another file, or delete this one to begin anew."
    )

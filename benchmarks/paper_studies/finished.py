"""The steps of a study that are done, in a file of JSON lines: an interrupted study repeats none of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real.common import append, rows
from torch import Tensor

Say = Callable[[str, Any], None]


class Finished:
    """Remembers what each step gave, and says it.

    Args:
        folder: Where the file is, made where there is none; None: nothing is remembered.
        about: What all steps depend on, as JSON has it: the study, the model.
        say: Told each step's name and what it gave, also when that was remembered.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], say: Say) -> None:
        self.folder, self.about, self.say = folder, about, say
        self._file = None if folder is None else folder / "steps.jsonl"
        self._done: dict[str, Any] = {}
        if folder is not None and self._file is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._done = {digest(row["key"]): row["value"] for row in rows(self._file)}

    def once(self, step: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What a step gives: read where it was finished before with the same inputs, else computed and written.

        Args:
            step: Its name.
            inputs: What it depends on besides `about`, as JSON has it.
            compute: Gives plain data.
        """
        key = {**self.about, "step": step, **inputs}
        if (name := digest(key)) not in self._done:
            value = compute()
            if self._file is not None:
                append(self._file, {"key": key, "value": value})
            self._done[name] = json.loads(json.dumps(value))
        self.say(step, self._done[name])
        return self._done[name]

    def cells(self, settings: dict[str, Any]) -> Path | None:
        """A file for `needle_grid`, of its own for these settings and this model."""
        return None if self.folder is None else self.folder / f"cells-{digest({**self.about, **settings})}.jsonl"


def digest(value: Any) -> str:
    """Tells plain data, or tokens, apart."""
    plain = value.tolist() if isinstance(value, Tensor) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

"""What the studies of real models share: a model from a folder, and finished cases in a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from paper_studies import loading


def load(folder: str) -> Any:
    """A TransformerBridge in float32 on the CPU, with its tokenizer. InputError as `paper_studies.loading.load`."""
    return loading.load(folder, "cpu", torch.float32)


def rows(path: Path) -> list[dict[str, Any]]:
    """The finished cases; none where there is no file. A last line that an interrupted write left without an end isn't one."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a finished case."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")

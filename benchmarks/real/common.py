"""What the studies of real models share: a model from a folder, finished cases in a file of JSON lines, and memory."""

from __future__ import annotations

import ctypes
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


def reset_peak() -> int | None:
    """Let the process's peak memory begin anew (Linux); what it takes now, in bytes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, but not given back, would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return peak()


def peak() -> int:
    """The most memory that the process took since, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

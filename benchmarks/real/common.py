"""What the studies of real models share: a model from a folder, finished cases in a file of JSON lines, and memory."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from english.corpus import held_out_text
from jaxtyping import Int
from paper_studies import loading
from torch import Tensor

import tl_stream


def load(folder: str) -> Any:
    """A TransformerBridge in float32 on the CPU, with its tokenizer. InputError as `paper_studies.loading.load`."""
    return loading.load(folder, "cpu", torch.float32)


def prose(tokenizer: Any, tokens: int) -> Int[Tensor, "1 pos"]:
    """So many tokens of held-out English. ValueError: it has fewer."""
    found = tokenizer(held_out_text()[: 12 * tokens])["input_ids"][:tokens]
    if len(found) < tokens:
        raise ValueError(f"tokens was {tokens}; expected at most the {len(found)} of the held-out text.")
    return torch.tensor([found])


def versions() -> dict[str, str]:
    """Of what a case was computed with."""
    others = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
    return {"tl_stream": tl_stream.__version__, **others}


def once(path: Path, about: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The finished case that says all of `about`; computed and added where there is none."""
    for row in rows(path):
        if about.items() <= row.items():
            return row
    row = {**about, **compute()}
    append(path, row)
    return row


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

"""The README's Python runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 2
    names: dict[str, Any] = {}
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, str(README), "exec"), names)
    assert names["cache"].pruned > 0.8
    assert names["logits"].shape[:2] == (1, 1)
    assert "pruned" in capsys.readouterr().out


def test_the_two_commands_stand_in_the_readme() -> None:
    text = README.read_text()
    assert re.search(r"^python3 -m venv .*tl-stream demo$", text, re.MULTILINE)
    assert re.search(r"^python3 -m venv .* -m pytest$", text, re.MULTILINE)

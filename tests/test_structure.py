"""The parts import one another in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import tl_stream

ORDER = [
    "budget", "config", "precision", "masking", "score_mod", "layout", "pairs", "estimator", "attention", "tensors", "audit",
    "hosts", "cache", "tracing", "recheck", "fidelity", "tasks", "analysis", "viz", "models", "demo", "cli",
]  # fmt: skip
ROOT = Path(tl_stream.__file__).parent


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tl_stream":
            parts |= {alias.name for alias in node.names if alias.name in ORDER}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tl_stream."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tl_stream.")}
    return parts


def test_every_part_imports_only_what_comes_before_it() -> None:
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(files) > 20
    for path in files:
        part = part_of(path)
        assert part in ORDER, f"{path} is in no known part"
        later = {other for other in imported_parts(path) if ORDER.index(other) > ORDER.index(part)}
        assert not later, f"{path} imports {later}"


def test_no_backend_imports_the_reference() -> None:
    for path in (ROOT / "attention").glob("*.py"):
        if path.name != "sparse.py":
            assert "attention.reference" not in path.read_text()

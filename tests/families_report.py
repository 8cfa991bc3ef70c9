"""`pytest --families-json FILE`: what the tests of each family found, for docs/make_families.py."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

VERSIONS = {
    "transformer-lens": version("transformer-lens"),
    "transformers": transformers.__version__,
    "torch": torch.__version__,
}
"""Of what this process loaded: packages may be replaced on disk while it runs."""


class FamiliesReport:
    """Collects the outcomes of tests that record a `family`, and the errors and sizes that they record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        properties = dict(report.user_properties)
        if "family" not in properties or (report.when != "call" and report.outcome == "passed"):
            return
        errors = [value for name, value in report.user_properties if name == "error"]
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else None
        found = {"outcome": report.outcome, "reason": reason, "error": max(errors, default=None)}
        self.results.append({**properties, **found})

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"versions": VERSIONS, "results": self.results}, indent=1))

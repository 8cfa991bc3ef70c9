"""Shapes and types of every annotated function are checked while the tests run.

Not in `config`, `tracing`, `fidelity.report` and parts of `analysis`: those check their arguments themselves, and their
messages are tested.
"""

from jaxtyping import install_import_hook

CHECKED = [
    "analysis.attention_flow", "analysis.figures", "analysis.kept", "analysis.receivers", "analysis.segments",
    "analysis.sentence_patterns", "attention", "audit", "cache", "estimator", "fidelity.output", "fidelity.result",
    "fidelity.runs", "fidelity.streamed", "hosts", "layout", "masking", "models", "score_mod", "tasks", "tensors", "viz",
]  # fmt: skip
with install_import_hook([f"tl_stream.{name}" for name in CHECKED], "beartype.beartype"):
    import tl_stream  # noqa: F401

from pathlib import Path

import pytest
import torch
from families_report import FamiliesReport


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-json", type=Path, help="write what tests/test_families.py found to this file")
    parser.addoption("--real-model", type=Path, metavar="FOLDER", help="SmolLM2, for tests/test_real_model.py")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--families-json")
    if path is not None:
        config.pluginmanager.register(FamiliesReport(path))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

"""Shapes and types of every annotated function are checked while the tests run.

Not in `config` and `tracing`: those check their arguments themselves, and their messages are tested.
"""

from jaxtyping import install_import_hook

CHECKED = ["attention", "cache", "estimator", "hosts", "layout", "masking", "models", "score_mod", "tasks", "tensors", "viz"]
with install_import_hook([f"tl_stream.{name}" for name in CHECKED], "beartype.beartype"):
    import tl_stream  # noqa: F401

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

"""Shapes and types of every annotated function are checked while the tests run."""

from jaxtyping import install_import_hook

with install_import_hook("tl_stream", "beartype.beartype"):
    import tl_stream  # noqa: F401

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

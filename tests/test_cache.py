"""A cache that was saved and loaded again is the same cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import build, gap, tokens

from tl_stream import SparseActivationCache, StreamConfig

CONFIG = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0, dense_layers=(0,))


@pytest.mark.parametrize("variant", ["gqa", "alibi", "sinks", "soft-capped", "local"])
@pytest.mark.parametrize("options", [{}, {"remove_batch_dim": True}, {"attention_mask": True}], ids=str)
@torch.no_grad()
def test_save_and_load(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, text = build(variant), tokens(batch=1)
    if "attention_mask" in options:
        options = {"attention_mask": (torch.arange(61) > 9).long()[None]}
    _, cache = model.run_with_sparse_cache(text, config=CONFIG, **options)
    cache["pattern", 2][..., 0, :, :] *= 0.5
    cache.save(tmp_path / "run.safetensors")
    loaded = SparseActivationCache.load(tmp_path / "run.safetensors", model)
    assert list(loaded.keys()) == list(cache.keys())
    assert loaded.config == CONFIG
    assert loaded.pruned == cache.pruned
    for name in cache.keys():
        assert type(loaded[name]) is type(cache[name])
        assert gap(cache[name], loaded[name]) == 0, name
    assert gap(loaded["pattern", 1].retained_mass(), cache["pattern", 1].retained_mass()) == 0
    assert loaded.has_batch_dim == cache.has_batch_dim
    assert (tmp_path / "run.safetensors").stat().st_size < 1.2 * cache.nbytes + 60_000
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no SparseActivationCache; expected a file that save\(\) wrote"):
        SparseActivationCache.load(tmp_path / "other.safetensors")


@torch.no_grad()
def test_what_transformer_lens_does_with_a_cache() -> None:
    model, text = build("standard"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    assert cache["attn", 1] is cache["pattern", 1]
    assert cache["pattern", -1] is cache["pattern", 2]
    assert cache.accumulated_resid(-1).shape == (4, 2, 61, 32)
    assert cache.stack_head_results(-1).shape == (12, 2, 61, 32)
    assert cache.to("cpu")["pattern", 1].shape == (2, 4, 61, 61)
    _, single = model.run_with_sparse_cache(text[:1], config=CONFIG)
    assert gap(single.remove_batch_dim()["pattern", 1], cache["pattern", 1][0]) < 1e-12
    assert "pruned=" in repr(cache)

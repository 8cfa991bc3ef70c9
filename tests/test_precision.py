"""bfloat16 and float16 on CPU: no further from float64 than twice the dense model in that type."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from dense_reference import EditedAttention, masked

from tl_stream import StreamConfig

FULL = StreamConfig(block_q=8, block_k=8, k=1000, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=3, beam=1, max_dense=0)


@pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Gemma 2", "GPT-NeoX", "OPT", "BLOOM", "GPT-OSS"])
@torch.no_grad()
def test_low_precision(family: str, dtype: torch.dtype, config: StreamConfig) -> None:
    text = families.tokens()
    low = families.build(family, dtype)
    logits, cache = low.run_with_sparse_cache(text, config=config)
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def dense(model: Any) -> torch.Tensor:
        with EditedAttention(keep, text.shape[1], masked(keep)):
            return model(text).double()

    exact = dense(families.build(family, torch.float32).to(torch.float64) if "OSS" not in family else families.build(family))
    ours, theirs = ((x.double() - exact).abs().mean() for x in (logits, dense(low)))
    assert logits.dtype == dtype
    assert cache["pattern", 1].dtype == dtype
    assert ours <= 2 * theirs

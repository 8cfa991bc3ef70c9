"""Does patching by block find, from coarse to fine, the tokens that an answer depends on?

The bundled model reads two prompts of 4,096 tokens that differ in the needle's number alone. What enters the first layer
is patched block by block from one into the other; the metric is the logit difference of the two first digits. The needle's
number is the only place that matters, so the block found must hold it, and patching it alone must restore the answer.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import patch_by_block
from tl_stream.tasks import niah_single_1

TOKENS = 4096
BLOCK = 32
FIRST_SEED = 30_000
CONFIG = StreamConfig(k=8)


def patching(quick: bool) -> dict[str, Any]:
    """The study."""
    model: Any = tl_stream.models.load()
    rows = [
        study(model, seed)
        for seed in tqdm(range(FIRST_SEED, FIRST_SEED + (2 if quick else 14)), desc="patching", file=sys.stderr)
    ]
    found = sum(row["found"] for row in rows)
    effects = [row["effect"] for row in rows]
    forwards = [row["forwards"] for row in rows]
    summary = {
        "needle's block ranks first": f"{found}/{len(rows)}",
        "its effect (1 restores the clean metric)": f"{min(effects):.3f} to {max(effects):.3f}",
        "forwards": f"{min(forwards)} to {max(forwards)}, of {rows[0]['blocks']} blocks",
    }
    return {"summary": summary, "rows": rows}


def study(model: Any, seed: int) -> dict[str, Any]:
    """One pair of texts."""
    task = niah_single_1(model.tokenizer, TOKENS, depth=seed % 7 / 6, seed=seed)
    clean = model.to_tokens(task.prompt)
    digits = clean[0, task.value.slice]
    first, other = int(digits[0]), int(next(x for x in digits if x != digits[0]))
    corrupted = clean.clone()
    corrupted[0, task.value.start] = other
    result = patch_by_block(
        model,
        clean,
        corrupted,
        lambda logits: logits[0, -1, first] - logits[0, -1, other],
        config=CONFIG,
        block=BLOCK,
        progress=False,
    )
    best = result.finest[0]
    return {
        "seed": seed,
        "found": best.start <= task.value.start < best.stop,
        "effect": best.effect,
        "forwards": result.n_forwards,
        "planned": result.planned,
        "blocks": -(-TOKENS // BLOCK),
    }
